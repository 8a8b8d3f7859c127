"""The viewer's records are the same on one device, on eight (which do not divide twelve rows), and in two processes."""

import json
import subprocess
import sys

import pytest

from tests.multidevice.test_sharded import ROOT, finish, free_port, simulated

MESHES = {
    "data": {"data": 8},
    "rollouts over another mesh": {"data": 2, "fsdp": 4, "rollout.data": 2, "rollout.fsdp": 1, "rollout.tensor": 4},
}


def start(devices, **arguments):
    line = [sys.executable, "-m", "tests.multidevice.pages_worker", json.dumps(arguments)]
    return subprocess.Popen(line, env=simulated(devices), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    finish(start(1, mesh={"data": 1}, workdir=str(out), out=str(out / "found.json")))
    return json.loads((out / "found.json").read_text())


def assert_the_same(found, expected):
    for name, (indices, records) in expected.items():
        assert found[name][0] == indices == list(range(12)) and len(found[name][1]) == 12
        for ours, theirs in zip(found[name][1], records, strict=True):
            for part, value in theirs.items():
                if part in ("confidence", "entropy", "gamma"):
                    assert ours[part] == pytest.approx(value, rel=5e-3, abs=1e-4)
                else:
                    assert ours[part] == value, part


def test_the_comparison_would_notice(one_device):
    records = one_device["fixed"][1]
    assert len({record["nfe"] for record in records}) > 1 and len({record["answer"] for record in records}) > 1
    assert min(min(filter(None, record["confidence"])) for record in records) < 0.9


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_does_as_one_device(one_device, mesh, tmp_path):
    finish(start(8, mesh=MESHES[mesh], workdir=str(tmp_path), out=str(tmp_path / "found.json")))
    assert_the_same(json.loads((tmp_path / "found.json").read_text()), one_device)


@pytest.mark.slow
@pytest.mark.multidevice
def test_two_processes_do_as_one_device(one_device, tmp_path):
    port = free_port()
    finish(*(
        start(4, mesh={"data": 2, "fsdp": 4}, workdir=str(tmp_path / str(number)), out=str(tmp_path / "found.json"),
              distributed={"coordinator": f"127.0.0.1:{port}", "processes": 2, "process_id": number}) for number in range(2)
    ))  # fmt: skip
    assert_the_same(json.loads((tmp_path / "found.json").read_text()), one_device)
