"""The command line, as processes: what is wrong is said in a line or two, and the modes print what they are for."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from configs import default
from tests import runs

# Each command in a process of its own, forked from one that has imported the packages.
FORKS = """
    import contextlib, json, os, runpy, sys, tempfile, traceback, warnings
    import diffpo_jax

    warnings.simplefilter("ignore")
    outcomes = []
    for line in json.loads(sys.argv[1]):
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if not child:
                os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
                sys.argv, code = ["main.py", *line], 0
                try:
                    runpy.run_module("diffpo_jax.main", run_name="__main__", alter_sys=True)
                except SystemExit as exit:
                    if isinstance(exit.code, str):
                        print(exit.code, file=sys.stderr)
                    code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
                except BaseException:
                    traceback.print_exc()
                    code = 1
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0), err.seek(0)
            outcomes.append([code, out.read(), err.read()])
    print("OUTCOMES" + json.dumps(outcomes))
"""
SUDOKU = "--config=configs/sudoku.py:debug"
WRONG = {  # name -> (arguments, what standard error must say)
    "no configuration": ([], "--config must have a value"),
    "no such file": (["--config=configs/nosuch.py"], "No such file or directory: 'configs/nosuch.py'"),
    "no such file, with a field": (["--config=configs/nosuch.py", "--config.rl.steps=3"], "No such file or directory: 'configs/nosuch.py'"),
    "preset": (["--config=configs/sudoku.py:huge"], "configs/sudoku.py has no preset 'huge'; known: tiny, small, suite, debug"),
    "choice": ([SUDOKU, "--config.rl.mode=both"], "rl.mode = 'both' is unknown; known: joint, model, sampler"),
    "task": ([SUDOKU, "--config.task.name=chess"], "task.name = 'chess' is unknown; known: "),
    "field": (
        [SUDOKU, "--config.rl.stepz=3"],
        f"there is no field config.rl.stepz; where 'stepz' stands are known: {', '.join(default.get_config().rl)}",
    ),
    "section": (
        [SUDOKU, "--config.rll.steps=3"],
        f"there is no field config.rll.steps; where 'rll' stands are known: {', '.join(default.get_config())}",
    ),
    "below a field": ([SUDOKU, "--config.rl.steps.more=3"], "there is no field config.rl.steps.more"),
    "type": ([SUDOKU, "--config.rl.steps=many"], "flag --config.rl.steps=many: invalid literal for int()"),
    "algorithm": ([SUDOKU, "--config.algorithm=ppo"], "algorithm = 'ppo' is unknown; known: d1, d1_is, mf2, diffpo, "),
    "mode": ([SUDOKU, "--mode=play"], "flag --mode=play: value should be one of <train|sft|eval|sample|export>"),
    "flag": ([SUDOKU, "--workdirr=x"], "Unknown command line flag 'workdirr'"),
    "argument": ([SUDOKU, "more"], "unknown arguments: more"),
    "several fields": (
        [SUDOKU, "--config.rl.group_size=0", "--config.sft.steps=0", "--config.rl.advantage=none"],
        "the configuration cannot run:\n  rl.advantage = 'none' is unknown; known: grpo, mean_only, rloo, wd1\n"
        "  sft.steps = 0 must be at least 1\n  rl.group_size = 0 must be at least 1\n",
    ),
    "base model": ([SUDOKU, "--config.sft.checkpoint=/nonexistent/sft"], "no checkpoint folder /nonexistent/sft: check the path"),
    "lengths": ([SUDOKU, "--config.task.prompt_length=3"], "task.prompt_length is 3; raise it"),
    "devices": ([SUDOKU, "--config.mesh.data=99"], "mesh.data = 99, mesh.fsdp = 1, mesh.tensor = 1 makes 99 devices, but there are"),
    "nothing to evaluate": ([SUDOKU, "--mode=eval"], "no checkpoint folder "),
    "nothing to sample": ([SUDOKU, "--mode=sample"], "no checkpoint folder "),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{name: (exit code, standard output, standard error, workdir)} of the commands in WRONG."""
    workdirs = {name: tmp_path_factory.mktemp("main") / "run" for name in WRONG}
    lines = [[f"--workdir={workdirs[name]}", *arguments] for name, (arguments, _) in WRONG.items()]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKS), json.dumps(lines)],
        cwd=runs.ROOT, env=os.environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("OUTCOMES")[2])
    return {name: (*outcome, workdirs[name]) for name, outcome in zip(WRONG, found, strict=True)}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_without_a_traceback(outcomes, name):
    code, _, err, workdir = outcomes[name]
    assert code == 1
    assert WRONG[name][1] in err
    assert "Traceback" not in err and '.py", line' not in err
    if name not in ("base model", "lengths", "devices", "nothing to evaluate", "nothing to sample"):
        assert not workdir.exists()  # found out before anything was made
    assert not (workdir / "metrics.jsonl").exists() or not runs.metrics(workdir)


@pytest.mark.slow
def test_the_modes_one_after_the_other_and_a_wish_for_the_traceback(tmp_path):
    workdir = tmp_path / "run"
    printed = runs.finish(runs.start(workdir, "--mode=sft", "--config.algorithm=d1", "--config.rl.kl_weight=0.1", task="countdown"))
    assert "algorithm d1:\n  likelihood.estimator = 'cuts'\n" in printed and "  likelihood.prompt_masking = 0.15\n" in printed
    assert "base model 40/40" in printed and "base, γ = 0.1" in printed and "trained" not in printed
    assert runs.steps(workdir / "sft") == [40] and not (workdir / "checkpoints").exists() and not (workdir / "summary.json").exists()

    err = runs.finish(runs.start(workdir, task="countdown"), code=1)  # what an algorithm sets is part of a run's configuration
    assert "algorithm: " in err and "likelihood.prompt_masking: 0.15 -> 0.0" in err and "rl.kl_weight: 0.1 -> 0.005" in err
    shutil.rmtree(workdir)

    printed = runs.finish(runs.start(workdir, "--mode=sft", task="countdown"))
    printed = runs.finish(runs.start(workdir, task="countdown"))
    assert "base model 40/40" not in printed and "rl 6/6" in printed and "trained, learned γ" in printed

    printed = runs.finish(runs.start(workdir, "--mode=eval", "--config.eval.thresholds=(0.3, 3.0)", task="countdown"))
    assert "evaluation of step 6 2/2" in printed and "trained, learned γ" in printed
    assert [entry["gamma"] for entry in json.loads((workdir / "evaluation-6.json").read_text())["trained"]["curve"]] == [0.3, 3.0]

    printed = runs.finish(runs.start(workdir, "--mode=sample", "--config.eval.num_samples=2", task="countdown"))
    calls = [int(number) for number in re.findall(r"^call +(\d+)  .*\[.\]", printed, re.M)]
    nfe = [int(number) for number in re.findall(r"reward \d\.\d\d, NFE (\d+), learned threshold ", printed)]
    assert len(nfe) == 2 and calls == [number for n in nfe for number in range(1, n + 1)]

    process = runs.start(workdir, "--config.rl.steps=7", "--config.rl.learning_rate=0.5", task="countdown")
    err = runs.finish(process, code=1)
    assert "rl.steps: 6 -> 7" in err and "rl.learning_rate: 0.0001 -> 0.5" in err and "Traceback" not in err
    os.environ["DIFFPO_TRACEBACK"] = "1"
    try:
        assert "Traceback" in runs.finish(runs.start(workdir, "--config.rl.steps=7", task="countdown"), code=1)
    finally:
        del os.environ["DIFFPO_TRACEBACK"]


@pytest.mark.slow
def test_compiled_programs_are_kept_beside_the_workdir_unless_the_environment_says_where(tmp_path, monkeypatch):
    flags, chosen = ("--mode=sft", "--config.sft.steps=10", "--config.eval.thresholds=(8.0,)"), tmp_path / "chosen"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(chosen))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    runs.finish(runs.start(tmp_path / "runs" / "a", *flags))
    cache = tmp_path / "runs" / ".jax_cache"
    programs = {path.name.partition("-")[0] for path in chosen.glob("jit_*-cache")}
    assert "jit_update" in programs and not cache.exists()

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    runs.finish(runs.start(tmp_path / "runs" / "b", *flags))
    assert {path.name.partition("-")[0] for path in cache.glob("jit_*-cache")} == programs  # small ones too
    written = {path: path.stat().st_mtime_ns for path in cache.glob("jit_*-cache")}
    runs.finish(runs.start(tmp_path / "runs" / "c", *flags))
    assert {path: path.stat().st_mtime_ns for path in cache.glob("jit_*-cache")} == written
