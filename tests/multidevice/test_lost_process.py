"""A run of two processes, one of which is killed: the other ends and says so; both started again end as if nothing had happened."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import runs
from tests.multidevice.test_sharded import free_port, simulated

pytestmark = [pytest.mark.slow, pytest.mark.multidevice]
FLAGS = (
    "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.rl.steps=30", "--config.rl.checkpoint_every=10",
    "--config.rl.eval_every=15", "--config.distributed.initialize=True", "--config.distributed.processes=2",
)  # fmt: skip


def start(workdir, *flags):
    """Both processes, of four devices each."""
    line = [sys.executable, "-m", "diffpo_jax.main", "--config=configs/sudoku.py:debug", f"--workdir={workdir}", *FLAGS, *flags]
    line.append(f"--config.distributed.coordinator=127.0.0.1:{free_port()}")
    return [
        subprocess.Popen(
            [*line, f"--config.distributed.process_id={number}"], cwd=runs.ROOT, env=simulated(4), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) for number in range(2)
    ]  # fmt: skip


def finish(processes):
    texts = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [text[-3000:] for text in texts]
    return texts


def wait_for(workdir, step, processes):
    """Until metrics.jsonl shows `step` of RL."""
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in runs.metrics(workdir, "rl")):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), "the run ended or hung"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    first, second = finish(start(workdir))
    assert "rl 30/30" in first and "rl 30/30" not in second  # the first alone prints
    return workdir


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_is_killed(uninterrupted, tmp_path, victim):
    workdir = tmp_path / "run"
    processes = start(workdir)
    wait_for(workdir, 12, processes)
    processes[victim].send_signal(signal.SIGKILL)
    survivor, killed = processes[1 - victim], time.monotonic()
    text, _ = survivor.communicate(timeout=60)  # within a minute
    assert time.monotonic() - killed < 60 and survivor.returncode not in (0, None)
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ") and f"process {victim}" in last and "Start all processes again with the same command" in last, text
    assert runs.steps(workdir / "checkpoints")[-1] == 10

    assert "rl 30/30" in finish(start(workdir))[0]
    for folder in ("sft", "checkpoints"):
        (step, arrays), (reference_step, expected) = runs.saved(workdir / folder), runs.saved(uninterrupted / folder)
        assert step == reference_step and arrays.keys() == expected.keys()
        assert all(array.tobytes() == arrays[path].tobytes() for path, array in expected.items())
    assert runs.untimed(workdir) == runs.untimed(uninterrupted)
    with np.load(workdir / "trained.npz") as ours, np.load(uninterrupted / "trained.npz") as theirs:
        assert all(np.array_equal(ours[field], theirs[field]) for field in theirs.files if field != "seconds")


def test_a_damaged_checkpoint_is_left_by_both(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    (workdir / "trained.npz").unlink()
    arrays = max((workdir / "checkpoints" / "30" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 8
    arrays.write_bytes(data)
    first, second = finish(start(workdir))
    assert f"the checkpoint of step 30 in {workdir / 'checkpoints'} is damaged" in first and "going on from step 20" in first
    assert "damaged" not in second and runs.steps(workdir / "checkpoints") == [20, 30] and (workdir / "checkpoints" / "30.damaged").is_dir()
    assert runs.untimed(workdir) == runs.untimed(uninterrupted)
    (_, arrays), (_, expected) = runs.saved(workdir / "checkpoints"), runs.saved(uninterrupted / "checkpoints")
    assert all(array.tobytes() == arrays[path].tobytes() for path, array in expected.items())


def test_an_error_ends_both(tmp_path):
    for process in start(tmp_path / "run", "--config.task.prompt_length=4"):  # every prompt is longer
        text, _ = process.communicate(timeout=200)
        assert process.returncode == 2 and "error: " in text and "prompt_length" in text, text[-2000:]


def test_sigterm_to_one_saves_and_ends_both_and_one_device_goes_on(tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir)
    wait_for(workdir, 12, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert "stopped; the same command" in finish(processes)[0]
    step = runs.steps(workdir / "checkpoints")[-1]
    assert 12 <= step < 20
    alone = [flag for flag in FLAGS if "mesh" not in flag and "distributed" not in flag]
    text = runs.finish(runs.start(workdir, *alone))
    assert "rl 30/30" in text and [line["step"] for line in runs.metrics(workdir, "rl")] == list(range(1, 31))
