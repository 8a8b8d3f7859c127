"""The PyTorch sampler of the benchmark computes what ours does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffpo_jax.models.transformer import ModelConfig, Policy
from diffpo_jax.sampling.denoise import denoise

torch = pytest.importorskip("torch", reason="the optional extra torch is not installed")
from benchmarks import torch_sampler  # noqa: E402

SIZES = {"vocab_size": 24, "width": 32, "layers": 2, "heads": 4, "mlp_width": 48}
MASK = 23


def models(kv_heads, qkv_bias):
    """(policy, its parameters, the PyTorch network with the same ones), kernels large enough for distributions that differ."""
    sizes = SIZES | {"kv_heads": kv_heads, "qkv_bias": qkv_bias}
    policy = Policy(ModelConfig(mask_id=MASK, dtype="float32", **sizes))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32), policy.init(jax.random.key(0)))
    return policy, params, torch_sampler.load(flatten_dict(params, sep="/"), **sizes)


def prompts(rows, padded):
    """(tokens [rows, 6], mask [rows, 6]), rows of different lengths if padded."""
    tokens = np.random.default_rng(1).integers(0, MASK, (rows, 6), np.int32)
    return tokens, np.arange(6) >= (np.arange(rows) % 4 * padded)[:, None]


@pytest.mark.parametrize(("kv_heads", "qkv_bias", "padded"), [(4, False, False), (2, True, True)])
def test_logits(kv_heads, qkv_bias, padded):
    policy, params, network = models(kv_heads, qkv_bias)
    tokens, mask = prompts(3, padded)
    ours = policy.whole_head(params, policy.hidden(params, jnp.asarray(tokens), jnp.asarray(mask)))
    with torch.inference_mode():
        theirs = network(torch.tensor(tokens), torch.tensor(mask) if padded else None).numpy()
    np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], atol=1e-4)
    assert np.std(theirs) > 0.1


@pytest.mark.parametrize(("block_length", "steps", "padded"), [(8, 6, False), (4, 4, True)])
def test_tokens(block_length, steps, padded):
    policy, params, network = models(4, False)
    tokens, mask = prompts(4, padded)
    options = {"length": 8, "block_length": block_length, "steps": steps}
    greedy = options | {"rule": "low_confidence", "temperature": 0.0}
    ours = denoise(policy, params, jnp.asarray(tokens), jnp.asarray(mask), jax.random.key(2), **greedy)
    theirs = torch_sampler.generate(network, torch.tensor(tokens), torch.tensor(mask), mask_id=MASK, **options)
    np.testing.assert_array_equal(ours.tokens, theirs.numpy())
    assert len(np.unique(ours.tokens)) > 2
