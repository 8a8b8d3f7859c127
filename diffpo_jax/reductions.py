"""Masked mean, sum and standard deviation: the only reductions used on padded arrays."""

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
