"""Likelihoods of a trajectory: latents rebuilt from (tokens, unmask_step), m-times mean-field surrogates, the exact one, windows.

With cut steps 0 = tau_0 < ... < tau_{m-1} and s(k) = max{tau_j <= sigma[k]} the surrogate is (DiFFPO, arXiv 2510.02212)

    log pihat(o_k | c) = log p(o_k | c, z_{s(k)})

which is mean-field (d1, arXiv 2504.12216) for m = 1, DiFFPO's two-times mean-field for m = 2, and the true conditional likelihood of the
trajectory for m = T. A cut of `UNUSED` stands for no cut (a row may have fewer steps than m).
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from diffpo_jax.models.transformer import Dropout, Policy
from diffpo_jax.reductions import map_positions, pick
from diffpo_jax.structs import Prompts, Trajectory

UNUSED = jnp.iinfo(jnp.int32).max


def latents(trajectory: Trajectory, step: jax.Array, mask_id: int) -> jax.Array:
    """z_s [N, L] int32 before step s [N] of each row: o where sigma < s, else MASK."""
    return jnp.where(trajectory.unmask_step < step[:, None], trajectory.tokens, mask_id)


def draw_cuts(key: jax.Array, nfe: jax.Array, num_cuts: int, max_steps: int, row_ids: jax.Array | None = None) -> jax.Array:
    """Cut steps: 0 and num_cuts - 1 more, uniform without replacement from {1 .. T_i - 1}, ascending.

    Args:
      key: a typed PRNG key; row i draws with fold_in(key, row_ids[i]).
      nfe: [N] int32, T_i.
      num_cuts: m.
      max_steps: upper bound of T_i.
      row_ids: [N] int32; 0 .. N - 1 by default.

    Returns:
      [N, m] int32; UNUSED where T_i < m.
    """
    chex.assert_rank(nfe, 1)
    row_ids = jnp.arange(nfe.shape[0]) if row_ids is None else row_ids
    steps = jnp.arange(1, max(max_steps, num_cuts))

    def row(row_id, row_nfe):
        order = jax.random.uniform(jax.random.fold_in(key, row_id), steps.shape)
        first = jnp.argsort(jnp.where(steps < row_nfe, order, jnp.inf))[: num_cuts - 1]
        return jnp.sort(jnp.where(steps[first] < row_nfe, steps[first], UNUSED))

    drawn = jax.vmap(row)(row_ids, nfe)
    return jnp.concatenate([jnp.zeros((nfe.shape[0], 1), jnp.int32), drawn.astype(jnp.int32)], axis=1)


def all_cuts(nfe: jax.Array, max_steps: int) -> jax.Array:
    """Every step a cut, m = T_i: the exact likelihood. nfe [N] -> [N, max_steps] int32."""
    steps = jnp.arange(max_steps, dtype=jnp.int32)
    return jnp.where(steps < nfe[:, None], steps, UNUSED)


def mask_prompts(key: jax.Array, prompts: Prompts, rate: float, mask_id: int) -> jax.Array:
    """Prompt tokens [N, P] int32, each masked with probability `rate` (d1, arXiv 2504.12216); row i draws with fold_in(key, i)."""
    rows, length = prompts.tokens.shape
    noise = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (length,)))(jnp.arange(rows))
    return jnp.where((noise < rate) & prompts.mask, mask_id, prompts.tokens)


def surrogate_hidden(
    policy: Policy, params: Any, trajectory: Trajectory, cuts: jax.Array, dropout: Dropout | None = None
) -> jax.Array:
    """Hidden states [N, L, D] of the response, each position's taken from the forward pass of its own cut.

    The m latents of a row pass through the trunk beside each other: a layer that is split over devices is gathered once for all of them.
    (As a loop over cuts, whatever does not depend on the cut would be kept for the backward pass: every gathered layer.) Selecting hidden
    states before the head makes the head's cost independent of m.
    """
    chex.assert_rank(cuts, 2)
    sigma = trajectory.unmask_step
    (rows, length), num_cuts = sigma.shape, cuts.shape[1]
    z = jax.vmap(lambda cut: latents(trajectory, cut, policy.config.mask_id), in_axes=1, out_axes=1)(cuts)  # [N, m, L]
    beside = functools.partial(jnp.repeat, repeats=num_cuts, axis=0)
    tokens, attend = jax.tree.map(beside, trajectory.prompts).with_response(z.reshape(-1, length))
    dropout = dropout and dropout.replace(keys=beside(dropout.keys))
    hidden = policy.hidden(params, tokens, attend, dropout)[:, -length:].reshape(rows, num_cuts, length, -1)
    own = jnp.sum(cuts[:, :, None] <= sigma[:, None, :], axis=1) - 1  # [N, L]: cuts ascend, the last one at or before sigma
    selected = sum(jnp.where((own == j)[..., None], hidden[:, j], 0) for j in range(num_cuts))
    return policy.layout(selected, "rows", None, None)


def token_log_probs(
    policy: Policy, params: Any, hidden: jax.Array, tokens: jax.Array, *, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of tokens [N, L] at hidden states [N, L, D], and the entropies there at the same temperature, both [N, L] float32.

    The head runs on `model.head_chunk` positions at a time, recomputed in the backward pass: [N, chunk, V] float32 is the most ever held.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def read(hidden, tokens):
        log_probs = jax.nn.log_softmax(policy.head(params, hidden) / temperature)
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return pick(log_probs, tokens), entropy

    return map_positions(read, policy.config.head_chunk, hidden, tokens)


def surrogate_log_probs(
    policy: Policy, params: Any, trajectory: Trajectory, cuts: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """log pihat(o_k | c), the m-times mean-field surrogate.

    Args:
      policy: the denoiser.
      params: its parameters.
      trajectory: N rows.
      cuts: [N, m] int32, ascending, from `draw_cuts` or `all_cuts`.
      temperature: the distributions are softmax(logits / temperature).

    Returns:
      [N, L] float32.
    """
    hidden = surrogate_hidden(policy, params, trajectory, cuts)
    return token_log_probs(policy, params, hidden, trajectory.tokens, temperature=temperature)[0]


def window_weights(unmask_step: jax.Array, nfe: jax.Array, cuts: jax.Array, window: int) -> jax.Array:
    """Weights [N, L] float32 that keep positions unmasked less than `window` steps after their cut, by inverse probability of being kept.

    Position k is kept iff one of the w steps up to sigma[k] is a cut. Step 0 always is; the other m - 1 cuts are drawn without replacement
    from T - 1 steps (m at least 2), so that P(kept) = 1 for sigma < w and 1 - C(T-1-w, m-1) / C(T-1, m-1) otherwise. The weighted sum
    over positions is unbiased in the choice of cuts. window = 1 is the exact gradient from m sampled steps (AGRPO, arXiv 2510.04019);
    window = 0 keeps all.

    Args:
      unmask_step: [N, L] int32, sigma.
      nfe: [N] int32, T.
      cuts: [N, m] int32.
      window: w, denoising steps; 0 = infinite.
    """
    chex.assert_rank([unmask_step, cuts], 2)
    if window == 0:
        return jnp.ones(unmask_step.shape)
    age = unmask_step[..., None] - jnp.minimum(cuts, UNUSED)[:, None, :]
    kept = jnp.any((age >= 0) & (age < window), axis=-1)
    others = (nfe - 1)[:, None].astype(jnp.float32)
    # P(no cut among w given steps) = prod_i (T-1-w-i) / (T-1-i): zero once the remaining cuts cannot avoid the window.
    missed = jnp.ones(unmask_step.shape)
    for i in range(cuts.shape[1] - 1):
        missed *= jnp.maximum(others - window - i, 0.0) / jnp.maximum(others - i, 1.0)
    probability = jnp.where(unmask_step < window, 1.0, 1.0 - missed)
    return jnp.where(kept, 1.0 / jnp.maximum(probability, 1e-9), 0.0)
