"""Attention: rotary positions, keys and values that may be kept from one pass to the next, implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@functools.cache
def rope_tables(length: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Constant (cos, sin) tables [length, head_dim / 2], float32, of rotary position embeddings (arXiv 2104.09864)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(length)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [N, heads, S, head_dim] by tables [S, head_dim / 2] or [N, 1, S, head_dim / 2], halves against each other; in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Cache(struct.PyTreeNode):
    """Keys (rotated) and values of the positions of whole rows, at one layer or, with a leading axis, at all layers."""

    key: jax.Array  # [layers, N, kv_heads, S, head_dim]
    value: jax.Array  # [layers, N, kv_heads, S, head_dim]


def einsum_attention(query: jax.Array, parts: tuple[Cache, ...], biases: tuple[jax.Array, ...]) -> jax.Array:
    """Softmax attention to the keys and values of all parts, anywhere.

    Args:
      query: [N, heads, S, d], scaled.
      parts: keys and values [N, kv_heads, T, d] each.
      biases: [N, 1, 1, T] float32 each, added to the scores of its part.

    Returns:
      [N, heads, S, d].
    """
    rows, _, _, head_dim = shape = query.shape
    query = query.reshape(rows, parts[0].key.shape[1], -1, head_dim)  # the queries that share keys lie together
    scores = [
        jnp.einsum("nhsd,nhtd->nhst", query, part.key, preferred_element_type=jnp.float32) + bias
        for part, bias in zip(parts, biases, strict=True)
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1)).astype(query.dtype)
    ends = np.cumsum([part.key.shape[2] for part in parts])
    values = [jnp.einsum("nhst,nhtd->nhsd", w, part.value) for w, part in zip(jnp.split(weights, ends[:-1], axis=-1), parts, strict=True)]
    return sum(values[1:], values[0]).reshape(shape)


def flash_attention(
    query: jax.Array, parts: tuple[Cache, ...], biases: tuple[jax.Array, ...], implementation: str = "cudnn"
) -> jax.Array:  # fmt: skip
    """`einsum_attention` by cuDNN: bfloat16, d a multiple of 8 and at most 128 (256 from Hopper on), even lengths in updates.

    Raises:
      ValueError: without an NVIDIA GPU.
    """
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"model.attention = 'cudnn' needs an NVIDIA GPU; the devices are {jax.default_backend()}")
    key, value = (jnp.concatenate([getattr(part, name) for part in parts], axis=2).swapaxes(1, 2) for name in ("key", "value"))
    bias = jnp.concatenate(biases, axis=-1)
    bias = jnp.broadcast_to(bias, (*bias.shape[:2], query.shape[2], bias.shape[3])).astype(query.dtype)
    query = query.swapaxes(1, 2)
    return jax.nn.dot_product_attention(query, key, value, bias, scale=1.0, implementation=implementation).swapaxes(1, 2)


ATTENTION = {"einsum": einsum_attention, "cudnn": flash_attention}
