"""Runs that are killed, asked to stop, or cut short while saving: the same command ends as if nothing had happened, bit for bit."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tests import runs

pytestmark = pytest.mark.slow

# Many short steps between checkpoints, so that a signal always comes between two of them
FLAGS = (
    "--config.sft.steps=100", "--config.sft.checkpoint_every=50", "--config.sft.log_every=5",
    "--config.rl.steps=45", "--config.rl.checkpoint_every=20", "--config.rl.eval_every=15",
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    runs.finish(runs.start(workdir, *FLAGS))
    return workdir


def test_the_comparison_would_notice(uninterrupted, tmp_path):
    """Training moves every part that is compared, and one bit of the metrics or another seed is a difference."""
    runs.finish(runs.start(tmp_path / "other", *FLAGS, "--config.seed=1"))
    (_, ours), (_, theirs) = runs.saved(tmp_path / "other" / "checkpoints"), runs.saved(uninterrupted / "checkpoints")
    for part in ("params", "threshold_params", "opt_state", "threshold_opt_state"):
        assert any(ours[path].tobytes() != theirs[path].tobytes() for path in ours if path.split("/")[0] == part)
    with pytest.raises(AssertionError):
        runs.assert_same_outcome(tmp_path / "other", uninterrupted)


def test_killed_during_sft_and_during_rl(uninterrupted, tmp_path):
    workdir = tmp_path / "run"

    process = runs.start(workdir, *FLAGS)
    seen = runs.stop_at(process, workdir, "sft", 60)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 60 <= seen < 100 and runs.steps(workdir / "sft") == [50]  # what came after the checkpoint is lost

    process = runs.start(workdir, *FLAGS)
    seen = runs.stop_at(process, workdir, "rl", 22)
    second = runs.start(workdir, *FLAGS)  # meanwhile the workdir is in use, and says by whom
    assert f"{workdir} is in use by process {process.pid}" in runs.finish(second, code=2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 22 <= seen < 40 and runs.steps(workdir / "checkpoints") == [20]
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"phase": "rl", "st')  # a line that was cut short

    assert "rl 45/45" in runs.finish(runs.start(workdir, *FLAGS))
    runs.assert_same_outcome(workdir, uninterrupted)


def test_sigterm_saves_and_exits_with_0(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    for phase, step, folder in (("sft", 60, "sft"), ("rl", 22, "checkpoints")):
        process = runs.start(workdir, *FLAGS)
        seen = runs.stop_at(process, workdir, phase, step)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert "stopped; the same command goes on from here" in runs.finish(process, code=0)
        saved = runs.steps(workdir / folder)[-1]
        assert seen <= saved <= seen + 6  # the step under way; sft writes a line every 5
        assert phase == "sft" or runs.metrics(workdir, "rl")[-1]["step"] == saved
        assert not (workdir / "summary.json").exists()
    runs.finish(runs.start(workdir, *FLAGS))
    runs.assert_same_outcome(workdir, uninterrupted)


def test_a_checkpoint_that_was_being_written(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    killed_in_a_save = """
        import os, runpy, signal, sys
        import orbax.checkpoint as ocp

        finalize = ocp.JsonCheckpointHandler.finalize

        def killed(handler, directory):  # all has been written; the state has its name, the data's position has not
            if "/checkpoints/40" in str(directory):
                os.kill(os.getpid(), signal.SIGKILL)
            return finalize(handler, directory)

        ocp.JsonCheckpointHandler.finalize = killed
        runpy.run_module("diffpo_jax.main", run_name="__main__", alter_sys=True)
    """
    line = [sys.executable, "-c", textwrap.dedent(killed_in_a_save), "--config=configs/sudoku.py:debug", f"--workdir={workdir}", *FLAGS]
    process = subprocess.run(line, cwd=runs.ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    [partial] = [path for path in (workdir / "checkpoints").iterdir() if path.name not in ("20",)]
    assert partial.name.startswith("40") and "tmp" in partial.name and any(partial.iterdir())
    assert any((partial / "state").iterdir()) and any(partial.glob("data.*/*")) and not (partial / "data").exists()

    runs.finish(runs.start(workdir, *FLAGS))
    assert not partial.exists() and runs.steps(workdir / "checkpoints") == [40, 45]
    runs.assert_same_outcome(workdir, uninterrupted)
