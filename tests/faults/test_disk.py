"""A full disk: the run says so and ends, what it saved is whole, and with space again the same command ends as if nothing had happened."""

import signal
import subprocess

import numpy as np
import pytest

from tests import runs
from tests.faults.conftest import FLAGS

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, left: int) -> None:
    """Takes all space of the file system of `folder` but `left` bytes, rounded up to pages."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(file.tell() // 4096 * 4096 - left, 0))


@pytest.mark.parametrize(
    "phase, step, left, told",
    [
        ("sft", 12, 60_000, "no space left for the checkpoint of step 20 in {}/sft (about 0."),
        ("rl", 5, 60_000, "no space left for the checkpoint of step {step} in {}/checkpoints (about 0."),
        ("rl", 5, 0, "no space left for metrics.jsonl and TensorBoard in {} ("),
    ],
)
def test_the_disk_is_full(undisturbed, small_disk, phase, step, left, told):
    workdir = small_disk / "run"
    process = runs.start(workdir, *FLAGS)
    seen = runs.stop_at(process, workdir, phase, step)
    fill(small_disk, left)
    process.send_signal(signal.SIGCONT)
    error = runs.finish(process, code=1)
    last = error[error.index("error: ") :].strip().splitlines()
    assert len(last) <= 3 and "Traceback" not in error, error
    due = (seen // 2 + 1) * 2 if seen % 2 == 0 else seen + 1  # a save comes after every second step
    candidates = [told.format(workdir, step=number) for number in (due, due + 2)]
    assert any(candidate in last[0] for candidate in candidates) and "MB are free" in last[0], last
    assert "What was saved before is whole: make space, then the same command goes on from there" in last[0]

    folder = workdir / {"sft": "sft", "rl": "checkpoints"}[phase]
    step, arrays = runs.saved(folder)
    assert 0 < step <= max(seen, 10) and all(np.isfinite(array).all() for array in arrays.values())

    (small_disk / "filler").unlink()
    runs.finish(runs.start(workdir, *FLAGS))
    runs.assert_same_outcome(workdir, undisturbed)
