"""The sampler's head: one pass over the vocabulary in chunks, keeping of each position the token drawn there and its statistics.

Logits of the whole vocabulary are never held: [W, K, S, chunk] at most, where S is the number of parts that the vocabulary is split in
over devices. Each part is read where it lies; only what is kept of it, [W, K, S], is brought together.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffpo_jax.models.transformer import Policy, without_mask
from diffpo_jax.reductions import argmax, pick
from diffpo_jax.sampling.unmasking import PositionStats

CHUNK = 4096  # most columns of a part that are read at a time
LOWEST = float(np.finfo(np.float32).min)


class _Seen(struct.PyTreeNode):
    """What statistics are made of, of a set of tokens of logits l; float32, all of one shape."""

    top: jax.Array  # max l
    second: jax.Array  # the largest but one; -inf where there is none
    total: jax.Array  # sum exp(l - top)
    spread: jax.Array  # sum exp(l - top) (top - l)


class _Drawn(struct.PyTreeNode):
    """The token of a set of logits l that has the largest l / T + noise; all of one shape."""

    top: jax.Array  # max l
    total: jax.Array  # sum exp((l - top) / T)
    token: jax.Array  # int32
    logit: jax.Array  # its l
    score: jax.Array  # its (l - top) / T + noise


def read(
    policy: Policy, params: Any, hidden: jax.Array, keys: jax.Array, temperature: float, *, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array, PositionStats]:
    """Draws a token at each position, and says how sure the model is there.

    A position's noise depends on its key and the indices of tokens: not on chunks, nor on how the vocabulary is split.

    Args:
      policy: the denoiser.
      params: its parameters.
      hidden: [W, K, D], hidden states at the positions.
      keys: [W, K] typed PRNG keys of the positions.
      temperature: tokens ~ softmax(logits / temperature) without MASK; 0 = argmax, the first of equals.
      chunk: most columns that are read at a time of each part of the vocabulary.

    Returns:
      tokens [W, K] int32, V - 1 where there is a NaN; their log-probabilities [W, K] float32 in the distribution drawn from, 0 at
      temperature 0; statistics at temperature 1, with MASK if the model says so (`mask_in_confidence`).
    """
    chex.assert_rank([hidden, keys], [3, 2])
    key_token, key_noise = jax.vmap(jax.vmap(lambda key: tuple(jax.random.split(key))))(keys)
    seen, drawn = _read_parts(policy, params, hidden, jax.random.key_data(key_token), temperature, chunk)
    seen, drawn = _join_seen(seen), _join_drawn(drawn, temperature or 1.0)
    tokens = jnp.where(jnp.isnan(drawn.top), policy.config.vocab_size - 1, drawn.token)
    log_prob = (drawn.logit - drawn.top) / temperature - jnp.log(drawn.total) if temperature else jnp.zeros(tokens.shape)
    stats = PositionStats(
        sampled_prob=jnp.exp(drawn.logit - seen.top) / seen.total,
        max_prob=1 / seen.total,
        margin=(1 - jnp.exp(seen.second - seen.top)) / seen.total,
        entropy=jnp.log(seen.total) + seen.spread / seen.total,
        noise=jax.vmap(jax.vmap(jax.random.uniform))(key_noise),
    )
    return tokens, log_prob, stats


def _read_parts(
    policy: Policy, params: Any, hidden: jax.Array, words: jax.Array, temperature: float, chunk: int
) -> tuple[_Seen, _Drawn]:  # fmt: skip
    """What is kept of each of the S parts, [W, K, S], at hidden states [W, K, D]; words [W, K, 2] of the keys of the noise."""
    config, parts = policy.config, policy.layout.splits("head_vocab")
    width = config.vocab_size // parts
    count = -(-width // chunk)
    size = -(-width // count)  # chunks of one size; the last begins early, to end with the part
    logits_of = policy.head_in_parts(params, hidden)
    words = policy.layout(words, "batch", None, None)

    def read_chunk(number):
        start = jnp.minimum(number * size, width - size)
        column = start + jnp.arange(size, dtype=jnp.int32)
        index = jnp.arange(parts, dtype=jnp.int32)[:, None] * width + column  # [S, size]
        whole = logits_of(start, size)
        logits = without_mask(whole, config.mask_id, index)
        again = column < number * size  # read already by the chunk before
        whole, logits = (jnp.where(again, -jnp.inf, x) for x in (whole, logits))
        noise = gumbel(words, index) if temperature else 0.0
        return _seen(whole if config.mask_in_confidence else logits), _drawn(logits, index, noise, temperature or 1.0)

    def step(number, before):
        seen, drawn = jax.tree.map(lambda *x: jnp.stack(x, axis=-1), before, read_chunk(number))
        return lay_out((_join_seen(seen), _join_drawn(drawn, temperature or 1.0)))

    def lay_out(kept):
        return jax.tree.map(lambda x: policy.layout(x, "batch", None, "head_vocab"), kept)

    if count == 1:
        return read_chunk(0)
    return jax.lax.fori_loop(0, count, step, lay_out(_nothing((*words.shape[:2], parts))))


# --- what is kept [...]: of tokens [..., C], and of sets of tokens [..., P] together ---


def _nothing(shape: tuple[int, ...]) -> tuple[_Seen, _Drawn]:
    """Of no tokens."""
    zero, lowest = jnp.zeros(shape), jnp.full(shape, -jnp.inf)
    return _Seen(lowest, lowest, zero, zero), _Drawn(lowest, zero, zero.astype(jnp.int32), lowest, lowest)


def _seen(logits: jax.Array) -> _Seen:
    """`_join_seen` of single tokens, in fewer operations."""
    top, below = _below(logits)
    scale = jnp.exp(below)
    first = jnp.arange(logits.shape[-1]) == argmax(logits)[..., None]
    return _Seen(
        top=top,
        second=jnp.max(jnp.where(first, -jnp.inf, logits), axis=-1),
        total=jnp.sum(scale, axis=-1),
        spread=-jnp.sum(_times(scale, below), axis=-1),
    )


def _join_seen(sets: _Seen) -> _Seen:
    top, below = _below(sets.top)
    scale = jnp.exp(below)
    first = jnp.arange(below.shape[-1]) == argmax(sets.top)[..., None]
    return _Seen(
        top=top,
        second=jnp.max(jnp.where(first, sets.second, sets.top), axis=-1),
        total=jnp.sum(scale * sets.total, axis=-1),
        spread=jnp.sum(scale * sets.spread - _times(scale, below) * sets.total, axis=-1),
    )


def _drawn(logits: jax.Array, index: jax.Array, noise: jax.Array | float, temperature: float) -> _Drawn:
    """`_join_drawn` of single tokens of ascending indices, in fewer operations."""
    top, below = _below(logits)
    score = below / temperature + noise
    at = argmax(score)
    return _Drawn(
        top=top,
        total=jnp.sum(jnp.exp(below / temperature), axis=-1),
        token=index[..., 0] + at,
        logit=pick(logits, at),
        score=jnp.max(score, axis=-1),
    )


def _join_drawn(sets: _Drawn, temperature: float) -> _Drawn:
    top, below = _below(sets.top)
    score = sets.score + below / temperature
    at = argmax(score)
    return _Drawn(
        top=top,
        total=jnp.sum(jnp.exp(below / temperature) * sets.total, axis=-1),
        token=pick(sets.token, at),
        logit=pick(sets.logit, at),
        score=jnp.max(score, axis=-1),
    )


def _below(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of [..., P] and what is to be added to it to get each; of -inf alone that is -inf too, not NaN."""
    top = jnp.max(logits, axis=-1)
    return top, logits - jnp.maximum(top, LOWEST)[..., None]


def _times(scale: jax.Array, below: jax.Array) -> jax.Array:
    """exp(below) below, 0 where the first is: below may be -inf there."""
    return jnp.where(scale > 0, scale * below, 0.0)


# --- noise ---


def gumbel(words: jax.Array, index: jax.Array) -> jax.Array:
    """Gumbel noise of tokens: of each the number that `jax.random.gumbel(key, (V,))` has at its index, to the rounding of a logarithm.

    Threefry makes it of the key and the index alone, so that any part of the V can be had. (Unrolled: JAX's own loops on CPU, which takes
    three times as long.)

    Args:
      words: [W, K, 2 or more] uint32, `jax.random.key_data` of the positions' keys.
      index: [S, C] int32.

    Returns:
      [W, K, S, C] float32.
    """
    first, second = words[..., 0, None, None], words[..., 1, None, None]
    bits = jnp.bitwise_xor(*_threefry(first, second, jnp.zeros((), jnp.uint32), index.astype(jnp.uint32)))
    uniform = jax.lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32) - 1
    return -jnp.log(-jnp.log(jnp.maximum(uniform, np.finfo(np.float32).tiny)))


def _threefry(key_0: jax.Array, key_1: jax.Array, x_0: jax.Array, x_1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of 20 rounds (Salmon et al., 2011), elementwise on uint32."""
    keys = (key_0, key_1, key_0 ^ key_1 ^ np.uint32(0x1BD11BDA))
    x_0, x_1 = x_0 + keys[0], x_1 + keys[1]
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x_0 = x_0 + x_1
            x_1 = x_0 ^ ((x_1 << np.uint32(turn)) | (x_1 >> np.uint32(32 - turn)))
        x_0, x_1 = x_0 + keys[(i + 1) % 3], x_1 + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x_0, x_1
