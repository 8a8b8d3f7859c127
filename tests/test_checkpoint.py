"""Checkpoints, the workdir's configuration and its lock."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from diffpo_jax import checkpoint


def make_state(scale: float, width: int = 3):
    params = {"kernel": scale * jnp.arange(2.0 * width).reshape(2, width), "layers": [jnp.full((2,), scale, jnp.bfloat16)]}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.asarray(int(scale), jnp.int32)}


def make_iterator():
    return iter(grain.MapDataset.range(20).shuffle(seed=3).repeat().batch(4).to_iter_dataset())


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and a.sharding == e.sharding
        np.testing.assert_array_equal(a, e)


@pytest.fixture
def opened(tmp_path):
    checkpoints = checkpoint.open_manager(tmp_path / "rl", max_to_keep=2, every=5)
    yield checkpoints
    checkpoint.close(checkpoints)


def test_saves_when_due_or_forced_and_keeps_the_newest(opened):
    state = make_state(1.0)
    saved = [step for step in (1, 5, 7, 10, 15) if checkpoint.save(opened, step, state)]
    assert saved == [5, 10, 15]
    assert checkpoint.save(opened, 17, state, force=True)
    assert not checkpoint.save(opened, 17, state, force=True)  # is there already: no error, nothing written
    assert sorted(opened.manager.all_steps()) == [15, 17]
    assert checkpoint.latest_step(opened) == 17


def test_restores_values_shardings_and_the_data_position(opened):
    iterator, state = make_iterator(), make_state(2.0)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec())
    state = jax.device_put(state, sharding)
    next(iterator)
    checkpoint.save(opened, 5, state, iterator)
    assert json.loads((opened.folder / "5" / "data" / "metadata").read_text()) == iterator.get_state()
    following = [next(iterator) for _ in range(7)]  # into the next epoch
    checkpoint.save(opened, 10, make_state(9.0), iterator)

    fresh = make_iterator()
    assert_same(checkpoint.restore(opened, 5, checkpoint.abstract(state), fresh), state)
    np.testing.assert_array_equal([next(fresh) for _ in range(7)], following)
    np.testing.assert_array_equal(checkpoint.restore(opened, None, checkpoint.abstract(state))["step"], 9)  # the newest


def test_partial_restore_reads_the_parameters_of_another_run(opened):
    state = make_state(3.0)
    checkpoint.save(opened, 5, state, make_iterator())
    reader = checkpoint.open_manager(opened.folder, read_only=True)
    wanted = {"params": checkpoint.abstract(state["params"])}
    assert_same(checkpoint.restore(reader, None, wanted, partial=True), {"params": state["params"]})
    checkpoint.close(reader)


def test_missing_checkpoints_say_where_and_what_to_do(opened, tmp_path):
    state = checkpoint.abstract(make_state(1.0))
    with pytest.raises(FileNotFoundError, match=re.escape(f"no checkpoint in {opened.folder}; it has none: train first")):
        checkpoint.restore(opened, None, state)
    checkpoint.save(opened, 5, make_state(1.0))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 in .*it has steps \[5\]"):
        checkpoint.restore(opened, 3, state)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder .*/absent"):
        checkpoint.open_manager(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()


def test_a_mismatch_names_the_leaves(opened):
    checkpoint.save(opened, 5, make_state(1.0, width=3))
    other = checkpoint.abstract(make_state(1.0, width=4))
    other["extra"] = other.pop("step")
    with pytest.raises(ValueError) as error:
        checkpoint.restore(opened, None, other)
    first, advice = str(error.value).splitlines()
    assert first == (
        f"the checkpoint of step 5 in {opened.folder} does not fit this configuration: 5 leaves differ, first extra: expected (), found no "
        "such leaf; opt_state/1/0/mu/kernel: expected (2, 4), found (2, 3); opt_state/1/0/nu/kernel: expected (2, 4), found (2, 3)"
    )
    assert "--workdir" in advice and "sft.checkpoint" in advice
    with pytest.raises(ValueError, match="does not fit this configuration: absent: expected .*found no such leaf\n"):
        checkpoint.restore(opened, None, {"absent": other["extra"]}, partial=True)


def test_a_damaged_checkpoint_is_named(opened):
    state = make_state(1.0)
    checkpoint.save(opened, 5, state)
    folder = opened.folder / "5" / "state"
    (folder / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=re.escape(f"the checkpoint of step 5 in {opened.folder} is damaged (")):
        checkpoint.restore(opened, None, checkpoint.abstract(state))
    (folder / "_METADATA").unlink()
    with pytest.raises(ValueError, match="is damaged .*its list of arrays is missing"):
        checkpoint.restore(opened, None, checkpoint.abstract(state))


def test_a_damaged_configuration_of_a_workdir_is_named(tmp_path):
    for content in ('{"seed": 0', "[1]", "7"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/config.json is damaged (")):
            checkpoint.check_workdir(tmp_path, make_config())


def test_a_workdir_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, kind in ((tmp_path / "file", FileExistsError), (tmp_path / "file" / "run", NotADirectoryError)):
        with pytest.raises(kind, match=re.escape(f"{folder} cannot hold a run (") + ".*--workdir"):
            with checkpoint.lock_workdir(folder):
                pass
    long = tmp_path / ("x" * 300)
    with pytest.raises(PermissionError, match="cannot hold a run .File name too long"), checkpoint.lock_workdir(long):
        pass


def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(tmp_path):
    child = """
        import os, signal, sys
        import grain
        import jax.numpy as jnp
        import orbax.checkpoint as ocp
        from diffpo_jax import checkpoint

        def kill(*_):  # all has been written; the state has its name, the data's position has not
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoints = checkpoint.open_manager(sys.argv[1])
        checkpoint.save(checkpoints, 1, {"x": jnp.full(1000, 1.0)})
        ocp.JsonCheckpointHandler.finalize = kill
        iterator = iter(grain.MapDataset.range(20).to_iter_dataset())
        checkpoint.save(checkpoints, 2, {"x": jnp.full(1000, 2.0)}, iterator)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(child), str(tmp_path / "rl")])
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "rl").iterdir())) == 2  # the whole one and a remnant
    [remnant] = [path for path in (tmp_path / "rl").iterdir() if path.name != "1"]
    assert remnant.name.startswith("2.") and {"state"} < {path.name.split(".orbax")[0] for path in remnant.iterdir()}
    assert sum(path.stat().st_size for path in (remnant / "state").rglob("*") if path.is_file()) > 0
    assert not (remnant / "data").exists() and len(list(remnant.glob("data.*/*"))) == 1
    checkpoints = checkpoint.open_manager(tmp_path / "rl")
    assert checkpoint.latest_step(checkpoints) == 1
    state = checkpoint.restore(checkpoints, None, checkpoint.abstract({"x": jnp.zeros(1000)}))
    np.testing.assert_array_equal(state["x"], np.ones(1000))
    assert checkpoint.save(checkpoints, 2, {"x": jnp.zeros(1000)})
    assert sorted(p.name for p in (tmp_path / "rl").iterdir()) == ["1", "2"]  # the remnant went in the background, before the save
    checkpoint.close(checkpoints)


def make_config(**fields):
    config = {"seed": 0, "rl": {"steps": 3, "rate": 1e-4}, "eval": {"thresholds": (0.1, 1.0), "cap": float("inf")}}
    return ml_collections.ConfigDict(config | fields)


def test_workdir_keeps_the_first_configuration(tmp_path):
    workdir = tmp_path / "runs" / "a"
    checkpoint.check_workdir(workdir, make_config())
    written = (workdir / "config.json").read_text()
    assert json.loads(written)["eval"] == {"thresholds": [0.1, 1.0], "cap": "Infinity"}
    assert os.listdir(workdir) == ["config.json"]
    checkpoint.check_workdir(workdir, make_config())  # the tuple is a list there: still the same
    checkpoint.check_workdir(workdir, make_config(eval={"thresholds": (9.0,)}))  # may differ
    assert (workdir / "config.json").read_text() == written


def test_workdir_of_another_configuration_is_refused(tmp_path):
    checkpoint.check_workdir(tmp_path, make_config())
    other = make_config(seed=1, rl={"steps": 4, "group": 2}, evaluation=3)
    with pytest.raises(ValueError) as error:
        checkpoint.check_workdir(tmp_path, other, ignore=("eval", "rl.group"))
    first, *fields, last = str(error.value).splitlines()
    assert str(tmp_path) in first and "--workdir" in last
    assert [field.strip() for field in fields] == [
        "evaluation: (absent) -> 3",
        "rl.rate: 0.0001 -> (absent)",
        "rl.steps: 3 -> 4",
        "seed: 0 -> 1",
    ]
    with pytest.raises(ValueError, match="eval.cap: Infinity -> 2"):
        checkpoint.check_workdir(tmp_path, make_config(eval={"thresholds": [0.1, 1.0], "cap": 2}), ignore=())


def test_one_process_at_a_time_works_in_a_workdir(tmp_path):
    with checkpoint.lock_workdir(tmp_path / "run"):
        with pytest.raises(checkpoint.InUseError, match=rf"run is in use by process {os.getpid()}: .*--workdir"):
            with checkpoint.lock_workdir(tmp_path / "run"):
                pass
    with checkpoint.lock_workdir(tmp_path / "run"):  # given back
        pass


def test_where_checkpoints_are_kept():
    config = ml_collections.ConfigDict({"checkpoint_dir": ""})
    assert checkpoint.folder_of(config, "runs/a", "sft") == "runs/a/sft"
    config.checkpoint_dir = "gs://bucket/run"
    assert checkpoint.folder_of(config, "runs/a", "checkpoints") == "gs://bucket/run/checkpoints"
    assert checkpoint.is_remote("gs://bucket/run") and not checkpoint.is_remote("runs/a") and not checkpoint.is_remote("/a:b")


def test_only_the_first_host_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    checkpoint.write_json(tmp_path / "deep" / "summary.json", {"a": 1})
    checkpoint.check_workdir(tmp_path / "run", make_config())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):  # what cannot be written is an error on every host
        checkpoint.write_json(tmp_path / "summary.json", {"a": object()})


def test_write_json_replaces_the_file_whole(tmp_path):
    path = tmp_path / "deep" / "summary.json"
    checkpoint.write_json(path, {"a": np.float32(0.5), "b": (np.arange(2), jnp.asarray(3)), "c": [float("nan"), float("-inf")]})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [[0, 1], 3], "c": ["NaN", "-Infinity"]}
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 0.5
