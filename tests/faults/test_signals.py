"""A run that is asked to stop, meets a second one, or computes what is not finite."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tests import runs
from tests.faults.conftest import FLAGS

pytestmark = pytest.mark.slow


def stop_in_a_save(process, folder) -> str:
    """Freezes the process while it saves into `folder`; returns the step that is being saved."""
    began, deadline = time.time(), time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        for path in folder.glob("*orbax-checkpoint-tmp"):
            try:
                if path.stat().st_ctime < began:  # a remnant
                    continue
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(0.02)
                if path.exists():
                    return path.name.split(".")[0]
                os.kill(process.pid, signal.SIGCONT)
            except FileNotFoundError:  # it was renamed in between
                continue
        time.sleep(0.0005)
    process.kill()
    raise AssertionError(f"no save was seen: {process.communicate()}")


def test_signals_during_saves_and_twice(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    for folder in ("sft", "checkpoints"):
        process = runs.start(workdir, *FLAGS)
        step = stop_in_a_save(process, workdir / folder)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert "stopped; the same command goes on from here" in runs.finish(process, code=0)
        assert runs.steps(workdir / folder)[-1] >= int(step)  # the save was completed
        assert not (workdir / "summary.json").exists()

    process = runs.start(workdir, *FLAGS)
    seen = runs.stop_at(process, workdir, "rl", runs.steps(workdir / "checkpoints")[-1] + 3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert runs.finish(process, code=0).count("stopped; the same command") == 1
    assert runs.steps(workdir / "checkpoints")[-1] >= seen

    process = runs.start(workdir, *FLAGS)
    stop_in_a_save(process, workdir / "checkpoints")
    process.send_signal(signal.SIGINT)  # Ctrl-C
    process.send_signal(signal.SIGCONT)
    error = runs.finish(process, code=-signal.SIGINT)
    assert error.strip().endswith("interrupted; the same command goes on from the last checkpoint") and "Traceback" not in error, error
    assert "Ctrl-C: saves after the step under way and ends" in error

    process = runs.start(workdir, *FLAGS)
    runs.stop_at(process, workdir, "rl", runs.steps(workdir / "checkpoints")[-1] + 1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # at once, though it may have saved by then
    assert "Traceback" not in runs.finish(process, code=-signal.SIGINT)

    runs.finish(runs.start(workdir, *FLAGS))
    runs.assert_same_outcome(workdir, undisturbed)


def test_a_second_process_leaves_the_first_alone(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    first = runs.start(workdir, *FLAGS)
    runs.stop_at(first, workdir, "sft", 5)
    first.send_signal(signal.SIGCONT)
    refused = 0
    while first.poll() is None:
        second = runs.start(workdir, *FLAGS)
        out, error = second.communicate(timeout=200)
        if first.poll() is None:
            assert second.returncode == 2 and f"{workdir} is in use by process {first.pid}: wait for it" in error
            refused += 1
    runs.finish(first)
    assert refused >= 1
    runs.assert_same_outcome(workdir, undisturbed)


def start_with_nan(workdir, steps, *flags: str) -> subprocess.Popen:
    """A run whose advantages are NaN at the given updates of the process."""
    code = f"""
        import itertools, runpy, importlib
        import jax.numpy as jnp

        train, bad, count = importlib.import_module("diffpo_jax.train"), set({sorted(steps)}), itertools.count(1)
        make_credit = train.make_credit

        def make(parts):
            credit = make_credit(parts)

            def spoilt(*args):
                group, metrics = credit(*args)
                return (group.replace(advantages=group.advantages * jnp.nan) if next(count) in bad else group), metrics

            return spoilt

        train.make_credit = make
        runpy.run_module("diffpo_jax.main", run_name="__main__", alter_sys=True)
    """
    line = [sys.executable, "-c", textwrap.dedent(code), "--config=configs/sudoku.py:debug", f"--workdir={workdir}", *FLAGS, *flags]
    return subprocess.Popen(line, cwd=runs.ROOT, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_nan_is_skipped_and_counted_and_too_many_in_a_row_stop_the_run(undisturbed, tmp_path):
    workdir = tmp_path / "skipped"
    runs.finish(start_with_nan(workdir, {3, 4, 9}))
    assert [line["bad_updates"] for line in runs.metrics(workdir, "rl")] == [0, 0, 1, 2, 2, 2, 2, 2, *[3] * 8]
    step, arrays = runs.saved(workdir / "checkpoints")
    assert step == 16 and all(np.isfinite(array).all() for array in arrays.values())

    workdir = tmp_path / "stopped"
    error = runs.finish(start_with_nan(workdir, range(9, 99), "--config.rl.max_bad_updates=3"), code=1)
    told = f"error: 3 updates in a row had a non-finite loss or gradient and were skipped; the last good checkpoint is step 8 in {workdir}"
    assert told in error and "Traceback" not in error
    assert runs.steps(workdir / "checkpoints")[-1] == 8
    runs.finish(start_with_nan(workdir, (), "--config.rl.max_bad_updates=3"))  # without the cause it goes on
    runs.assert_same_outcome(workdir, undisturbed)
