"""Advantages, importance weights, policy losses and the threshold network's loss: one function, one published formula.

Ratios, weights and advantages are float32; `stop_gradient` stands where the mathematics has it. All objectives are to be *maximised*.
Shapes: N rows, R reads of each of L positions (see `structs.Reads`).
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

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


def truncated_importance_weights(log_weight: jax.Array, cap: float) -> jax.Array:
    """w = stop_gradient(min(C, pihat_old(o_k) / pi_old(o_k | c, z_sigma[k]))) (DiFFPO, arXiv 2510.02212).

    It corrects the surrogate for the policy that really acted.

    Args:
      log_weight: any shape, float32: log pihat_old, of the surrogate before the update, less the log-probability that the sampler recorded.
      cap: C.
    """
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_weight, jnp.log(cap))))


def unit_importance_weights(log_weight: jax.Array, cap: float) -> jax.Array:
    """w = 1: the surrogate is taken for the policy (d1 and plain 2-MF). Arguments as `truncated_importance_weights`."""
    del cap
    return jnp.ones_like(log_weight)


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
    """Where `clipped_surrogate` has lost its gradient: bool, of the shape that both broadcast to."""
    ratio = jnp.exp(log_ratio)
    return ((ratio > 1.0 + clip_high) & (advantages > 0)) | ((ratio < 1.0 - clip_low) & (advantages < 0))


class Estimate(struct.PyTreeNode):
    """A batch's likelihoods as the policy objectives take them."""

    log_probs: jax.Array  # [N, R, L] float32, log p_theta of every read
    old_log_probs: jax.Array  # [N, R, L] float32, the same before the update
    importance: jax.Array  # [N, R, L] float32, importance weights w
    normalisation: jax.Array  # [N, L] float32, of a position in the mean over the batch: a value of `NORMALISATIONS`
    reads: jax.Array  # [N, R, L] float32, weight of a read in the estimate of its position's log-likelihood; 0 = not read

    @property
    def weights(self) -> jax.Array:
        """[N, R, L] float32, of a read in the mean over the batch."""
        return self.normalisation[:, None] * self.reads

    @property
    def share(self) -> jax.Array:
        """[N] float32, of a row in the mean over the batch."""
        return jnp.sum(self.normalisation, axis=1)

    def row_sum(self, values: jax.Array) -> jax.Array:
        """[N] from values [N, R, L]: each row's part of the mean over the batch."""
        return masked_sum(self.weights * values, self.weights > 0, axis=(1, 2))

    def row_mean(self, values: jax.Array) -> jax.Array:
        """[N] from values [N, R, L]: each row's mean over its positions."""
        return self.row_sum(values) / jnp.maximum(self.share, 1e-30)


def clipped_objective(estimate: Estimate, advantages: jax.Array, clip: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
    """Each read's own ratio: sum of w min(rho A, clip(rho) A) (GRPO, arXiv 2402.03300; d1; DiFFPO, arXiv 2510.02212).

    Arguments and results of all `OBJECTIVES`:

    Args:
      estimate: the likelihoods, finite.
      advantages: [N] float32.
      clip: (eps_low, eps_high).

    Returns:
      (J of each row, [N] float32, to be summed; log rho, which broadcasts to [N, R, L], 0 where there is no ratio).
    """
    log_ratio = jnp.where(estimate.weights > 0, estimate.log_probs - jax.lax.stop_gradient(estimate.old_log_probs), 0.0)
    rows = jnp.broadcast_to(advantages[:, None, None], log_ratio.shape)
    return estimate.row_sum(estimate.importance * clipped_surrogate(log_ratio, rows, *clip)), log_ratio


def log_likelihood_objective(estimate: Estimate, advantages: jax.Array, clip: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
    """w A log pihat: no ratio, no clip, no old policy (REINFORCE, RLOO; wd1, arXiv 2507.08838). Arguments as `clipped_objective`."""
    del clip
    return advantages * estimate.row_sum(estimate.importance * estimate.log_probs), jnp.zeros((1, 1, 1))


def sequence_objective(estimate: Estimate, advantages: jax.Array, clip: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
    """One clipped ratio a row, exp(1/|o| (log pihat_theta(o) - log pihat_old(o))) (ESPO, arXiv 2512.03759, with ELBOs for log pihat).

    A row's importance weight is the geometric mean of its positions'. Arguments as `clipped_objective`.
    """
    log_ratio = estimate.row_mean(estimate.log_probs - jax.lax.stop_gradient(estimate.old_log_probs))
    importance = jnp.exp(estimate.row_mean(jnp.log(estimate.importance)))
    return estimate.share * importance * clipped_surrogate(log_ratio, advantages, *clip), log_ratio[:, None, None]


SPG_BETA = 1.5  # of the upper bound
SPG_MIX = 0.5  # share of the upper bound in what stands for the log-likelihood of rows to be made less likely


def sandwiched_objective(estimate: Estimate, advantages: jax.Array, clip: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
    """A times a lower bound of log pi where A > 0; where A < 0 times a mix with an upper one (SPG, arXiv 2510.09541).

    Lower: the ELBO, sum_k sum_r weights log p. Upper: sum_k 1/beta log sum_r weights p^beta over the positions that are read, which by
    Jensen is never below it where a position's weights sum to 1. Arguments as `clipped_objective`; the importance weights of a
    position's reads are averaged.
    """
    del clip
    lower = estimate.row_sum(estimate.importance * estimate.log_probs)
    total = jnp.sum(estimate.reads, axis=1)
    importance = jnp.sum(estimate.reads * estimate.importance, axis=1) / jnp.maximum(total, 1e-30)
    moment = jax.nn.logsumexp(SPG_BETA * estimate.log_probs, b=jnp.where(total[:, None] > 0, estimate.reads, 1.0), axis=1)
    upper = masked_sum(estimate.normalisation * importance * moment / SPG_BETA, total > 0, axis=1)
    mixed = SPG_MIX * upper + (1.0 - SPG_MIX) * lower
    return advantages * jnp.where(advantages < 0, mixed, lower), jnp.zeros((1, 1, 1))


OBJECTIVES = {
    "clipped": clipped_objective,
    "log_likelihood": log_likelihood_objective,
    "sequence": sequence_objective,
    "sandwiched": sandwiched_objective,
}


def k1_kl(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
    """k1 estimator of KL(pi || ref): log pi - log ref, of samples of pi (Schulman 2020). Any shape; as a loss it has no mean gradient."""
    return log_probs - ref_log_probs


def k2_kl(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
    """k2: (log pi - log ref)^2 / 2; biased, but its gradient is that of KL(pi || ref) (Schulman 2020; ESPO, arXiv 2512.03759)."""
    return jnp.square(log_probs - ref_log_probs) / 2


def k3_kl(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
    """k3 estimator of KL(pi || ref): exp(d) - d - 1, d = log ref - log pi, of samples of pi (Schulman 2020); any shape, never negative."""
    d = ref_log_probs - log_probs
    return jnp.expm1(d) - d


KL_ESTIMATORS = {"k1": k1_kl, "k2": k2_kl, "k3": k3_kl}


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
    estimate: Estimate,
    ref_log_probs: jax.Array | None,
    advantages: jax.Array,
    *,
    objective: str,
    clip: tuple[float, float],
    kl_weight: float,
    kl_estimator: str = "k3",
) -> tuple[jax.Array, jax.Array]:
    """J_model = sum over rows of J(estimate, A) - beta KL (DiFFPO, arXiv 2510.02212), to be maximised.

    Args:
      estimate: N rows; what is not read (`weights` 0) need not be finite.
      ref_log_probs: [N, R, L] float32, log pihat_ref of the same reads; None without KL.
      advantages: [N] float32.
      objective: a key of `OBJECTIVES`.
      clip: (eps_low, eps_high).
      kl_weight: beta.
      kl_estimator: a key of `KL_ESTIMATORS`.

    Returns:
      (scalar float32, log rho as `OBJECTIVES` return it).
    """
    chex.assert_equal_shape([estimate.log_probs, estimate.old_log_probs, estimate.importance, estimate.reads])
    chex.assert_rank([estimate.log_probs, estimate.normalisation, advantages], [3, 2, 1])
    read = estimate.weights > 0
    # masked before, not after: what is not finite would come back through the gradient
    estimate = estimate.replace(
        log_probs=jnp.where(read, estimate.log_probs, 0.0),
        old_log_probs=jnp.where(read, estimate.old_log_probs, 0.0),
        importance=jnp.where(read, estimate.importance, 1.0),
    )
    rows, log_ratio = OBJECTIVES[objective](estimate, advantages, clip)
    value = jnp.sum(rows)
    if kl_weight:
        ref = jnp.where(read, jax.lax.stop_gradient(ref_log_probs), 0.0)
        value -= kl_weight * jnp.sum(estimate.row_sum(KL_ESTIMATORS[kl_estimator](estimate.log_probs, ref)))
    return value, log_ratio


def sampler_objective(
    log_prob: jax.Array, old_log_prob: jax.Array, advantages: jax.Array, entropy: jax.Array, *, clip: float, entropy_bonus: float
) -> jax.Array:
    """J_sampler per row = min(rho A, clip(rho) A) + bonus H, rho = q_phi(gamma | c) / q_old(gamma | c); all [N] float32 -> [N]."""
    chex.assert_equal_shape([log_prob, old_log_prob, advantages, entropy])
    return clipped_surrogate(log_prob - old_log_prob, advantages, clip, clip) + entropy_bonus * entropy


def effective_sample_size(total: jax.Array, total_of_squares: jax.Array, count: jax.Array) -> jax.Array:
    """(sum w)^2 / (n sum w^2), in (0, 1]: the share of the samples that the weights leave."""
    return jnp.square(total) / jnp.maximum(count * total_of_squares, 1e-30)
