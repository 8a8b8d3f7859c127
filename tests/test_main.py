"""The command line, as processes: the modes print what they are for. What is said of wrong inputs is in test_wrong_inputs.py."""

import json
import os
import re
import shutil

import pytest

from tests import runs


@pytest.mark.slow
def test_the_modes_one_after_the_other_and_a_wish_for_the_traceback(tmp_path):
    workdir = tmp_path / "run"
    printed = runs.finish(runs.start(workdir, "--mode=sft", "--config.algorithm=d1", "--config.rl.kl_weight=0.1", task="countdown"))
    assert "algorithm d1:\n  likelihood.estimator = 'cuts'\n" in printed and "  likelihood.prompt_masking = 0.15\n" in printed
    assert "base model 40/40" in printed and "base, γ = 0.1" in printed and "trained" not in printed
    assert runs.steps(workdir / "sft") == [20, 40] and not (workdir / "checkpoints").exists() and not (workdir / "summary.json").exists()

    err = runs.finish(runs.start(workdir, task="countdown"), code=2)  # what an algorithm sets is part of a run's configuration
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
    err = runs.finish(process, code=2)
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
