"""One device, eight of them in several meshes, and two processes of four give the same rollouts and the same parameters."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MESHES = {
    "one device": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "rollouts over another mesh": {"data": 2, "fsdp": 4, "rollout.data": 2, "rollout.fsdp": 1, "rollout.tensor": 4},
}
REFILLED = {  # rows take the places of finished ones, on each device those of its own queue
    "two lanes a device": {"data": 2, "fsdp": 4, "lanes": 16},
    "one lane a device": {"data": 8, "lanes": 8},
}
TWO_PROCESSES = {
    "data": {"data": -1},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "rollouts over another mesh": {"data": 2, "fsdp": 4, "rollout.data": 1, "rollout.fsdp": 2, "rollout.tensor": 4},  # rows on both
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def simulated(devices):
    """The environment of a process with so many simulated devices."""
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])}


def start(devices, **arguments):
    """A worker on so many simulated devices."""
    line = [sys.executable, "-m", "tests.multidevice.worker", json.dumps(arguments)]
    return subprocess.Popen(line, env=simulated(devices), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(*processes):
    for process in processes:
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text[-6000:]


def load(out, number):
    with np.load(out / f"{number}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """{name of a mesh: what the worker saved} in one process of eight devices."""
    out = tmp_path_factory.mktemp("one")
    meshes = MESHES | REFILLED
    finish(start(8, meshes=list(meshes.values()), workdir=str(out), out=str(out), saved_on=list(MESHES).index("tensor")))
    return {name: load(out, number) for number, name in enumerate(meshes)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The same in two processes of four devices."""
    out, port = tmp_path_factory.mktemp("two"), free_port()
    started = [
        start(4, meshes=list(TWO_PROCESSES.values()), workdir=str(out / str(number)), out=str(out),
              distributed={"coordinator": f"127.0.0.1:{port}", "processes": 2, "process_id": number}) for number in range(2)
    ]  # fmt: skip
    finish(*started)
    return {name: load(out, number) for number, name in enumerate(TWO_PROCESSES)}


def assert_the_same(found, expected):
    assert found.keys() - {"restored"} == expected.keys()
    for name, value in expected.items():
        part = name.rpartition("/")[2]
        if part in ("tokens", "unmask_step", "nfe", "cuts"):
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        elif "params/" in name or name.startswith("base/"):
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_comparison_would_notice(one_process):
    """Training moves the parameters by far more than is tolerated, and the rollouts differ among each other."""
    one = one_process["one device"]
    moved = max(np.abs(one[f"params/{name[5:]}"] - value).max() for name, value in one.items() if name.startswith("base/"))
    assert moved > 2e-4
    assert np.abs(one["0/advantages"]).max() > 0.1 and len(set(one["0/nfe"].tolist())) > 1 and len(set(one["0/gamma"].tolist())) == 32
    assert (one["0/tokens"] != one["4/tokens"]).any() and one["4/metrics/bad_updates"] == 0


@pytest.mark.multidevice
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one device"])
def test_a_mesh_does_as_one_device(one_process, mesh):
    assert_the_same(one_process[mesh], one_process["one device"])


@pytest.mark.multidevice
def test_a_checkpoint_of_one_mesh_restores_on_another(one_process):
    assert one_process["tensor"]["restored"] == len(MESHES | REFILLED)  # the worker compares


@pytest.mark.parametrize("mesh", REFILLED)
def test_refilled_lanes_do_as_lockstep_on_one_device(one_process, mesh):
    found, expected = dict(one_process[mesh]), dict(one_process["one device"])
    refilled, lockstep = ([values.pop(f"{step}/metrics/utilisation") for step in range(5)] for values in (found, expected))
    assert np.mean(refilled) > np.mean(lockstep) > 0
    assert_the_same(found, expected)


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("mesh", TWO_PROCESSES)
def test_two_processes_do_as_one_device(one_process, two_processes, mesh):
    assert_the_same(two_processes[mesh], one_process["one device"])
