"""Five joint updates of a small model over a mesh: python worker.py '{"meshes": [...], "workdir": ..., "out": ..., "distributed": {...}}'.

Writes OUT/NUMBER.npz a mesh (the first process does): trajectories, parameters before and after, metrics; with that of the mesh
`saved_on` also on how many meshes a checkpoint of its state was restored.
"""

import contextlib
import dataclasses
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs.sudoku import get_config
from diffpo_jax import checkpoint, data, processes, sharding
from diffpo_jax.build import build, grade
from diffpo_jax.config import check_config
from diffpo_jax.cost import analyse
from diffpo_jax.rollout import lanes, make_credit, make_rollout, sampler_options
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.step import make_update
from diffpo_jax.train import init_train_state
from tests.reference import sharpen

STEPS = 5


def small_config(mesh):
    """The preset debug on a mesh {"data": 2, "fsdp": 4}; "lanes" beside the axes are the sampler's."""
    config, mesh = get_config("debug"), dict(mesh)
    config.sampler.lanes = mesh.pop("lanes", 0)
    config.update_from_flattened_dict({f"mesh.{axis}": size for axis, size in mesh.items()})
    config.rl.warmup_steps, config.model.head_chunk, config.model.remat = 1, 8, "full"
    config.rl.microbatch = 2
    check_config(config)
    return config


def check_rows_stay(parts, params, rows):
    """The sampler's program sends no prompt and no result: all that devices tell each other is whether any of them has a row left."""
    by_rows = sharding.rows_sharding(parts.mesh)
    prompt = jax.ShapeDtypeStruct((rows, 16), jnp.int32, sharding=by_rows)
    mask = jax.ShapeDtypeStruct((rows, 16), bool, sharding=by_rows)
    options = sampler_options(parts) | {"lanes": lanes(parts, rows)}
    program = jax.jit(lambda *args: denoise(parts.policy, *args, **options)).lower(params, prompt, mask, jax.random.key(0))
    sent = analyse(program.compile().as_text(), dynamic_trips=1).collectives
    assert sent.keys() == {"all-reduce"} and sent["all-reduce"].bytes < 16, sent


def run(mesh, workdir):
    config = small_config(mesh)
    parts = build(config, workdir)
    # a reward that an untrained model earns now and then
    task = dataclasses.replace(parts.task, components=lambda answer, text: {"some": sum(c in "12" for c in text) / 16})
    parts = dataclasses.replace(parts, task=task)
    # Untrained, the positions' entropies are equal up to rounding, which would decide their order; sharpened they are apart.
    base = sharding.init_sharded(parts.mesh, lambda key: sharpen(parts.policy.init(key), 15.0), parts.key("policy"))
    state, rows = init_train_state(parts, base), config.rl.prompts * config.rl.group_size
    rollout, credit = make_rollout(parts), make_credit(parts)
    update = make_update(parts.policy, parts.trainable, parts.head, config, parts.tokenizer.eos_id, parts.key("dropout"), parts.mesh)
    if config.sampler.lanes and parts.mesh.shape["data"] == parts.mesh.size:
        check_rows_stay(parts, base, rows)
    batches = data.train_batches(
        parts.sources["train"], parts.tokenizer, config, batch_size=config.rl.prompts, seed=1, group_size=config.rl.group_size,
        mine=sharding.host_rows(parts.mesh, rows),
    )  # fmt: skip
    placed = sharding.params_sharding(parts.mesh, state)
    saved = {f"base/{number}": leaf for number, leaf in enumerate(jax.tree.leaves(sharding.fetch(base)))}
    for step in range(STEPS):
        batch = next(batches)
        trajectory, likelihoods = rollout(state, base, batch, jax.random.fold_in(parts.key("rl"), step))
        group, metrics = credit(trajectory, likelihoods, grade(parts, "train", batch["index"], sharding.get_rows(trajectory.tokens)))
        shard = group.trajectory.tokens.addressable_shards[0].data.shape
        assert shard == (rows // sharding.split(parts.mesh, "rows"), 16), shard
        state, more = update(state, base, group, jnp.asarray(0))
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, placed)
        assert jax.tree.all(same), "an update moved parameters or optimiser states to another layout"
        trajectory = sharding.fetch(group.trajectory)
        for name in ("tokens", "unmask_step", "nfe", "log_prob"):
            saved[f"{step}/{name}"] = getattr(trajectory, name)
        saved[f"{step}/gamma"], saved[f"{step}/latents"] = trajectory.draw.gamma, sharding.fetch(group.reads.latents)
        saved[f"{step}/advantages"] = sharding.fetch(group.advantages)
        saved |= {f"{step}/metrics/{name}": float(value) for name, value in jax.device_get({**metrics, **more}).items()}
    for name in ("params", "threshold_params"):
        saved |= {f"{name}/{number}": leaf for number, leaf in enumerate(jax.tree.leaves(sharding.fetch(getattr(state, name))))}
    return saved, state


def restores(state, folder, meshes):
    """On how many of `meshes` a checkpoint of `state` is restored bit for bit, and laid out as a state is there."""
    checkpoints = checkpoint.open_manager(folder)
    checkpoint.save(checkpoints, 1, state, force=True)
    for mesh in meshes:
        shardings = sharding.params_sharding(sharding.make_mesh(small_config(mesh).mesh), state)
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        restored = checkpoint.restore(checkpoints, None, wanted)
        for ours, leaf, place in zip(*map(jax.tree.leaves, (restored, state, shardings)), strict=True):
            assert ours.sharding.is_equivalent_to(place, ours.ndim)
            np.testing.assert_array_equal(ours, leaf)
    return len(meshes)


def main(stack, meshes, workdir, out, saved_on=None, distributed=None):
    if distributed:
        settings = small_config({}).distributed
        settings.update(distributed | {"initialize": True})
        stack.enter_context(processes.together(settings))
    for number, mesh in enumerate(meshes):
        saved, state = run(mesh, workdir)
        if number == saved_on:
            saved["restored"] = restores(state, os.path.join(workdir, "checkpoints"), meshes)
        if jax.process_index() == 0:
            np.savez(os.path.join(out, f"{number}.npz"), **saved)


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        main(stack, **json.loads(sys.argv[1]))
