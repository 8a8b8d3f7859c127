"""A short run that nothing disturbed, and copies of it to spoil."""

import shutil

import pytest

from tests import runs

FLAGS = (
    "--config.sft.steps=60", "--config.sft.checkpoint_every=10", "--config.sft.log_every=1",
    "--config.rl.steps=16", "--config.rl.checkpoint_every=2", "--config.rl.eval_every=5",
)  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The workdir of a finished run with FLAGS."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.finish(runs.start(workdir, *FLAGS))
    return workdir


@pytest.fixture
def nearly_done(undisturbed, tmp_path):
    """A copy of that workdir as after the last RL checkpoint: what comes later is not there."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    for name in ("trained.npz", "learned.npz", "summary.json", "pareto.png"):
        (workdir / name).unlink()
    return workdir
