"""Masked mean, sum and maximum, the only reductions used on padded arrays; reductions of a vocabulary; and work over positions in parts."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


def masked_sum(values: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Sum of `values` where `mask`, in float32. Masked-out values may be anything, non-finite ones included.

    Args:
      values: any shape.
      mask: bool, the same shape.
      axis: as in `jnp.sum`.
    """
    chex.assert_equal_shape([values, mask])
    return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0), axis=axis)


def masked_mean(values: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Mean of `values` where `mask`; 0 where the mask is empty. Arguments as `masked_sum`."""
    return masked_sum(values, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def masked_max(values: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Maximum of `values` where `mask`; -inf where the mask is empty. Arguments as `masked_sum`."""
    chex.assert_equal_shape([values, mask])
    return jnp.max(jnp.where(mask, values.astype(jnp.float32), -jnp.inf), axis=axis)


def pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[..., index]: [..., V] and [...] int32 -> [...]. A sum and not a gather, which would bring a split V to every device."""
    return jnp.sum(jnp.where(jnp.arange(values.shape[-1]) == index[..., None], values, 0), axis=-1)


def argmax(values: jax.Array) -> jax.Array:
    """The first index of the largest of values [..., V] -> [...] int32; V - 1 where there is a NaN.

    Not `jnp.argmax`: of a V that is split over devices its indices, as many as the values, would be sent between them.
    """
    size = values.shape[-1]
    at_top = values == jnp.max(values, axis=-1, keepdims=True)
    return jnp.min(jnp.where(at_top, jnp.arange(size), size - 1), axis=-1)


def largest_divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`; `size` itself for most = 0."""
    return next(part for part in range(min(most or size, size), 0, -1) if size % part == 0)


def map_positions(function: Callable[..., Any], chunk: int, *arrays: Any) -> Any:
    """function(*arrays), where it treats positions apart from each other, on few positions at a time: less memory, the same result.

    Args:
      function: of arrays [N, K, ...], returns arrays [N, K, ...].
      chunk: most positions at a time; the largest divisor of K up to it is taken. 0 = all.
      *arrays: pytrees of arrays [N, K, ...].
    """
    rows, length = jax.tree.leaves(arrays)[0].shape[:2]
    size = largest_divisor(length, chunk)
    if size == length:
        return function(*arrays)

    def split(x):  # [N, K, ...] -> [K / size, N, size, ...]
        return jnp.moveaxis(x.reshape(rows, length // size, size, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(lambda part: function(*part), jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, length, *x.shape[3:]), parts)
