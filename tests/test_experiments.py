"""Experiments: commands, resuming, what a line holds, statistics by hand, the report; at the end a small suite as a user runs it."""

import dataclasses
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffpo_jax import command_line, experiments
from diffpo_jax import experiment_report as report
from diffpo_jax import experiment_results as results
from diffpo_jax.algorithms import ALGORITHMS
from diffpo_jax.evaluate import load_curve
from tests import runs


def cell(seed=0, algorithm="d1", mode="joint", suite="main", task="math", **overrides):
    return experiments.Cell(suite, task, algorithm, mode, seed, {name.replace("__", "."): value for name, value in overrides.items()})


def line(of=None, accuracy=0.6, nfe=3.0, scale=1.0, **fields):
    """A line of a done cell. The trained curve is (2, 0.4) (4, 0.8) times `scale` of 11 calls: hypervolume 0.64 x scale."""
    return {
        "cell": dataclasses.asdict(of or cell()),
        "command": "python -m diffpo_jax.main",
        "status": "done",
        "max_nfe": 11,
        "base": {"curve": [[8.0, 0.2, 2.0], [1.0, 0.6, 3.0], [0.1, 0.6, 4.0]]},
        "trained": {
            "curve": [[8.0, 0.4 * scale, 2.0], [0.1, 0.8 * scale, 4.0]],
            "operating_point": {"accuracy": accuracy, "nfe": nfe, "threshold_mean": 1.0, "threshold_std": 0.1},
        },
        "comparison": {"gain": accuracy - 0.5, "nfe_saving_at_base_accuracy": 0.25},
        "progress": [[2, 100, 0.2, 4.0], [4, 300, accuracy, nfe]],
        "training": dict.fromkeys(results.TRAINING, 0.5),
        "ess": [0] * 24 + [4],
        "cost": {"denoiser_calls": 300, "flops": 2e12, "seconds": {"rl": 60.0}},
    } | fields


def write_lines(path, *lines):
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines))


# --- cells and commands ---


def test_suites_have_the_cells_they_should():
    main = experiments.make_cells("main")
    assert len(main) == 3 * 5 * 16 and len({each.name for each in main}) == len(main)
    sampler = [each for each in main if each.mode == "sampler"]
    assert len(sampler) == 15 and {each.algorithm for each in sampler} == {""}
    tune = experiments.make_cells("tune")
    assert len(tune) == 3 * 12 * 3 and {each.seed for each in tune} == {100} and "sampler" not in {each.mode for each in tune}
    assert len(experiments.make_cells("caps")) == 3 * 3 * 7
    assert len(experiments.make_cells("thresholds")) == 3 * 5
    stabilised = experiments.make_cells("stabilisers", ["math"], seeds=[0])
    assert [list(each.overrides) for each in stabilised] == [[], *[["rl.elbo_weight", "rl.elbo_rows"]] * 2, ["sampler.mixture"]]
    assert "--config.sampler.mixture=(0.01,0.3,1.0)" in experiments.cell_command(stabilised[-1], "results")
    assert [each.name for each in experiments.make_cells("debug", seeds=(1,))] == [
        "debug-countdown-fixed-1-importance_cap=1.0", "debug-countdown-joint-1-importance_cap=1.0",
    ]  # fmt: skip


def test_a_part_of_a_suite():
    chosen = experiments.make_cells("main", ("math",), ("d1", "sampler"), (7,))
    assert [each.name for each in chosen] == ["main-math-d1-fixed-7", "main-math-d1-joint-7", "main-math-sampler-7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("large",), "unknown suite: large; known: main, tune, caps, thresholds, stabilisers, debug"),
        (("main", ["math", "chess"]), "unknown task: chess; known: countdown, math, sudoku"),
        (("main", [], ["ppo", "dpo"]), f"unknown algorithm: ppo, dpo; known: {', '.join(ALGORITHMS)}, sampler"),
    ],
)
def test_unknown_names_list_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        experiments.make_cells(*arguments)


def test_commands():
    joint, tuned = cell(3), cell(100, "diffpo", "fixed", "tune", "sudoku", rl__learning_rate=3e-5)
    assert shlex.join(experiments.base_command(joint, "results")) == (
        "python -m diffpo_jax.main --config=configs/math.py:suite --mode=sft --workdir=results/base/math"
    )
    assert shlex.join(experiments.cell_command(joint, "results")) == (
        "python -m diffpo_jax.main --config=configs/math.py:suite --config.algorithm=d1 --config.rl.mode=joint --config.seed=3 "
        "--config.sft.checkpoint=results/base/math/sft --workdir=results/runs/main-math-d1-joint-3"
    )
    assert "--config.rl.learning_rate=0.0003" in experiments.cell_command(joint, "results", 3e-4)
    assert experiments.base_command(tuned, "r")[-2:] == ["--config.eval.skip=512", "--workdir=r/base/sudoku"]
    assert experiments.cell_command(tuned, "r")[4:] == [
        "--config.algorithm=diffpo", "--config.rl.mode=model", "--config.rl.model_reward=task", "--config.seed=100",
        "--config.sft.checkpoint=r/base/sudoku/sft", "--config.eval.skip=512", "--config.rl.learning_rate=3e-05",
        "--workdir=r/runs/tune-sudoku-diffpo-fixed-100-learning_rate=3e-05",
    ]  # fmt: skip
    alone = experiments.cell_command(cell(algorithm="", mode="sampler"), "r")
    assert "--config.rl.mode=sampler" in alone and not any("algorithm" in flag for flag in alone)


def test_the_learning_rate_is_the_one_of_the_largest_hypervolume():
    def tune(rate, scale, seed=100, **fields):
        return line(cell(seed, suite="tune", rl__learning_rate=rate), scale=scale, **fields)

    lines = [tune(3e-5, 0.5), tune(1e-4, 0.2), tune(1e-4, 0.9, seed=101), tune(3e-4, 0.4)]  # means 0.5, 0.55, 0.4
    lines += [tune(1e-3, 1.0, status="failed"), line(cell(algorithm="mf2", suite="tune", rl__learning_rate=1e-2), scale=1.0)]
    tuning = dict(enumerate(lines))
    assert experiments.tuned_learning_rate(tuning, "math", "d1") == 1e-4
    assert experiments.tuned_learning_rate(tuning, "math", "mf2") == 1e-2
    assert experiments.tuned_learning_rate(tuning, "math", "diffpo") is None
    assert experiments.tuned_learning_rate(tuning, "sudoku", "d1") is None


# --- jobs ---


def test_done_cells_are_left_out_failed_ones_are_not_and_base_models_come_first(tmp_path):
    cells = experiments.make_cells("main", ("math",), ("d1",), (0, 1, 2))
    failed = {"cell": dataclasses.asdict(cells[3]), "command": "", "status": "failed", "error": ""}
    write_lines(tmp_path / "main.jsonl", *(line(each) for each in cells[:3]), failed)
    write_lines(tmp_path / "tune.jsonl", line(cell(100, mode="fixed", suite="tune", rl__learning_rate=1e-2)))
    jobs = experiments.make_jobs(cells, str(tmp_path))
    names = ["math", "main-math-d1-joint-1", "main-math-d1-fixed-2", "main-math-d1-joint-2"]
    assert [job.workdir.name for job in jobs] == names
    assert {job.base.name for job in jobs} == {"math"}
    rates = [[flag for flag in job.command if "learning_rate" in flag] for job in jobs]
    assert rates == [[], *[["--config.rl.learning_rate=0.01"]] * 3]  # of what was tuned


def test_a_line_is_added_in_a_row_of_its_own_and_the_later_one_counts(tmp_path):
    path = tmp_path / "main.jsonl"
    results.append(path, line(status="failed"))
    with path.open("a") as file:
        file.write('{"cell": {"sui')  # killed while writing
    results.append(path, line(cell(1)))
    results.append(path, line(status="done", error=math.nan))
    assert len(path.read_text().splitlines()) == 4
    found = results.read(path)
    assert [(each["cell"]["seed"], each["status"]) for each in found.values()] == [(0, "done"), (1, "done")]
    assert results.read(tmp_path / "none.jsonl") == {}


def test_cores_are_shared_without_overlap_where_there_are_enough(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 4, 6, 8}, raising=False)
    assert experiments.share_cores(1) == [None]
    assert experiments.share_cores(2) == [{0, 2}, {4, 6}]
    assert experiments.share_cores(6) == [{0}, {2}, {4}, {6}, {8}, {0}]


def stand_in(base, name, code, seed=0):
    """A job whose command is a line of Python; `base` None makes it a base model."""
    workdir = base.parent / name
    return experiments.Job(["python", "-c", f"workdir = {str(workdir)!r}\n{code}"], workdir, base, None if workdir == base else cell(seed))


MAKES_BASE = "import os; os.makedirs(f'{workdir}/data'); open(f'{workdir}/base.npz', 'w').write('curve')"
ENDS_WELL = "open(f'{workdir}/summary.json', 'w').write(open(f'{workdir}/base.npz').read() + str(__import__('os').listdir(workdir)))"


def test_jobs_wait_for_their_base_model_and_failures_are_told(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    jobs = [
        stand_in(bad, "bad", "import sys; print('out'); sys.exit('error: no such field\\n(hint)')"),
        stand_in(bad, "lost", ENDS_WELL),
        stand_in(good, "good", MAKES_BASE),
        stand_in(good, "one", ENDS_WELL),
        stand_in(good, "stopped", "print('stopped by SIGTERM')"),  # ends with code 0 and without a summary
    ]
    ended = {}
    experiments.run_jobs(jobs, 2, lambda job, seconds, error: ended.update({job.workdir.name: error}))
    failed = "exit code 1\nerror: no such field\n(hint)"
    assert ended == {
        "bad": failed, "lost": f"no base model: {failed}", "good": "", "one": "", "stopped": "exit code 0\nstopped by SIGTERM",
    }  # fmt: skip
    assert not (tmp_path / "lost").exists()
    assert (tmp_path / "one" / "summary.json").read_text().startswith("curve[") and (tmp_path / "one" / "data").resolve() == good / "data"


def test_an_interrupt_stops_what_runs(tmp_path):
    says = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(open(f'{workdir}-told', 'w').close()))"
    job = stand_in(tmp_path / "base", "base", f"{says}\nos.kill(os.getppid(), signal.SIGALRM)\ntime.sleep(60)")
    before, began = signal.signal(signal.SIGALRM, experiments._interrupt), time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            experiments.run_jobs([job], 1, lambda *_: None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "base-told").exists() and time.monotonic() - began < 50  # it could save, and was waited for


def test_sigterm_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    died = []
    monkeypatch.setattr(command_line, "_die_of_interrupt", lambda: died.append(True))
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(experiments, "run", lambda *_: signal.raise_signal(signal.SIGTERM))
    experiments.main(["--suite=debug", f"--out={tmp_path}"])
    assert died and capsys.readouterr().err == "stopped; the same command goes on from here\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_failed_cells_are_recorded_and_reported(tmp_path, monkeypatch, capsys):
    failing = [sys.executable, "-c", "raise SystemExit('error: out of luck')"]
    monkeypatch.setattr(experiments, "base_command", lambda *_: failing)
    cells = experiments.make_cells("debug", seeds=(0,))
    experiments.run(cells, str(tmp_path), 1)
    lines = list(results.read(tmp_path / "debug.jsonl").values())
    assert [each["status"] for each in lines] == ["failed", "failed"]
    assert all(each["error"] == "no base model: exit code 1\nerror: out of luck" for each in lines)
    assert lines[0]["command"] == shlex.join(experiments.cell_command(cells[0], str(tmp_path)))
    printed = capsys.readouterr().out
    assert printed.startswith("2 cells, 0 of them done\nbase model countdown: failed after ")
    assert " s, 2 left\nexit code 1\nerror: out of luck\ndebug-countdown-fixed-0-importance_cap=1.0: failed after 0 s, 1 left\n" in printed
    text = report.write(tmp_path, "debug").read_text()
    assert "## Failed" in text and lines[1]["command"] in text and "error: out of luck" in text


# --- what a line holds ---


def test_rounding_keeps_what_is_no_float():
    value = {"a": [0.123456789, 123456.789, math.inf], "b": 1234567, "c": ("NaN", None, True)}
    assert results.rounded(value) == {"a": [0.12346, 123460.0, math.inf], "b": 1234567, "c": ["NaN", None, True]}


def test_final_means_are_over_the_last_quarter():
    steps = [{"reward": float(i), "kl": 1.0 if i else "NaN"} for i in range(9)]
    assert results.final_means(steps) == {"reward": 7.5, "kl": 1.0}  # steps 7 and 8; other metrics are not in all lines
    assert results.final_means(steps[:1])["reward"] == 0 and math.isnan(results.final_means(steps[:1])["kl"])
    assert results.final_means([]) == {}


def test_steps_are_counted_by_their_effective_sample_size():
    steps = [{"weight/ess": value} for value in (0.03, 0.05, 0.07, 1.0)] + [{"reward": 0.5}]
    assert results.ess_counts(steps) == [1, 2] + [0] * 22 + [1]
    assert not any(results.ess_counts([{"reward": 0.5}]))  # of the sampler alone


def test_flops_by_hand():
    from configs import default

    config = default.get_config()
    config.update_from_flattened_dict({
        "model.width": 4, "model.layers": 1, "model.heads": 1, "model.kv_heads": 1, "model.mlp_width": 8, "model.vocab_size": 10,
        "task.prompt_length": 3, "task.response_length": 5, "rl.prompts": 2, "rl.group_size": 3, "rl.inner_steps": 2,
        "likelihood.num_latents": 2,
    })  # fmt: skip
    kernels = 4 * 4 * 4 + 3 * 4 * 8  # attention, SwiGLU
    row = 8 * (2 * kernels + 4 * 8 * 4) + 2 * 5 * 4 * 10  # 8 positions through the trunk, 5 through the head
    assert results.flops(config.to_dict(), calls=100, steps=0) == 100 * row
    assert results.flops(config.to_dict(), calls=100, steps=7) == (100 + 2 * 7 * 2 * 6 * 2) * row  # steps, updates, rows, latents
    config.rl.mode = "sampler"
    assert results.flops(config.to_dict(), calls=100, steps=7) == 100 * row


# --- statistics ---


def test_measures_by_hand():
    found = report.measures(line(accuracy=0.7, nfe=3.0))
    assert found["accuracy"] == 0.7 and found["nfe"] == 3 and found["nfe_saved"] == 0.25
    assert found["gain"] == pytest.approx(0.2)
    assert found["hypervolume"] == pytest.approx((2 * 0.4 + 7 * 0.8) / 10)
    assert found["best_at_base_nfe"] == pytest.approx(0.6)  # the base is at its best from 3 calls on: half-way from 0.4 to 0.8
    assert found["nfe_at_base_best"] == pytest.approx(3.0)  # and there as good
    assert found["over_single_threshold"] == pytest.approx(0.1)  # 0.7 against 0.6
    assert (found["denoiser_calls"], found["flops"], found["seconds"]) == (300, 2e12, 60)
    assert math.isnan(report.measures(line(cell(mode="fixed")))["over_single_threshold"])
    assert math.isnan(report.measures(line(comparison={"gain": 0, "nfe_saving_at_base_accuracy": "NaN"}))["nfe_saved"])


def test_aggregate_by_hand():
    groups = report.group([line(cell(seed), accuracy) for seed, accuracy in enumerate((0.5, 0.6, 0.7))] + [line(cell(9), status="failed")])
    ((key, seeds),) = groups.items()
    assert key == ("math", "d1", "joint", ()) and key.label == "d1, joint" and list(seeds) == [0, 1, 2]
    found = report.aggregate(seeds)["accuracy"]
    assert found.mean == pytest.approx(0.6) and found.n == 3
    assert found.half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert (found.low, found.high) == pytest.approx((0.5, 0.7))  # 1 in 27 draws has one seed alone: more than 2.5%
    assert report.aggregate(seeds)["nfe"] == report.Statistic(3.0, 3.0, 3.0, 0.0, 3)


def test_statistic_leaves_out_what_is_not_defined():
    found = report.statistic([0.2, math.nan, 0.4, -math.inf])
    assert found.n == 2 and found.mean == pytest.approx(0.3) and found.half == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert report.statistic([math.nan]).n == 0 and math.isnan(report.statistic([]).mean)
    assert report.statistic([0.5]).mean == 0.5 and math.isnan(report.statistic([0.5]).half)


def test_paired_differences_are_of_the_same_seed():
    ours = {0: line(cell(0, "diffpo"), 0.6), 1: line(cell(1, "diffpo"), 0.9), 5: line(cell(5, "diffpo"), 0.0)}
    theirs = {1: line(cell(1), 0.7), 0: line(cell(0), 0.5), 7: line(cell(7), 1.0)}
    found = report.paired(ours, theirs)["accuracy"]
    assert found.n == 2 and found.mean == pytest.approx(0.15)  # 0.1 and 0.2
    assert (found.low, found.high) == pytest.approx((0.1, 0.2))


def test_progress_at_the_same_numbers_of_calls():
    calls, accuracy = report.progress_on_grid([[[1, 0, 0.0, 1], [2, 100, 1.0, 1]], [[1, 50, 0.2, 1], [3, 250, 0.6, 1]]], points=3)
    np.testing.assert_allclose(calls, [50, 75, 100])  # from where both have begun to where one ends
    np.testing.assert_allclose(accuracy, [[0.5, 0.75, 1.0], [0.2, 0.25, 0.3]])


# --- the report ---


def test_report(tmp_path, capsys):
    cells = [cell(seed, name, mode) for name in ("d1", "diffpo") for mode in ("fixed", "joint") for seed in (0, 1, 2)]
    cells += [cell(seed, "", "sampler") for seed in (0, 1, 2)]
    lines = [line(each, 0.5 + 0.1 * each.seed + 0.05 * (each.algorithm == "diffpo") * (1 + each.seed % 2)) for each in cells]
    lines[0]["comparison"]["nfe_saving_at_base_accuracy"] = "NaN"
    write_lines(tmp_path / "main.jsonl", *lines)
    experiments.main([f"--out={tmp_path}", "--report"])
    assert capsys.readouterr().out == f"report: {tmp_path}/main.md\n"
    text = (tmp_path / "main.md").read_text()
    assert "Base model: best accuracy 60.0%, at NFE 3.00" in text and "Failed" not in text
    rows = [[each.strip() for each in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]
    first = [next(row for row in rows if row[0] == name) for name in ("d1, fixed", "d1, joint", "diffpo, joint", "sampler")]
    assert first[0][1:3] == ["3", "60.0 [50.0, 70.0] ± 24.8"]
    assert first[0][7:] == ["60.0 [60.0, 60.0] ± 0.0", "3.00 [3.00, 3.00] ± 0.00", ""]
    assert first[0][5] == "25.0 [25.0, 25.0] ± 0.0 (2 of 3)"
    assert first[1][9] == first[3][9] == "+0.0 [-10.0, +10.0] ± 24.8"  # against 60% at 3 calls of its own curve
    same, fixed = text.split("Differences to d1")[1:]
    assert same.startswith(" in the same mode") and "| diffpo, joint | 3 | +6.7 [+5.0, +10.0] ± 7.2 |" in same and "| d1" not in same
    assert fixed.startswith(", fixed") and "| d1, joint | 3 | +0.0" in fixed and "| sampler | 3 | +0.0" in fixed
    for name in ("front", "calls", "ess"):
        picture = (tmp_path / f"main-math-{name}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) < 60_000 and f"(main-math-{name}.png)" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite=large"], "error: unknown suite: large; known: main, tune, caps, thresholds, stabilisers, debug"),
        (["--report"], "error: there are no results in none/main.jsonl: run the suite first"),
        (["--processes=0"], "error: --processes=0: at least 1"),
    ],
)
def test_what_is_wrong_is_said(flags, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        experiments.main([*flags, "--out=none"])
    assert capsys.readouterr().err == f"{message}\n"
    assert not Path("none").exists()


@pytest.mark.slow
def test_a_suite_from_its_runs_to_its_report(tmp_path):
    line_ = [sys.executable, "-m", "diffpo_jax.experiments", "--suite=debug", f"--out={tmp_path}", "--processes=2"]

    def run():
        done = subprocess.run(line_, cwd=runs.ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run()
    assert "4 cells, 0 of them done" in printed and "failed" not in printed and f"report: {tmp_path}/debug.md" in printed
    text = (tmp_path / "debug.jsonl").read_text()
    lines = [json.loads(each) for each in text.splitlines()]
    assert [each["status"] for each in lines] == ["done"] * 4 and max(map(len, text.splitlines())) < 4000
    for each in lines:
        assert [len(each[part]["curve"]) for part in ("base", "trained")] == [3, 3] and each["max_nfe"] == 8
        assert [entry[0] for entry in each["progress"]] == [3, 6] and each["progress"][-1][1] == each["cost"]["denoiser_calls"]
        assert each["training"].keys() == set(results.TRAINING) and sum(each["ess"]) == 6  # steps
    joint = next(each for each in lines if each["cell"]["mode"] == "joint" and each["cell"]["seed"] == 1)
    assert joint["trained"]["operating_point"]["threshold_std"] > 0

    printed = run()
    assert printed == f"4 cells, 4 of them done\nreport: {tmp_path}/debug.md\n"
    assert (tmp_path / "debug.jsonl").read_text() == text

    # The command alone, elsewhere, without what the cell took over from its base model
    command = shlex.split(joint["command"])
    workdir = Path(command[-1].removeprefix("--workdir="))
    runs.finish(subprocess.Popen(
        [sys.executable, *command[1:-1], f"--workdir={tmp_path}/again"],
        cwd=runs.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ))  # fmt: skip
    for name in ("base", "trained"):
        first, again = (load_curve(folder / f"{name}.npz")[0] for folder in (workdir, tmp_path / "again"))
        assert first.keys() == again.keys()
        for gamma in first:
            np.testing.assert_array_equal(first[gamma].correct, again[gamma].correct)
            np.testing.assert_array_equal(first[gamma].nfe, again[gamma].nfe)
    assert runs.untimed(workdir) == runs.untimed(tmp_path / "again")
