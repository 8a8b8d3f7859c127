"""One device and eight give the same rollouts and the same parameters (in a process of its own, which simulates eight)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BODY = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from configs.sudoku import get_config
from diffpo_jax import data, sharding
from diffpo_jax.build import build
from diffpo_jax.config import check_config
from diffpo_jax.rollout import make_rollout
from diffpo_jax.step import make_update
from diffpo_jax.train import init_train_state
from tests.reference import sharpen

assert jax.device_count() == 8

def run(devices):
    config = get_config("debug")
    config.mesh.data = devices
    config.rl.inner_steps = 2
    config.rl.warmup_steps = 1
    config.likelihood.head_chunk = 8
    check_config(config)
    parts = build(config, sys.argv[1])
    assert parts.mesh.shape == {"data": devices}
    # a reward that an untrained model earns now and then
    task = dataclasses.replace(parts.task, components=lambda answer, text: {"some": sum(c in "12" for c in text) / 16})
    parts = dataclasses.replace(parts, task=task)
    # Untrained, the positions' entropies are equal up to rounding, which would decide their order; sharpened they are apart.
    init = jax.jit(lambda key: sharpen(parts.policy.init(key), 15.0), out_shardings=sharding.replicated_sharding(parts.mesh))
    base = init(parts.key("policy"))
    state = init_train_state(parts, base)
    rollout = make_rollout(parts)
    update = make_update(parts.policy, parts.trainable, parts.head, config, parts.tokenizer.eos_id, parts.key("dropout"))
    batches = data.train_batches(parts.sources["train"], parts.tokenizer, config, batch_size=config.rl.prompts, seed=1)
    groups, reported = [], []
    for step in range(3):
        group, metrics = rollout(state, base, next(batches), jax.random.fold_in(parts.key("rl"), step))
        assert len(group.trajectory.tokens.sharding.device_set) == devices
        shard = group.trajectory.tokens.addressable_shards[0].data.shape
        assert shard == (32 // devices, 16), shard
        for i in range(2):
            state, more = update(state, base, group, jnp.asarray(i))
        groups.append(jax.device_get(group))
        reported.append({**metrics, **{name: float(value) for name, value in more.items()}})
    leaf = jax.tree.leaves(state.params)[0]
    assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == devices
    return jax.device_get(base), jax.device_get(state), groups, reported

base, one, groups_one, metrics_one = run(1)
_, eight, groups_eight, metrics_eight = run(8)
for a, b in zip(groups_one, groups_eight, strict=True):
    np.testing.assert_array_equal(a.trajectory.tokens, b.trajectory.tokens)
    np.testing.assert_array_equal(a.trajectory.unmask_step, b.trajectory.unmask_step)
    np.testing.assert_array_equal(a.trajectory.nfe, b.trajectory.nfe)
    np.testing.assert_array_equal(a.cuts, b.cuts)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a, b)
    assert np.abs(a.advantages).max() > 0.1 and len(set(a.trajectory.nfe.tolist())) > 1, (a.advantages, a.trajectory.nfe)
for name, atol in (("params", 1e-5), ("threshold_params", 1e-5)):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), getattr(one, name), getattr(eight, name))
moved = max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(base), strict=True))
assert moved > 1e-4 and one.step == 6 and one.total_bad_updates == 0, (moved, one.step, one.total_bad_updates)
for a, b in zip(metrics_one, metrics_eight, strict=True):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4, err_msg=name)

mesh = sharding.make_mesh(8)
for call in (lambda: sharding.put_rows(mesh, np.zeros(12)), lambda: sharding.make_mesh(9)):
    try:
        call()
    except ValueError as error:
        assert "8 devices" in str(error), error
    else:
        raise AssertionError("no error")
print("the same")
"""


@pytest.mark.multidevice
def test_eight_devices_do_as_one(tmp_path):
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    env = os.environ | {"XLA_FLAGS": " ".join([*kept, "--xla_force_host_platform_device_count=8"])}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", BODY, str(tmp_path)], env=env, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.endswith("the same\n"), done.stdout[-2000:] + done.stderr[-6000:]
