"""The base model: masked supervised fine-tuning on demonstrations (LLaDA, arXiv 2502.09992)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from diffpo_jax import sharding
from diffpo_jax.likelihood import token_log_probs
from diffpo_jax.models.transformer import Policy
from diffpo_jax.structs import Prompts


class SftState(struct.PyTreeNode):
    """What supervised training carries from update to update."""

    step: jax.Array  # [] int32
    params: Any
    opt_state: Any


def mask_tokens(key: jax.Array, rows: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Masks a row's k positions, k stratified over 1 .. L, chosen uniformly: (masked [N, L] bool, t = k / L [N] float32).

    The mean over masked positions times 1/t has the expectation of the continuous-time bound at lower variance (LLaDA, equation 6).
    """
    key_count, key_order, key_offset = jax.random.split(key, 3)
    level = (jax.random.permutation(key_count, rows) + jax.random.uniform(key_offset)) / rows  # the offset makes every k as likely
    count = jnp.minimum(jnp.floor(level * length) + 1, length)  # the sum can round up to `rows`
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key_order, (rows, length)), axis=1), axis=1)
    return rank < count[:, None], count / length


def masked_cross_entropy(policy: Policy, params: Any, prompts: Prompts, response: jax.Array, key: jax.Array) -> jax.Array:
    """The negative evidence bound a token, nats: E_t [ 1/(t L) sum over masked k of -log p(o_k | c, z_t) ].

    Args:
      policy: the denoiser.
      params: its parameters.
      prompts: N rows.
      response: [N, L] int32, padded with EOS, which is learned as a token.
      key: a typed PRNG key.
    """
    masked, t = mask_tokens(key, *response.shape)
    latent = jnp.where(masked, policy.config.mask_id, response)
    hidden = policy.hidden(params, *prompts.with_response(latent))[:, prompts.tokens.shape[1] :]
    log_probs, _ = token_log_probs(policy, params, hidden, response)
    return -jnp.mean(jnp.sum(log_probs * masked, axis=1) / (t * response.shape[1]))


def make_optimiser(config: Any) -> optax.GradientTransformation:
    """AdamW with warm-up and a cosine to 0, clipped at global norm 1."""
    sft = config.sft
    warmup = min(sft.warmup_steps, sft.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, sft.learning_rate, warmup, sft.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=sft.weight_decay))


def make_sft_update(
    policy: Policy, config: Any, root: jax.Array, mesh: Mesh | None = None
) -> Callable[[SftState, Prompts, jax.Array], tuple[SftState, dict]]:
    """`update(state, prompts, response)`: one jitted, donated step with the noise of fold_in(root, step), laid out over `mesh`."""
    optimiser = make_optimiser(config)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, prompts, response):
        key = jax.random.fold_in(root, state.step)
        loss, grads = jax.value_and_grad(masked_cross_entropy, argnums=1)(policy, state.params, prompts, response, key)
        grads = sharding.lay_out_params(mesh, grads)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        new = SftState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        return sharding.lay_out_params(mesh, new), {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return update
