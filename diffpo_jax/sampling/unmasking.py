"""The unmasking rules: which positions of the active block to unmask at a denoising step. Pure functions.

Each rule is `rule(stats, eligible, amount) -> [N, K] bool`, where K is the number of positions in view, `eligible` [N, K] bool marks the
masked ones, and `amount` [N] is the rule's dial: the number of positions for the top-k rules, the threshold for the others. At least one
position is selected in each row that has an eligible one.
"""

import jax
import jax.numpy as jnp
from flax import struct


class PositionStats(struct.PyTreeNode):
    """Statistics of the current distributions (at temperature 1), all [N, K] float32."""

    sampled_prob: jax.Array  # probability of the token drawn at the position
    max_prob: jax.Array  # max_v p(v)
    margin: jax.Array  # p_(1) - p_(2)
    entropy: jax.Array  # nats
    noise: jax.Array  # uniform in [0, 1)


def top_k(score: jax.Array, eligible: jax.Array, amount: jax.Array) -> jax.Array:
    """The max(amount, 1) eligible positions of highest score (leftmost first among equals): [N, K], [N, K], [N] -> [N, K] bool."""
    order = jnp.argsort(jnp.where(eligible, -score, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return eligible & (rank < jnp.maximum(amount, 1)[:, None])


def low_confidence(stats: PositionStats, eligible: jax.Array, amount: jax.Array) -> jax.Array:
    """Top-k by probability of the sampled token (LLaDA, arXiv 2502.09992)."""
    return top_k(stats.sampled_prob, eligible, amount)


def top_probability(stats: PositionStats, eligible: jax.Array, amount: jax.Array) -> jax.Array:
    """Top-k by max_v p(v): position first, token second."""
    return top_k(stats.max_prob, eligible, amount)


def margin(stats: PositionStats, eligible: jax.Array, amount: jax.Array) -> jax.Array:
    """Top-k by p_(1) - p_(2) (arXiv 2502.06768)."""
    return top_k(stats.margin, eligible, amount)


def entropy(stats: PositionStats, eligible: jax.Array, amount: jax.Array) -> jax.Array:
    """Top-k by least entropy (Dream, arXiv 2508.15487)."""
    return top_k(-stats.entropy, eligible, amount)


def random(stats: PositionStats, eligible: jax.Array, amount: jax.Array) -> jax.Array:
    """k positions uniformly chosen."""
    return top_k(stats.noise, eligible, amount)


def threshold(stats: PositionStats, eligible: jax.Array, amount: jax.Array) -> jax.Array:
    """All with max_v p(v) >= amount, at least the best one (Fast-dLLM, arXiv 2505.22618)."""
    return (eligible & (stats.max_prob >= amount[:, None])) | top_k(stats.max_prob, eligible, jnp.ones_like(amount))


def entropy_bounded(stats: PositionStats, eligible: jax.Array, amount: jax.Array) -> jax.Array:
    """Largest prefix U, by ascending entropy H, with sum_U H - max_U H <= amount, at least one (EB sampler, arXiv 2505.24857)."""
    value = jnp.where(eligible, stats.entropy, jnp.inf)
    order = jnp.argsort(value, axis=-1, stable=True)
    ascending = jnp.take_along_axis(value, order, axis=-1)
    # In ascending order the maximum of a prefix is its last element: the bound is on the sum of those before it (summed as such; the
    # cumulative sum less the element would round small entropies beside a large one to nothing).
    before = jnp.pad(jnp.cumsum(ascending, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    fits = (before <= amount[:, None]) | (jnp.arange(value.shape[-1]) == 0)
    return eligible & jnp.take_along_axis(fits, jnp.argsort(order, axis=-1), axis=-1)


TOP_K_RULES = {
    "low_confidence": low_confidence,
    "top_probability": top_probability,
    "margin": margin,
    "entropy": entropy,
    "random": random,
}
THRESHOLD_RULES = {"threshold": threshold, "entropy_bounded": entropy_bounded}
RULES = TOP_K_RULES | THRESHOLD_RULES


def tokens_this_step(step_in_block: jax.Array, block_length: int, steps_per_block: int) -> jax.Array:
    """k of the published schedule (LLaDA): n // steps, one more in the first n % steps steps; [N] int32 -> [N] int32."""
    base, extra = divmod(block_length, steps_per_block)
    return base + (step_in_block < extra)
