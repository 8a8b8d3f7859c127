"""The head in chunks against whole logits, and over simulated devices against one."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffpo_jax import hlo
from diffpo_jax.models.transformer import ModelConfig, Policy
from diffpo_jax.sampling.reading import gumbel, read
from tests.multidevice.test_sharded import ROOT, simulated
from tests.reference import Parts, entropy_of, log_softmax

VOCAB, MASK, WIDTH = 24, 13, 32  # hidden states are logits: the kernel is the identity
READ = jax.jit(read, static_argnums=0, static_argnames=("temperature", "chunk"))


def model(parts=1, **sizes):
    sizes = {"vocab_size": VOCAB, "mask_id": MASK, "width": WIDTH, "dtype": "float32"} | sizes
    config = ModelConfig(**sizes, layers=1, heads=2, kv_heads=2, mlp_width=4)
    kernel = jnp.eye(config.width, config.vocab_size)
    params = {"embed": {"embedding": kernel.T}} if config.tie_embeddings else {"head_proj": {"kernel": kernel}}
    return Policy(config, Parts((("head_vocab", parts),))), params


def keys_of(shape):
    return jax.random.split(jax.random.key(5), shape)


def read_logits(logits, temperature=1.0, chunk=5, parts=1, **sizes):
    """`read` of logits [W, K, V]."""
    policy, params = model(parts, **sizes)
    hidden = jnp.pad(jnp.asarray(logits, jnp.float32), ((0, 0), (0, 0), (0, WIDTH - logits.shape[-1])))
    return READ(policy, params, hidden, keys_of(logits.shape[:2]), temperature=temperature, chunk=chunk)


def read_whole(logits, temperature, with_mask):
    """The same of whole logits: softmax, `jax.random`, NumPy; statistics by name."""
    without = np.where(np.arange(logits.shape[-1]) == MASK, -1e30, logits)
    key_token, key_noise = (jax.vmap(jax.vmap(lambda key, i=i: jax.random.split(key)[i]))(keys_of(logits.shape[:2])) for i in range(2))
    log_probs = log_softmax(without, temperature or 1.0)
    gumbels = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(key_token)
    tokens = np.argmax(log_probs + gumbels if temperature else without, axis=-1)
    at_one = log_softmax(logits if with_mask else without)
    top = -np.sort(-np.exp(at_one), axis=-1)
    picked = lambda values: np.take_along_axis(values, tokens[..., None], -1)[..., 0]  # noqa: E731
    stats = {
        "sampled_prob": picked(np.exp(at_one)), "max_prob": top[..., 0], "margin": top[..., 0] - top[..., 1],
        "entropy": entropy_of(at_one), "noise": jax.vmap(jax.vmap(jax.random.uniform))(key_noise),
    }  # fmt: skip
    return tokens, picked(log_probs) if temperature else np.zeros(tokens.shape), stats


def assert_as_whole(logits, temperature=1.0, mask_in_confidence=False, atol=2e-6, **options):
    found = read_logits(logits, temperature, mask_in_confidence=mask_in_confidence, **options)
    tokens, log_prob, stats = read_whole(np.asarray(logits), temperature, mask_in_confidence)
    np.testing.assert_array_equal(found[0], tokens)
    np.testing.assert_allclose(found[1], log_prob, rtol=2e-6, atol=atol)
    for name, value in stats.items():
        np.testing.assert_allclose(getattr(found[2], name), value, rtol=1e-5, atol=atol, err_msg=name)
    assert found[0].dtype == jnp.int32 and (np.asarray(found[2].entropy) >= 0).all() and not np.signbit(found[2].entropy).any()
    return found


def random_logits(scale=3.0, shape=(4, 30)):
    return scale * np.random.default_rng(0).standard_normal((*shape, VOCAB)).astype(np.float32)


# Against whole logits


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("chunk", [4096, VOCAB, 8, 5, 7])  # above V, V, a divisor; the last chunk has 4 of 5 columns, chunks of 6
def test_chunks_are_the_whole(temperature, chunk):
    assert_as_whole(random_logits(), temperature, chunk=chunk)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("options", [
    {"mask_in_confidence": True}, {"mask_in_confidence": True, "chunk": 1}, {"tie_embeddings": True}, {"tie_embeddings": True, "parts": 3},
    {"parts": 2}, {"parts": 4, "chunk": 4}, {"parts": 8, "chunk": 2, "mask_in_confidence": True}, {"parts": 4, "chunk": 99},
], ids=str)  # fmt: skip
def test_parts_and_kinds_of_heads_are_the_whole(temperature, options):
    assert_as_whole(random_logits(), temperature, **options)


@pytest.mark.parametrize("chunk", [5, 99])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_first_of_equals(chunk, parts):
    logits = np.round(random_logits(1.0))
    tokens, _, stats = assert_as_whole(logits, 0.0, chunk=chunk, parts=parts)
    ties = np.asarray(stats.margin) == 0
    assert 10 < ties.sum() < ties.size
    assert np.all(np.asarray(assert_as_whole(np.zeros_like(logits), 0.0, chunk=chunk, parts=parts)[0]) == 0)


@pytest.mark.parametrize("chunk", [1, 5, 99])
@pytest.mark.parametrize("mask_in_confidence", [False, True])
def test_extreme_logits(chunk, mask_in_confidence):
    logits = random_logits(1.0)
    logits[0] *= 1e4
    logits[1] = logits[1] + np.float32(1e4)
    logits[2, :, 3:] = -1e30
    logits[3, :, MASK] = 1e4
    for temperature in (0.0, 0.7, 1.0):
        tokens, log_prob, stats = assert_as_whole(logits, temperature, mask_in_confidence, chunk=chunk)
        assert np.isfinite(log_prob).all() and (np.asarray(tokens) != MASK).all() and (np.asarray(tokens[2]) < 3).all()
        assert all(np.isfinite(value).all() for value in jax.tree.leaves(stats))
    np.testing.assert_array_equal(stats.sampled_prob[3] == 0, mask_in_confidence)
    np.testing.assert_array_equal(stats.max_prob[3] == 1, mask_in_confidence)


def test_statistics_by_hand():
    probs = np.zeros((1, 4, VOCAB))
    probs[0, :, [0, 9, 20]] = np.transpose([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    logits = np.where(probs > 0, np.log(np.maximum(probs, 1e-30)), -1e30)
    tokens, log_prob, stats = read_logits(logits, 0.0)
    assert tokens[0].tolist() == [0, 20, 0, 0] and not np.any(log_prob)
    np.testing.assert_allclose(stats.sampled_prob[0], [0.5, 0.8, 1 / 3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(stats.max_prob[0], [0.5, 0.8, 1 / 3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(stats.margin[0], [0.25, 0.7, 0.0, 1.0], atol=1e-6)
    by_hand = [1.5 * np.log(2), -0.2 * np.log(0.1) - 0.8 * np.log(0.8), np.log(3), 0.0]
    np.testing.assert_allclose(stats.entropy[0], by_hand, atol=1e-6)
    assert stats.entropy[0, 3] == 0.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("parts, chunk", [(1, 99), (1, 5), (3, 3), (2, 99)])
def test_logits_that_are_not_numbers(temperature, parts, chunk):
    policy, params = model(parts)
    hidden = jnp.ones((1, 2, WIDTH))
    for column, token in ((2, VOCAB - 1), (VOCAB - 1, VOCAB - 1), (MASK, 0)):  # MASK's own does not matter
        broken = {"head_proj": {"kernel": params["head_proj"]["kernel"].at[:, column].set(jnp.nan)}}
        tokens, *_ = READ(policy, broken, hidden, keys_of((1, 2)), temperature=temperature, chunk=chunk)
        assert temperature and not token or tokens.tolist() == [[token] * 2]
        assert tokens.max() < VOCAB


# Noise


def test_noise_is_that_of_jax_random():
    words = jax.random.key_data(keys_of((2, 3)))
    whole = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (1000,))))(keys_of((2, 3)))
    found = jax.jit(gumbel)(words, jnp.arange(1000).reshape(4, 250))
    np.testing.assert_allclose(found.reshape(2, 3, 1000), whole, rtol=2e-6, atol=2e-6)
    some = jax.jit(gumbel)(words, jnp.asarray([[700, 3], [999, 64]]))
    np.testing.assert_allclose(some.reshape(2, 3, 4), whole[..., jnp.asarray([700, 3, 999, 64])], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_are_softmax(temperature):
    logits = random_logits(1.0, (1, 1))
    tokens, log_prob, _ = read_logits(np.broadcast_to(logits, (4, 10_000, VOCAB)), temperature, parts=2)
    expected = np.exp(log_softmax(np.where(np.arange(VOCAB) == MASK, -1e30, logits[0, 0]), temperature))
    counts, mean = np.bincount(np.ravel(tokens), minlength=VOCAB), 40_000 * expected
    assert counts[MASK] == 0 and mean[np.arange(VOCAB) != MASK].min() > 20
    chi_square = np.sum(((counts - mean) ** 2)[mean > 0] / mean[mean > 0])
    assert chi_square < VOCAB - 2 + 4.5 * np.sqrt(2 * (VOCAB - 2))
    np.testing.assert_allclose(np.exp(log_prob), expected[np.asarray(tokens)], rtol=1e-5)


# The program


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_neither_logits_nor_the_kernel_are_made_whole(tie_embeddings):
    policy, params = model(vocab_size=1000, tie_embeddings=tie_embeddings)
    args = (params, jnp.zeros((3, 4, WIDTH)), keys_of((3, 4)))
    program = jax.jit(lambda *args: read(policy, *args, 0.7, chunk=128)).lower(*args).compile()
    widest = max(array.bytes for array in hlo.largest_arrays(program.as_text(), 3))
    assert widest == 4 * WIDTH * 125  # a chunk of the kernel; V is read in eight chunks of one size
    assert program.memory_analysis().temp_size_in_bytes < 4 * 12 * 1000


@pytest.mark.slow
@pytest.mark.multidevice
def test_over_devices_as_on_one():
    """The worker compares; it reports the elements of the largest array that devices send each other of each mesh."""
    line = [sys.executable, "-m", "tests.multidevice.sampling_worker"]
    done = subprocess.run(line, env=simulated(8), cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 10
    rows, positions, width, vocab = 8, 6, 16, 480
    for name, largest in found.items():
        tied = name.startswith("tied")
        # hidden states come to the head, never logits; the kernel stays, but for a table that lies as the embedding needs it
        assert largest <= (width * vocab if tied else rows * positions * width) < rows * positions * vocab, (name, largest)
