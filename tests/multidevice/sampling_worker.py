"""The sampler over several meshes of eight devices against one device: its head, and with caches of keys and values.

Prints {name: elements of the largest array sent} of the head.
"""

import json
import re

import jax
import numpy as np

from diffpo_jax import hlo, sharding
from diffpo_jax.models.transformer import ModelConfig, Policy
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.sampling.reading import read
from tests.reference import make_prompts, tiny_policy

ROWS, POSITIONS, WIDTH, VOCAB = 8, 6, 16, 480
MESHES = {"2": (4, 2, 1), "4": (2, 4, 1), "2 x 2": (2, 2, 2), "8": (1, 8, 1), "2 x 4": (1, 2, 4)}  # parts of the V: data, fsdp, tensor
SENDS = re.compile("(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(-start)?")


def largest_sent(text):
    """Elements of the largest array that a collective of the program gives a device."""
    made = (i for c in hlo.parse(text).computations.values() for i in c.instructions.values() if SENDS.fullmatch(i.opcode))
    return max(int(np.prod(leaf.shape)) for i in made for leaf in i.leaves)


def compare(tied, temperature, mesh):
    """Reads on one device and over `mesh`, whose program's largest sent array it returns."""
    config = ModelConfig(
        vocab_size=VOCAB, mask_id=VOCAB - 1, width=WIDTH, layers=1, heads=2, kv_heads=2, mlp_width=4, dtype="float32", tie_embeddings=tied,
        mask_in_confidence=True,
    )  # fmt: skip
    one = Policy(config)
    params = one.init(jax.random.key(0))
    hidden = 3 * jax.random.normal(jax.random.key(1), (ROWS, POSITIONS, WIDTH))
    keys = lambda: jax.random.split(jax.random.key(2), (ROWS, POSITIONS))  # noqa: E731
    expected = jax.jit(lambda *args: read(one, *args, temperature, chunk=1000))(params, hidden, keys())

    policy = Policy(config, sharding.Layout(mesh))
    rows = sharding.rows_sharding(mesh)
    args = (jax.device_put(params, sharding.params_sharding(mesh, params)), jax.device_put(hidden, rows), jax.device_put(keys(), rows))
    program = jax.jit(lambda *args: read(policy, *args, temperature, chunk=70)).lower(*args).compile()  # 70 divides no part
    found = program(*args)
    np.testing.assert_array_equal(found[0], expected[0])
    for ours, theirs in zip(jax.tree.leaves(found[1:]), jax.tree.leaves(expected[1:]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)
    return largest_sent(program.as_text())


def compare_caches(cache, mesh):
    """Denoises 16 rows on one device, and over `mesh` with a lane a part of the rows."""
    policy, params = tiny_policy(vocab=8, width=16, seed=3, layers=2, sharpness=20.0)
    prompts = make_prompts(16, 4, 8, padding=(0, 1, 3))
    options = {"length": 8, "block_length": 4, "eos_id": 0, "cache": cache, "refresh": 3, "threshold": np.linspace(0, 2, 16)}
    expected = denoise(policy, params, prompts.tokens, prompts.mask, jax.random.key(0), **options)
    policy = Policy(policy.config, sharding.Layout(mesh))
    prompts = jax.device_put(prompts, sharding.rows_sharding(mesh))
    params = jax.device_put(params, sharding.params_sharding(mesh, params))
    lanes = policy.layout.splits("rows")
    found = denoise(policy, params, prompts.tokens, prompts.mask, jax.random.key(0), lanes=lanes, **options)
    for name in ("tokens", "unmask_step", "nfe", "whole_calls"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-4)
    assert np.any(np.asarray(found.first_step) > 0)


def main():
    found = {}
    for cache, sizes in (("dual", (4, 2, 1)), ("prefix", (2, 2, 2))):
        compare_caches(cache, sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True))))
    for name, sizes in MESHES.items():
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
        for tied, temperature in ((False, 1.0), (True, 0.7)):
            found[f"{'tied' if tied else 'own'} {name}"] = compare(tied, temperature, mesh)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
