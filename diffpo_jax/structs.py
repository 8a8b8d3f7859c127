"""The values that cross a boundary: Prompts -> Trajectory -> ScoredGroup -> TrainState.

Shapes: N rows (B prompts x G rollouts), P prompt length, L response length, D width, m latents a likelihood passes through the denoiser,
R times it reads a position, U updates per rollout.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class Prompts(struct.PyTreeNode):
    """Left-padded prompts, one a row."""

    tokens: jax.Array  # [N, P] int32
    mask: jax.Array  # [N, P] bool, True = a real token

    def with_response(self, response: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens and attention mask [N, P + L] of prompts and responses [N, L], all of which is attended: what the denoiser takes."""
        attend = jnp.concatenate([self.mask, jnp.ones(response.shape, bool)], axis=1)
        return jnp.concatenate([self.tokens, response], axis=1), attend


class ThresholdDraw(struct.PyTreeNode):
    """What the threshold network chose for each row, in the space where its density is taken."""

    gamma: jax.Array  # [N] float32, the inference threshold
    action: jax.Array  # [N] float32: u of the normal distribution, or the index of the grid point
    log_prob: jax.Array  # [N] float32, log q_old(action | c)
    features: jax.Array  # [N, D] float32, the pooled prompt representation it saw


class Trajectory(struct.PyTreeNode):
    """One denoised response a row. There is no remasking, so (tokens, unmask_step) rebuilds every latent."""

    prompts: Prompts
    tokens: jax.Array  # [N, L] int32, o
    unmask_step: jax.Array  # [N, L] int32, sigma: the denoising step at which the position was unmasked, 0 .. nfe - 1
    log_prob: jax.Array  # [N, L] float32, log pi_old(o_k | c, z_sigma[k]) at the sampling temperature; 0 where EOS was filled in
    entropy: jax.Array  # [N, L] float32, nats, of the temperature-1 distribution the token was drawn from; 0 where EOS was filled in
    nfe: jax.Array  # [N] int32, T_i: denoiser calls of the row
    draw: ThresholdDraw | None = None  # None when the threshold was given
    whole_calls: jax.Array | None = None  # [N] int32, how many of them ran over the whole row: all, but with a cache
    first_step: jax.Array | None = None  # [N] int32, step of the sampler's loop at which the row had its first call
    last_step: jax.Array | None = None  # [N] int32, its last


class Reads(struct.PyTreeNode):
    """What a likelihood estimate reads: sum_k log pi(o_k) ~ sum_{r,k} weights[r, k] log p(o_k | c, z_r,k)."""

    latents: jax.Array  # [N, m, L] int32, z: responses with masked positions
    source: jax.Array | None  # [N, L] int32, the one latent at which a position is read, R = 1; None: at each of them, R = m
    weights: jax.Array  # [N, R, L] float32; 0 = not read


class ScoredGroup(struct.PyTreeNode):
    """A rollout with all that the update needs. Rows of one prompt lie together."""

    trajectory: Trajectory
    advantages: jax.Array  # [N] float32, of the model
    sampler_advantages: jax.Array  # [N] float32, of the threshold network
    reads: Reads  # [U, ...], those of each update
    old_log_probs: jax.Array | None  # [U, N, R, L] float32, log pihat_old of those reads; None when U = 1, where it is the policy itself
    ref_log_probs: jax.Array | None  # [U, N, R, L] float32, log pihat_ref of those reads; None without KL
    seen_prompts: jax.Array | None = None  # [U, N, P] int32, prompts with masked tokens, as the likelihoods see them; None = whole
    elbo_reads: Reads | None = None  # [U, ...], of the ELBO regulariser; None without it
    right: jax.Array | None = None  # [N] bool, rollouts that the ELBO regulariser counts; None without it


class TrainState(struct.PyTreeNode):
    """All that training carries from one iteration to the next; keys are folded from (root, step)."""

    step: jax.Array  # [] int32, updates tried; U an iteration
    params: Any  # what is trained of the denoiser: all of it, or adapters (see diffpo_jax.models.lora)
    threshold_params: Any  # the threshold network's
    opt_state: Any
    threshold_opt_state: Any
    bad_updates: jax.Array  # [] int32, skipped updates (non-finite loss or gradient) in a row
    total_bad_updates: jax.Array  # [] int32, since the start
