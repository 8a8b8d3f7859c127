"""Likelihoods of a response, estimated with m forward passes a row: which latents are read, and what each read counts (`Reads`).

Two families. *Of the trajectory*: with cut steps 0 = tau_0 < ... < tau_{m-1} and s(k) = max{tau_j <= sigma[k]} the surrogate is
(DiFFPO, arXiv 2510.02212)

    log pihat(o_k | c) = log p(o_k | c, z_{s(k)})

which is mean-field (d1, arXiv 2504.12216) for m = 1, DiFFPO's two-times mean-field for m = 2, and the true conditional likelihood of the
trajectory for m = T; windows of cuts go from it to exact gradients. A cut of `UNUSED` stands for no cut (a row may have fewer steps).

*Of the response alone*, by masks drawn at random: the evidence lower bound of a masked diffusion model (LLaDA, arXiv 2502.09992, eq. 6)

    ELBO(o | c) = 1/L sum_{n=1..L} E_{n positions masked} [ L/n sum_{masked k} log p(o_k | c, z) ]

as `elbo` (n drawn), `quadrature` (n at fixed nodes), `coupled` (n drawn, complementary masks).
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from diffpo_jax.models.transformer import Dropout, Policy
from diffpo_jax.reductions import map_positions, pick
from diffpo_jax.structs import Prompts, Reads, Trajectory

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
    age = unmask_step[..., None] - cuts[:, None, :]  # of an unused cut negative
    kept = jnp.any((age >= 0) & (age < window), axis=-1)
    others = (nfe - 1)[:, None].astype(jnp.float32)
    # P(no cut among w given steps) = prod_i (T-1-w-i) / (T-1-i): zero once the remaining cuts cannot avoid the window.
    missed = jnp.ones(unmask_step.shape)
    for i in range(cuts.shape[1] - 1):
        missed *= jnp.maximum(others - window - i, 0.0) / jnp.maximum(others - i, 1.0)
    probability = jnp.where(unmask_step < window, 1.0, 1.0 - missed)
    return jnp.where(kept, 1.0 / jnp.maximum(probability, 1e-9), 0.0)


def mask_prompts(key: jax.Array, prompts: Prompts, rate: float, mask_id: int) -> jax.Array:
    """Prompt tokens [N, P] int32, each masked with probability `rate` (d1, arXiv 2504.12216); row i draws with fold_in(key, i)."""
    rows, length = prompts.tokens.shape
    noise = _by_row(key, rows, lambda key: jax.random.uniform(key, (length,)))
    return jnp.where((noise < rate) & prompts.mask, mask_id, prompts.tokens)


def _by_row(key: jax.Array, rows: int, draw: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """draw(fold_in(key, row)) of each row: a row's numbers do not depend on its neighbours."""
    return jax.vmap(lambda row: draw(jax.random.fold_in(key, row)))(jnp.arange(rows))


# --- estimators ---


def cut_reads(trajectory: Trajectory, cuts: jax.Array, mask_id: int, window: int = 0) -> Reads:
    """Each position at the latent of its own cut, the last at or before its step: m-times mean-field; with a window `window_weights`.

    Args:
      trajectory: N rows.
      cuts: [N, m] int32, ascending, from `draw_cuts` or `all_cuts`.
      mask_id: id of MASK.
      window: w, denoising steps; 0 = infinite.
    """
    chex.assert_rank(cuts, 2)
    sigma = trajectory.unmask_step
    z = jax.vmap(lambda cut: latents(trajectory, cut, mask_id), in_axes=1, out_axes=1)(cuts)
    source = jnp.sum(cuts[:, :, None] <= sigma[:, None, :], axis=1) - 1
    return Reads(z, source, window_weights(sigma, trajectory.nfe, cuts, window)[:, None])


def _trajectory_reads(key: jax.Array, trajectory: Trajectory, settings: Any, mask_id: int) -> Reads:
    """`cut_reads` of cuts drawn at random."""
    cuts = draw_cuts(key, trajectory.nfe, settings.num_latents, trajectory.tokens.shape[1])
    return cut_reads(trajectory, cuts, mask_id, settings.window)


def _masked_reads(trajectory: Trajectory, masked: jax.Array, weights: jax.Array, mask_id: int) -> Reads:
    """The response with `masked` [N, m, L] positions masked, each latent read where it is, at `weights` [N, m] a position."""
    z = jnp.where(masked, mask_id, trajectory.tokens[:, None])
    return Reads(z, None, masked * weights[..., None])


def _draw_masks(key: jax.Array, counts: jax.Array, length: int) -> jax.Array:
    """Masks [N, m, L] bool of exactly counts [N, m] positions, every choice of them as likely."""
    rows, num = counts.shape
    rank = jnp.argsort(jnp.argsort(_by_row(key, rows, lambda key: jax.random.uniform(key, (num, length))), axis=-1), axis=-1)
    return rank < counts[..., None]


def elbo_reads(key: jax.Array, trajectory: Trajectory, settings: Any, mask_id: int) -> Reads:
    """Monte Carlo of the ELBO (LLaDA, eq. 6): n uniform in 1 .. L, n positions masked, weight L/n; the mean of m draws. Unbiased."""
    (rows, length), num = trajectory.tokens.shape, settings.num_latents
    key_count, key_mask = jax.random.split(key)
    counts = _by_row(key_count, rows, lambda key: jax.random.randint(key, (num,), 1, length + 1))
    return _masked_reads(trajectory, _draw_masks(key_mask, counts, length), length / (counts * num), mask_id)


def quadrature_reads(key: jax.Array, trajectory: Trajectory, settings: Any, mask_id: int) -> Reads:
    """The ELBO with its integral over t = n/L by Gauss-Legendre quadrature at m nodes, masks alone random (GDPO, arXiv 2510.08554).

    n is a node times L, rounded at random to one of its two neighbours. Biased by the quadrature's error; the variance of t is gone.
    """
    (rows, length), num = trajectory.tokens.shape, settings.num_latents
    key_count, key_mask = jax.random.split(key)
    nodes, shares = np.polynomial.legendre.leggauss(num)
    rounding = _by_row(key_count, rows, lambda key: jax.random.uniform(key, (num,)))
    counts = jnp.clip(jnp.floor((nodes + 1) / 2 * length + rounding), 1, length)
    return _masked_reads(trajectory, _draw_masks(key_mask, counts, length), shares / 2 * length / counts, mask_id)


def coupled_reads(key: jax.Array, trajectory: Trajectory, settings: Any, mask_id: int) -> Reads:
    """The ELBO by m/2 pairs of complementary masks, so that a pair reads each position once (coupled-GRPO, arXiv 2506.20639).

    n is uniform in 1 .. L; the pair counts half each, the first alone where it masks all. Unbiased. (Coupled-GRPO adds the latent that is
    masked whole to its pairs, at equal weight, and is then biased towards it; here it comes as often as n = L.)
    """
    (rows, length), pairs = trajectory.tokens.shape, settings.num_latents // 2
    key_count, key_mask = jax.random.split(key)
    counts = _by_row(key_count, rows, lambda key: jax.random.randint(key, (pairs,), 1, length + 1))
    masked, rest = _draw_masks(key_mask, counts, length), length - counts
    first = length / counts * jnp.where(rest, 0.5, 1.0) / pairs
    second = length / jnp.maximum(rest, 1) * 0.5 / pairs
    return _masked_reads(trajectory, jnp.concatenate([masked, ~masked], axis=1), jnp.concatenate([first, second], axis=1), mask_id)


ESTIMATORS = {"cuts": _trajectory_reads, "elbo": elbo_reads, "quadrature": quadrature_reads, "coupled": coupled_reads}


def draw_reads(key: jax.Array, trajectory: Trajectory, settings: Any, mask_id: int) -> Reads:
    """The reads of `settings.estimator`, a key of `ESTIMATORS`; `settings` as `config.likelihood`."""
    return ESTIMATORS[settings.estimator](key, trajectory, settings, mask_id)


# --- reading ---


def read_hidden(policy: Policy, params: Any, prompts: Prompts, reads: Reads, dropout: Dropout | None = None) -> jax.Array:
    """Hidden states [N, R, L, D] of the response at the latents that are read.

    The m latents of a row pass through the trunk beside each other: a layer that is split over devices is gathered once for all of them.
    (As a loop over latents, whatever does not depend on the latent would be kept for the backward pass: every gathered layer.) Where a
    position is read at one latent its hidden state is selected before the head, whose cost is then independent of m.
    """
    rows, num, length = reads.latents.shape
    beside = functools.partial(jnp.repeat, repeats=num, axis=0)
    tokens, attend = jax.tree.map(beside, prompts).with_response(reads.latents.reshape(-1, length))
    dropout = dropout and dropout.replace(keys=beside(dropout.keys))
    hidden = policy.hidden(params, tokens, attend, dropout)[:, -length:].reshape(rows, num, length, -1)
    if reads.source is not None:
        hidden = sum(jnp.where((reads.source == j)[..., None], hidden[:, j], 0) for j in range(num))[:, None]
    return policy.layout(hidden, "rows", None, None, None)


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


def read_log_probs(
    policy: Policy, params: Any, trajectory: Trajectory, reads: Reads, *, temperature: float = 1.0, dropout: Dropout | None = None
) -> tuple[jax.Array, jax.Array]:
    """(log p(o_k | c, z), entropy), each [N, R, L] float32, of the response at every read; see `token_log_probs`."""
    hidden = read_hidden(policy, params, trajectory.prompts, reads, dropout)
    rows, num, length, width = hidden.shape
    read = token_log_probs(policy, params, hidden.reshape(rows, -1, width), jnp.tile(trajectory.tokens, (1, num)), temperature=temperature)
    return tuple(x.reshape(rows, num, length) for x in read)


def surrogate_log_probs(policy: Policy, params: Any, trajectory: Trajectory, cuts: jax.Array, *, temperature: float = 1.0) -> jax.Array:
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
    reads = cut_reads(trajectory, cuts, policy.config.mask_id)
    return read_log_probs(policy, params, trajectory, reads, temperature=temperature)[0][:, 0]
