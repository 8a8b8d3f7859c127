"""Whole runs of the debug preset: what they leave behind, what they refuse, what they compile, and the other modes."""

import collections
import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import diffpo_jax as dp
from configs import sudoku
from diffpo_jax import build, checkpoint
from diffpo_jax.evaluate import load_curve
from diffpo_jax.metrics import Writer
from diffpo_jax.models.threshold_head import ThresholdHead
from tests import runs
from tests.integration.conftest import Compilations, train_module

POINT = {"accuracy", "interval", "nfe", "tokens_per_call", "seconds"}
TABLE = ("trained, learned γ", "base, at the same NFE", "accuracy at the same NFE: ", "learned thresholds: mean ", "denoiser calls in tr")


def assert_complete(workdir, config):
    """The files of a finished run, and what stands in them."""
    assert json.loads((workdir / "config.json").read_text()) == checkpoint.to_json(config)
    lines = {phase: runs.metrics(workdir, phase) for phase in ("sft", "rl", "eval")}
    assert [line["step"] for line in lines["sft"]] == list(range(config.sft.log_every, config.sft.steps + 1, config.sft.log_every))
    assert [line["step"] for line in lines["rl"]] == list(range(1, config.rl.steps + 1))
    assert [line["step"] for line in lines["eval"]] == list(range(config.rl.eval_every, config.rl.steps, config.rl.eval_every))
    assert len(runs.metrics(workdir)) == sum(map(len, lines.values()))
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines["sft"])
    assert all({"accuracy", "nfe", "tokens_per_call", "threshold"} <= line.keys() for line in lines["eval"])
    for line in lines["rl"]:
        assert runs.RL_METRICS <= line.keys()
        assert all(np.isfinite(line[name]) for name in runs.RL_METRICS)
        assert 0 < line["weight/mean"] <= line["weight/max"] <= config.rl.importance_cap
        assert 0 <= line["weight/truncated"] < 1 and 0 < line["weight/ess"] <= 1 and 0 <= line["clip_share"] <= 1
        assert line["surrogate/gap"] > 0 and line["kl"] >= 0 and line["entropy"] > 0 and line["bad_updates"] == 0
    # The policy moves away from the reference where rewards differ (the first update has rate 0; the last one is not seen any more)
    assert lines["rl"][-1]["kl"] > 0 or not any(line["groups_with_signal"] > 0 for line in lines["rl"][1:-1])

    # Calls: the rollout's NFE, and m for each of the reference's pass and the update's, a row each
    rows, passes = config.rl.prompts * config.rl.group_size, 2 * config.likelihood.num_latents
    calls = np.cumsum([round(line["nfe"] * rows) + rows * passes for line in lines["rl"]])
    assert [line["denoiser_calls"] for line in lines["rl"]] == calls.tolist()

    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() == {"task", "seed", "base", "trained", "comparison", "denoiser_calls", "seconds"}
    assert (summary["task"], summary["seed"], summary["denoiser_calls"]) == (config.task.name, config.seed, calls[-1])
    for part in ("base", "trained"):
        assert [entry["gamma"] for entry in summary[part]["curve"]] == sorted(config.eval.thresholds)
        assert all(entry.keys() == POINT | {"gamma"} for entry in summary[part]["curve"])
    operating = summary["trained"]["operating_point"]
    assert operating.keys() == POINT | {"thresholds"}
    assert sum(operating["thresholds"]["histogram"]["counts"]) == config.task.test_size
    assert {"gain", "gain_interval", "nfe_saving_at_same_accuracy"} <= summary["comparison"].keys()
    assert summary["seconds"].keys() == {"base model", "base evaluation", "rl", "evaluation"}

    assert runs.steps(workdir / "sft") == [config.sft.steps - config.sft.checkpoint_every, config.sft.steps]
    assert runs.steps(workdir / "checkpoints") == [config.rl.steps - config.rl.checkpoint_every, config.rl.steps]
    assert (workdir / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "report.html").read_text().startswith("<!doctype html>")
    assert {path.parent.name for path in workdir.glob("tensorboard/*/events.out.tfevents.*")} == {"sft", "rl", "eval"}
    for name in ("base", "trained"):
        assert list(load_curve(str(workdir / f"{name}.npz"))[0]) == sorted(config.eval.thresholds)
    [learned] = load_curve(str(workdir / "learned.npz"))[0].values()
    assert learned.threshold.shape == (config.task.test_size,) and learned.nfe.mean() == pytest.approx(operating["nfe"])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sudoku", "countdown", "math"])
def test_a_run_from_the_command_line_and_the_same_command_again(task, tmp_path):
    workdir = tmp_path / "run"
    printed = runs.finish(runs.start(workdir, task=task))
    for text in (*TABLE, "base model 40/40", "rl 6/6", "evaluation of the base model 3/3", "evaluation of the trained model 3/3"):
        assert text in printed
    assert_complete(workdir, importlib.import_module(f"configs.{task}").get_config("debug"))

    before = runs.contents(workdir)
    again = runs.finish(runs.start(workdir, task=task))
    assert all(text in again for text in TABLE)
    assert not re.search(r"\d+/\d+  ", again)  # no phase made progress: none ran
    after = runs.contents(workdir)
    rewritten = ("tensorboard", "summary.json", "learned.npz", "pareto.png", "report.html", "metrics.jsonl")
    expected = {name for name in before if not name.startswith(rewritten)}
    assert {name: after[name] for name in expected} == {name: before[name] for name in expected}  # not even written again
    assert after["metrics.jsonl"][1] == before["metrics.jsonl"][1]
    first, second = (json.loads(files["summary.json"][1]) for files in (before, after))
    first["trained"]["operating_point"].pop("seconds"), second["trained"]["operating_point"].pop("seconds")
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_a_finished_run(finished):
    workdir, config, summary, _ = finished
    assert_complete(workdir, config)
    assert json.loads((workdir / "summary.json").read_text()) == checkpoint.to_json(summary)


def test_a_finished_run_is_not_run_again(finished, monkeypatch, capsys):
    workdir, config, summary, _ = finished

    def fail(*_, **__):
        raise AssertionError("a finished phase is running")

    monkeypatch.setattr(train_module.sft, "make_sft_update", lambda *_: fail)
    monkeypatch.setattr(train_module, "make_update", lambda *_: fail)
    monkeypatch.setattr(train_module, "make_rollout", lambda *_: fail)
    monkeypatch.setattr(train_module, "evaluate_curve", fail)
    again = dp.train(config, str(workdir))
    assert again["comparison"] == summary["comparison"] and again["denoiser_calls"] == summary["denoiser_calls"]
    printed = capsys.readouterr().out
    assert all(text in printed for text in TABLE)


def test_another_configuration_is_refused_and_nothing_is_changed(finished):
    workdir, config, _, _ = finished
    before = runs.contents(workdir)
    other = config.copy_and_resolve_references()
    other.rl.learning_rate, other.sudoku.clues_max = 0.5, 5
    for mode in (dp.train, dp.train_sft, dp.evaluate, dp.sample, dp.serve):
        with pytest.raises(ValueError) as error:
            mode(other, str(workdir))
        lines = str(error.value).splitlines()
        assert str(workdir) in lines[0]
        assert lines[1:-1] == [
            f"  rl.learning_rate: {config.rl.learning_rate} -> 0.5",
            f"  sudoku.clues_max: {config.sudoku.clues_max} -> 5",
        ]
    assert runs.contents(workdir) == before


def test_a_workdir_in_use_is_refused(finished):
    workdir, config, _, _ = finished
    before = runs.contents(workdir)
    with checkpoint.lock_workdir(workdir), pytest.raises(RuntimeError, match=rf"{workdir} is in use by process \d+"):
        dp.train(config, str(workdir))
    assert runs.contents(workdir) == before


def test_a_configuration_that_failed_at_its_start_can_be_corrected(finished, tmp_path, monkeypatch):
    workdir, config, _, _ = finished
    wrong = config.copy_and_resolve_references()
    wrong.sft.checkpoint = str(tmp_path / "typo")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder .*/typo"):
        dp.train_sft(wrong, str(tmp_path / "run"))
    wrong.sft.checkpoint = str(workdir / "sft")
    monkeypatch.setattr(train_module.sft, "make_sft_update", None)  # a base model that is given is not trained
    dp.train_sft(wrong, str(tmp_path / "run"))
    given, own = (load_curve(str(folder / "base.npz"))[0] for folder in (tmp_path / "run", workdir))
    for gamma in own:
        np.testing.assert_array_equal(given[gamma].nfe, own[gamma].nfe)
    wrong.sft.checkpoint = ""
    with pytest.raises(ValueError, match="sft.checkpoint: .*/sft -> "):  # from here on it is that configuration's
        dp.train_sft(wrong, str(tmp_path / "run"))


def test_sigterm_during_an_evaluation_ends_it_after_the_threshold_under_way(finished, tmp_path):
    workdir, config, _, _ = finished
    parts, evaluated = build.build(config, str(workdir)), []

    def evaluate(params, threshold):
        evaluated.append(threshold)
        return load_curve(str(workdir / "base.npz"))[0][threshold]

    with pytest.raises(SystemExit) as stop:
        train_module.cached_curve(parts, str(tmp_path), "base", evaluate, None, lambda: len(evaluated) == 2)
    assert stop.value.code == 0 and evaluated == [0.1, 1.0]
    assert list(tmp_path.iterdir()) == []  # half a curve is none
    train_module.cached_curve(parts, str(tmp_path), "base", evaluate, None, lambda: False)
    assert list(load_curve(str(tmp_path / "base.npz"))[0]) == [0.1, 1.0, 8.0]


def test_a_run_that_is_loaded_is_the_one_that_was_evaluated(finished):
    workdir, config, _, _ = finished
    run = dp.load(config, str(workdir))
    evaluate = train_module.make_evaluate(run.parts, config.eval.limit)
    for params, chosen, name in [
        (run.base, {"threshold": 1.0}, "base"),
        (run.params, {"threshold": 1.0}, "trained"),
        (run.params, {"threshold_params": run.threshold_params}, "learned"),
    ]:
        curve = load_curve(str(workdir / f"{name}.npz"))[0]
        stored, again = curve.get(1.0) or next(iter(curve.values())), evaluate(params, **chosen)
        np.testing.assert_array_equal(again.nfe, stored.nfe)
        np.testing.assert_array_equal(again.threshold, stored.threshold)
    assert run.step == config.rl.steps


def test_an_evaluation_of_the_problems_after_those_left_out(finished, monkeypatch):
    workdir, config, _, _ = finished
    config = config.copy_and_resolve_references()
    parts = build.build(config, str(workdir))
    params, graded = parts.policy.init(jax.random.key(0)), []

    def noted(parts, split, indices, tokens):
        graded.append(np.asarray(indices))
        return build.grade(parts, split, indices, tokens)

    monkeypatch.setattr(importlib.import_module("diffpo_jax.evaluate"), "grade", noted)
    whole = train_module.make_evaluate(parts)(params, threshold=1.0)
    config.eval.skip = 20
    some = train_module.make_evaluate(parts, 8)(params, threshold=1.0)
    np.testing.assert_array_equal(some.nfe, whole.nfe[20:28])
    assert graded[0].tolist() == list(range(32)) and graded[1][:8].tolist() == list(range(20, 28))  # against their own answers
    config.eval.skip = 32
    with pytest.raises(ValueError, match="eval.skip = 32 leaves none of the 32 test problems"):
        train_module.make_evaluate(parts)


def test_a_curve_is_kept_for_the_settings_it_depends_on(finished, tmp_path):
    workdir, config, _, _ = finished
    evaluated = []

    def evaluate(params, threshold):
        evaluated.append(threshold)
        return load_curve(str(workdir / "base.npz"))[0][threshold]

    for fields, count in (({}, 3), ({"sampler.lanes": 8, "sampler.temperature": 0.5}, 3), ({"sampler.rule": "low_confidence"}, 4)):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(fields)
        changed.sampler.threshold = config.eval.thresholds[0]  # which that rule's only point goes by
        parts = build.build(changed, str(workdir))
        train_module.cached_curve(parts, str(tmp_path), "base", evaluate, None, lambda: False)
        assert len(evaluated) == count


# --- compilation ---


def test_nothing_is_traced_or_compiled_after_the_first_iteration(finished):
    _, config, _, compilations = finished
    first = compilations.after("sft", config.sft.steps)  # until the first RL line: evaluation, rollout, update
    compiled = collections.Counter(name for kind, name in first if kind == "compile")
    assert compiled["jit(_denoise)"] == 2  # for the thresholds of the curve, and for the rollouts; lines are written a step late
    assert [compiled[f"jit({name})"] for name in ("score", "assign", "update")] == [1, 1, 1]
    for step in range(1, config.rl.steps):
        events = compilations.after("rl", step)
        if step == config.rl.eval_every:  # the sampler at the thresholds' modes, once
            assert [name for kind, name in events if kind == "compile"] == ["jit(_denoise)"]
            events = compilations.after("eval", step)
        assert events == [], f"after iteration {step}"


def test_a_retrace_would_be_noticed(finished, monkeypatch, tmp_path):
    """A weak type in the initial state, which the first update makes strong, costs a second compilation of two programs."""
    workdir, config, _, _ = finished
    init = ThresholdHead.init
    monkeypatch.setattr(ThresholdHead, "init", lambda head, *args: init(head, *args) | {"log_std": jnp.log(jnp.full((), head.std_init))})
    config = config.copy_and_resolve_references()
    config.rl.steps, config.rl.eval_every, config.rl.checkpoint_every = 3, 3, 1  # so that a step is waited for before the next begins
    with Compilations() as compilations:
        run_rl(config, workdir, tmp_path)
    assert {name for kind, name in compilations.after("rl", 1) if kind == "trace"} >= {"_denoise", "update"}
    assert compilations.after("rl", 2) == []


def run_rl(config, finished_workdir, workdir):
    """RL from the base model of a finished run, without its evaluations."""
    parts = build.build(config, str(finished_workdir))  # the data set is there
    given = config.copy_and_resolve_references()
    given.sft.checkpoint = str(finished_workdir / "sft")
    writer = Writer(workdir)
    base = train_module.train_base(build.build(given, str(finished_workdir)), str(workdir), writer, lambda: False)
    try:
        return train_module.train_rl(parts, str(workdir), base, writer, lambda: False)
    finally:
        writer.close()


# --- what the loop waits for ---


def test_a_line_is_written_while_the_next_rollout_is_under_way_and_before_a_checkpoint(finished, monkeypatch, tmp_path):
    workdir, config, _, _ = finished
    config, events = config.copy_and_resolve_references(), []
    config.rl.steps, config.rl.eval_every, config.rl.checkpoint_every = 5, 4, 3

    def noted(name, function):
        return lambda *args, **options: (events.append(name(*args)), function(*args, **options))[1]

    make_rollout = train_module.make_rollout
    monkeypatch.setattr(train_module, "make_rollout", lambda parts: noted(lambda *_: "rollout", make_rollout(parts)))
    monkeypatch.setattr(Writer, "write", noted(lambda _, phase, step, __: f"{phase} {step}", Writer.write))
    monkeypatch.setattr(checkpoint, "save", noted(lambda _, step, *__: f"save {step}", checkpoint.save))
    run_rl(config, workdir, tmp_path)
    assert events == [
        "rollout", "rollout", "rl 1", "rollout", "rl 2", "rl 3", "save 3", "rollout", "rl 4", "eval 4", "rollout", "rl 5", "save 5",
    ]  # fmt: skip


def test_rl_ends_with_the_iteration_that_spends_the_calls_and_is_then_over(finished, tmp_path):
    workdir, config, _, _ = finished
    spent = [line["denoiser_calls"] for line in runs.metrics(workdir, "rl")]
    config = config.copy_and_resolve_references()
    config.rl.calls = spent[3] - 1
    run_rl(config, workdir, tmp_path)
    assert [line["denoiser_calls"] for line in runs.metrics(tmp_path, "rl")] == spent[:4]
    assert [line["step"] for line in runs.metrics(tmp_path, "eval")] == [3] and runs.steps(tmp_path / "checkpoints")[-1] == 4
    run_rl(config, workdir, tmp_path)
    assert len(runs.metrics(tmp_path, "rl")) == 4


def test_lines_do_not_depend_on_what_the_loop_waits_for(finished, tmp_path):
    workdir, config, _, _ = finished
    config = config.copy_and_resolve_references()
    config.rl.checkpoint_every = 1
    run_rl(config, workdir, tmp_path)
    assert runs.untimed(tmp_path) == [line for line in runs.untimed(workdir) if '"sft"' not in line]
    assert all(line["time/rollout"] > 0 and line["time/update"] > 0 for line in runs.metrics(workdir, "rl"))


# --- updates that are not finite ---


def spoil(monkeypatch, bad_steps):
    """Makes the advantages of these iterations NaN, counted from the start."""
    make_credit = train_module.make_credit

    def make(parts):
        credit, step = make_credit(parts), itertools.count(1)

        def spoilt(*args):
            group, metrics = credit(*args)
            if next(step) in bad_steps:
                group = group.replace(advantages=group.advantages * jnp.nan)
            return group, metrics

        return spoilt

    monkeypatch.setattr(train_module, "make_credit", make)


@pytest.mark.parametrize("every, first", [(2, 3), (3, 4)])  # found where a checkpoint is due, and once the next rollout is under way
def test_updates_that_are_not_finite_are_skipped_counted_and_stop_the_run(finished, monkeypatch, tmp_path, every, first):
    workdir, config, _, _ = finished
    config = config.copy_and_resolve_references()
    config.rl.max_bad_updates, config.rl.checkpoint_every = 2, every
    with monkeypatch.context() as patch:
        spoil(patch, set(range(first, 7)))
        with pytest.raises(train_module.NonFiniteError, match=rf"2 updates in a row .* checkpoint is step {every} in .*/checkpoints"):
            run_rl(config, workdir, tmp_path)
    assert [line["bad_updates"] for line in runs.metrics(tmp_path, "rl")] == [0] * (first - 1) + [1, 2]
    assert runs.steps(tmp_path / "checkpoints") == [every]
    _, arrays = runs.saved(tmp_path / "checkpoints")
    assert all(np.isfinite(array).all() for array in arrays.values())

    state, _ = run_rl(config, workdir, tmp_path)  # without the cause it goes on, and ends as if nothing had been
    _, clean = runs.saved(workdir / "checkpoints")
    _, resumed = runs.saved(tmp_path / "checkpoints")
    assert clean.keys() == resumed.keys()
    for path, array in clean.items():
        np.testing.assert_array_equal(resumed[path], array, err_msg=path)
    assert int(state.total_bad_updates) == 0


def test_a_single_update_that_is_not_finite_changes_nothing_but_the_count(finished, monkeypatch, tmp_path):
    workdir, config, _, _ = finished
    config = config.copy_and_resolve_references()
    config.rl.steps, config.rl.eval_every, config.rl.checkpoint_every, config.rl.max_bad_updates = 3, 9, 1, 2
    spoil(monkeypatch, {2})
    state, _ = run_rl(config, workdir, tmp_path)
    assert [line["bad_updates"] for line in runs.metrics(tmp_path, "rl")] == [0, 1, 1]
    assert runs.steps(tmp_path / "checkpoints") == [1, 3]  # what follows a skipped update is saved once an update was good again
    assert (int(state.step), int(state.bad_updates), int(state.total_bad_updates)) == (3, 0, 1)
    kl = [line["kl"] for line in runs.metrics(tmp_path, "rl")]
    assert kl[2] >= 0 and np.isfinite(kl).all()


@pytest.mark.slow
def test_a_model_of_nans_is_sampled_in_bounded_time():
    """With every rule; without the bound this would not end, hence a process."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        import diffpo_jax as dp
        from diffpo_jax.models.transformer import ModelConfig, Policy
        from diffpo_jax.sampling.unmasking import RULES

        sizes = dict(width=8, layers=1, heads=2, kv_heads=2, mlp_width=8, vocab_size=5, mask_id=4)
        policy = Policy(ModelConfig(**{**dict(qkv_bias=False, rope_theta=1e4, norm_eps=1e-5, dtype="float32", remat="none",
                                              tie_embeddings=False), **sizes}))
        params = jax.tree.map(lambda x: x * jnp.nan, policy.init(jax.random.key(0)))
        prompt = np.zeros((3, 2), np.int32)
        for rule in RULES:
            nfe = dp.denoise(policy, params, prompt, prompt == 0, jax.random.key(1), length=4, eos_id=1, rule=rule).nfe
            assert (nfe >= 1).all() and (nfe <= 4).all(), (rule, nfe)
        print(len(RULES), "rules")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=runs.ROOT, env=os.environ, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and "7 rules" in done.stdout, done.stderr


# --- other modes ---


def test_sample_shows_each_position_once(finished):
    workdir, config, _, _ = finished
    console = Console(file=io.StringIO(), width=200)
    records = dp.sample(config, str(workdir), console)
    blocks = console.file.getvalue().split("prompt  ")[1:]
    assert len(blocks) == config.eval.num_samples
    length = config.task.response_length
    for block, record in zip(blocks, records, strict=True):
        nfe, when = record["nfe"], np.array(record["steps"])
        calls = re.findall(r"^call +(\d+)  (.*)$", block, re.M)
        assert [int(number) for number, _ in calls] == list(range(1, nfe + 1))
        rows = [[text[3 * k : 3 * k + 3] for k in range(length)] for _, text in calls]
        assert all(len(text) <= 3 * length for _, text in calls)
        marked = np.array([[cell.startswith("[") and cell.endswith("]") for cell in row] for row in rows])
        np.testing.assert_array_equal(marked.sum(0), np.ones(length))  # every position, exactly once
        assert marked.any(1).all()  # no call without anything new
        np.testing.assert_array_equal(marked.argmax(0), when)
        final = [row[k][1] for k, row in zip(range(length), rows[-1:] * length, strict=True)]
        for row, now in zip(rows, np.arange(nfe), strict=True):
            assert [cell.ljust(3)[1] for cell in row] == [final[k] if when[k] <= now else "_" for k in range(length)]
        answer = re.search(r"^answer    (.*?)   (right|wrong)$", block, re.M)
        assert answer and "".join(final).split("·")[0] == answer[1]
        assert re.search(rf"reward \d\.\d\d, NFE {nfe}, learned threshold ", block)


def test_evaluate_writes_what_the_run_saw(finished):
    workdir, config, summary, _ = finished
    result = dp.evaluate(config, str(workdir))
    path = workdir / f"evaluation-{config.rl.steps}.json"
    assert json.loads(path.read_text()) == checkpoint.to_json(result)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert result["step"] == config.rl.steps and result["comparison"] == summary["comparison"]
    timeless = lambda entry: {name: value for name, value in entry.items() if name != "seconds"}  # noqa: E731
    assert list(map(timeless, result["trained"]["curve"])) == list(map(timeless, summary["trained"]["curve"]))

    finer = config.copy_and_resolve_references()
    finer.eval.thresholds = (0.5, 2.0)  # another grid is allowed on the same workdir
    result = dp.evaluate(finer, str(workdir))
    assert [entry["gamma"] for entry in result["trained"]["curve"]] == [0.5, 2.0]
    assert json.loads((workdir / "config.json").read_text()) == checkpoint.to_json(config)


def test_sft_stops_after_the_base_model(tmp_path, capsys):
    config = sudoku.get_config("debug")
    config.sft.steps, config.eval.thresholds = 10, (8.0,)
    summary = dp.train_sft(config, str(tmp_path))
    assert summary.keys() == {"task", "seed", "base"} and len(summary["base"]["curve"]) == 1
    assert "base, γ = 8" in capsys.readouterr().out
    assert runs.steps(tmp_path / "sft") == [10]
    assert {line["phase"] for line in runs.metrics(tmp_path)} == {"sft"}
    assert not any((tmp_path / name).exists() for name in ("checkpoints", "summary.json", "trained.npz"))
    for mode in (dp.evaluate, dp.sample, dp.serve):
        with pytest.raises(FileNotFoundError, match="no checkpoint folder .*/checkpoints"):
            mode(config, str(tmp_path))


def test_the_state_before_rl_has_the_types_that_an_update_returns(finished):
    workdir, config, _, _ = finished
    parts = build.build(config, str(workdir))
    state = train_module.init_train_state(parts, parts.policy.init(parts.key("policy")))
    assert [leaf.aval for leaf in jax.tree.leaves(state) if leaf.weak_type] == []
