"""Advantages, importance weights, policy losses and the threshold network's loss: one function, one published formula.

Ratios, weights and advantages are float32; `stop_gradient` stands where the mathematics has it. All losses are returned per position or per
row, to be reduced by the caller, and are to be *maximised*.
"""

import chex
import jax
import jax.numpy as jnp

from diffpo_jax.reductions import masked_sum


def grpo_advantages(rewards: jax.Array) -> jax.Array:
    """A = (r - mean) / (std + 1e-4) in each group (GRPO, arXiv 2402.03300): rewards [B, G] -> [B, G]. Equal rewards give exactly 0."""
    chex.assert_rank(rewards, 2)
    return mean_only_advantages(rewards) / (jnp.std(rewards, axis=1, keepdims=True) + 1e-4)


def mean_only_advantages(rewards: jax.Array) -> jax.Array:
    """A = r - mean of the group (Dr.GRPO, arXiv 2503.20783; d1, arXiv 2504.12216): rewards [B, G] -> [B, G].

    Equal rewards give exactly 0.
    """
    chex.assert_rank(rewards, 2)
    equal = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)  # rounding of the mean must not make a signal
    return jnp.where(equal, 0.0, rewards - jnp.mean(rewards, axis=1, keepdims=True))


def rloo_advantages(rewards: jax.Array) -> jax.Array:
    """A = r - mean of the others in the group (RLOO, arXiv 2402.14740): rewards [B, G], G at least 2 -> [B, G]."""
    chex.assert_rank(rewards, 2)
    group = rewards.shape[1]
    return mean_only_advantages(rewards) * (group / max(group - 1, 1))


def wd1_advantages(rewards: jax.Array) -> jax.Array:
    """A = G (softmax(r) - softmax(-r)) in each group: wd1's weights w+ - w- (arXiv 2507.08838), for the objective "log_likelihood".

    The weights do not change when a constant is added to the rewards, so that they are those of r - mean. rewards [B, G] -> [B, G].
    """
    chex.assert_rank(rewards, 2)
    return rewards.shape[1] * (jax.nn.softmax(rewards, axis=1) - jax.nn.softmax(-rewards, axis=1))


ADVANTAGES = {"grpo": grpo_advantages, "mean_only": mean_only_advantages, "rloo": rloo_advantages, "wd1": wd1_advantages}


def multiplicative_reward(rewards: jax.Array, nfe: jax.Array, max_nfe: int, penalty: float) -> jax.Array:
    """R = r (1 - lambda NFE / NFE_max) (DiFFPO, arXiv 2510.02212): a wrong answer earns nothing by being quick. All [N]."""
    return rewards * (1.0 - penalty * nfe / max_nfe)


def additive_reward(rewards: jax.Array, nfe: jax.Array, max_nfe: int, penalty: float) -> jax.Array:
    """R = r - lambda NFE / NFE_max. All [N]."""
    return rewards - penalty * nfe / max_nfe


REWARD_SHAPES = {"multiplicative": multiplicative_reward, "additive": additive_reward}


def truncated_importance_weights(old_log_probs: jax.Array, behaviour_log_probs: jax.Array, cap: float) -> jax.Array:
    """w_k = stop_gradient(min(C, pihat_old(o_k) / pi_old(o_k | c, z_sigma[k]))) (DiFFPO, arXiv 2510.02212).

    It corrects the surrogate for the policy that really acted.

    Args:
      old_log_probs: [N, L] float32, of the surrogate before the update.
      behaviour_log_probs: [N, L] float32, recorded by the sampler.
      cap: C.

    Returns:
      [N, L] float32.
    """
    chex.assert_equal_shape([old_log_probs, behaviour_log_probs])
    log_weight = jnp.minimum(old_log_probs - behaviour_log_probs, jnp.log(cap))
    return jax.lax.stop_gradient(jnp.exp(log_weight))


def unit_importance_weights(old_log_probs: jax.Array, behaviour_log_probs: jax.Array, cap: float) -> jax.Array:
    """w = 1: the surrogate is taken for the policy (d1 and plain 2-MF). Arguments as `truncated_importance_weights`."""
    del behaviour_log_probs, cap
    return jnp.ones_like(old_log_probs)


IMPORTANCE_WEIGHTS = {"truncated": truncated_importance_weights, "none": unit_importance_weights}


def clipped_surrogate(log_ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float) -> jax.Array:
    """min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) (PPO, arXiv 1707.06347; asymmetric: DAPO, arXiv 2503.14476).

    Args:
      log_ratio: any shape, log rho.
      advantages: the same shape.
      clip_low: eps_low.
      clip_high: eps_high.
    """
    chex.assert_equal_shape([log_ratio, advantages])
    ratio = jnp.exp(log_ratio)
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages)


def is_clipped(log_ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float) -> jax.Array:
    """Where `clipped_surrogate` has lost its gradient: bool, the same shape."""
    ratio = jnp.exp(log_ratio)
    return ((ratio > 1.0 + clip_high) & (advantages > 0)) | ((ratio < 1.0 - clip_low) & (advantages < 0))


def clipped_objective(log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float):
    """`clipped_surrogate` of rho = pihat_theta / stop_gradient(pihat_old). Any one shape."""
    return clipped_surrogate(log_probs - jax.lax.stop_gradient(old_log_probs), advantages, clip_low, clip_high)


def log_likelihood_objective(log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float):
    """A log pihat_theta: no ratio, no clip, no old policy (REINFORCE; wd1, arXiv 2507.08838). Any one shape."""
    del old_log_probs, clip_low, clip_high
    return advantages * log_probs


OBJECTIVES = {"clipped": clipped_objective, "log_likelihood": log_likelihood_objective}


def k3_kl(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
    """k3 estimator of KL(pi || ref): exp(d) - d - 1, d = log ref - log pi, of samples of pi (Schulman 2020); any shape, never negative."""
    d = ref_log_probs - log_probs
    return jnp.expm1(d) - d


def row_weights(mask: jax.Array) -> jax.Array:
    """1 / (|o_i| N): mean over rows of each row's mean (GRPO). mask [N, L] bool -> [N, L] float32."""
    return mask / (jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) * mask.shape[0])


def token_mean_weights(mask: jax.Array) -> jax.Array:
    """1 / sum_i |o_i|: all tokens alike (DAPO, d1). mask [N, L] bool -> [N, L] float32."""
    return mask / jnp.maximum(jnp.sum(mask), 1)


def constant_weights(mask: jax.Array) -> jax.Array:
    """1 / (L N): no length bias (Dr.GRPO). mask [N, L] bool -> [N, L] float32."""
    return mask / jnp.asarray(mask.size, jnp.float32)


NORMALISATIONS = {"row": row_weights, "token_mean": token_mean_weights, "constant": constant_weights}


def model_objective(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    behaviour_log_probs: jax.Array,
    ref_log_probs: jax.Array | None,
    advantages: jax.Array,
    weights: jax.Array,
    *,
    objective: str,
    importance: str,
    cap: float,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
) -> jax.Array:
    """J_model = sum_k weights_k (w_k min(rho_k A, clip(rho_k) A) - beta KL_k) (DiFFPO, arXiv 2510.02212), to be maximised.

    Args:
      log_probs: [N, L] float32, log pihat_theta.
      old_log_probs: [N, L], log pihat_old on the same cuts.
      behaviour_log_probs: [N, L], recorded by the sampler.
      ref_log_probs: [N, L], log pihat_ref on the same cuts; None without KL.
      advantages: [N] float32.
      weights: [N, L] float32, normalisation times mask times window weights; 0 at positions that do not count.
      objective: a key of `OBJECTIVES`, in place of min(...) above.
      importance: a key of `IMPORTANCE_WEIGHTS`.
      cap: C.
      clip_low: eps_low.
      clip_high: eps_high.
      kl_weight: beta.

    Returns:
      scalar float32.
    """
    chex.assert_equal_shape([log_probs, old_log_probs, behaviour_log_probs, weights])
    counted = weights > 0
    importance_weights = IMPORTANCE_WEIGHTS[importance](old_log_probs, behaviour_log_probs, cap)
    # masked before, not after: what is not finite would come back through the gradient
    log_probs, old_log_probs = (jnp.where(counted, x, 0.0) for x in (log_probs, old_log_probs))
    rows = jnp.broadcast_to(advantages[:, None], log_probs.shape)
    per_token = importance_weights * OBJECTIVES[objective](log_probs, old_log_probs, rows, clip_low, clip_high)
    if kl_weight:
        per_token -= kl_weight * k3_kl(log_probs, jnp.where(counted, jax.lax.stop_gradient(ref_log_probs), 0.0))
    return masked_sum(weights * per_token, counted)


def sampler_objective(
    log_prob: jax.Array, old_log_prob: jax.Array, advantages: jax.Array, entropy: jax.Array, *, clip: float, entropy_bonus: float
) -> jax.Array:
    """J_sampler per row = min(rho A, clip(rho) A) + bonus H, rho = q_phi(gamma | c) / q_old(gamma | c); all [N] float32 -> [N]."""
    chex.assert_equal_shape([log_prob, old_log_prob, advantages, entropy])
    return clipped_surrogate(log_prob - old_log_prob, advantages, clip, clip) + entropy_bonus * entropy


def effective_sample_size(total: jax.Array, total_of_squares: jax.Array, count: jax.Array) -> jax.Array:
    """(sum w)^2 / (n sum w^2), in (0, 1]: the share of the samples that the weights leave."""
    return jnp.square(total) / jnp.maximum(count * total_of_squares, 1e-30)
