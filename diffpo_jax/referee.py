"""What a likelihood estimator makes of a batch, beside what is exact: policy gradients, distributions, importance weights.

The gradient of an estimator (`ESTIMATORS_STUDIED`) is that of the policy objective at theta = theta_old, where rho = 1; its referee

    grad of the mean over rows of 1/|o_i| sum_k m_k A log p(o_k | c, z_sigma[k]).

An estimator draws noise of its own (cuts, masks): what is said of its mean gradient is freed of the noise of a few draws (`products`).
Intervals are 95% by the jackknife over batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy import stats

from diffpo_jax import objectives
from diffpo_jax.likelihood import all_cuts, cut_reads, draw_reads, mask_prompts, read_hidden, read_log_probs, surrogate_log_probs
from diffpo_jax.models.transformer import Policy
from diffpo_jax.reductions import largest_divisor, map_positions, masked_sum, pick
from diffpo_jax.structs import Prompts, Reads, Trajectory

CAPS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, float("inf"))  # C of the importance weights
BINS = 5  # of the relative position of a step in its trajectory, sigma / T


@dataclasses.dataclass(frozen=True)
class Studied:
    """An estimator of the policy gradient; the first fields are those of `config.likelihood`."""

    name: str
    num_latents: int  # m, denoiser calls a row
    estimator: str = "cuts"  # a key of `likelihood.ESTIMATORS`, or "exact": every step is read, num_latents at least the longest T
    window: int = 0
    prompt_masking: float = 0.0
    importance: str = "none"  # a key of `objectives.IMPORTANCE_WEIGHTS`
    objective: str = "clipped"  # a key of `objectives.OBJECTIVES`

    @property
    def plain(self) -> bool:
        """Whether it is a likelihood alone: others read the same, and weigh it otherwise."""
        return self.importance == "none" and self.objective == "clipped"


CALLS = (1, 2, 4, 8)
ESTIMATORS_STUDIED = (
    *(Studied("cuts", m) for m in CALLS),
    Studied("cuts, prompts masked", 1, prompt_masking=0.15),
    *(Studied("cuts, weights", m, importance="truncated") for m in CALLS),
    *(Studied("window 1", m, window=1) for m in CALLS[1:]),
    *(Studied("window 2", m, window=2) for m in CALLS[1:]),
    *(Studied("elbo", m, "elbo") for m in CALLS),
    *(Studied("quadrature", m, "quadrature") for m in CALLS),
    *(Studied("coupled", m, "coupled") for m in CALLS[1:]),
    *(Studied("elbo, sandwiched", m, "elbo", objective="sandwiched") for m in CALLS[1:]),
)


# --- gradients ---


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(policy: Policy, studied: Studied, trajectory: Trajectory, key: jax.Array) -> tuple[Prompts, Reads]:
    """The prompts as the estimator sees them, and what it reads of the trajectory."""
    mask_id, prompts = policy.config.mask_id, trajectory.prompts
    if studied.estimator == "exact":
        return prompts, cut_reads(trajectory, all_cuts(trajectory.nfe, studied.num_latents), mask_id)
    if studied.prompt_masking:
        key, key_prompts = jax.random.split(key)
        prompts = prompts.replace(tokens=mask_prompts(key_prompts, prompts, studied.prompt_masking, mask_id))
    return prompts, draw_reads(key, trajectory, studied, mask_id)


def _flat_gradient(objective: Callable[..., jax.Array], params: Any, rows: Any, microbatch: int) -> jax.Array:
    """The gradient of objective(params, rows), a sum over rows, [parameters] float32; up to `microbatch` rows at a time, 0 = all."""
    size = largest_divisor(jax.tree.leaves(rows)[0].shape[0], microbatch)
    return ravel_pytree(optax.microbatch(lambda rows: jax.grad(objective)(params, rows), argnums=0, microbatch_size=size)(rows))[0]


def make_gradient(policy: Policy, config: Any) -> Callable[..., jax.Array]:
    """`gradient(params, trajectory, prompts, reads, advantages, mask, *, importance, objective)`: a policy gradient without KL. Jitted.

    It is that of `objectives.model_objective`, [parameters] float32. The program is one for all estimators of so many reads: what differs
    between them is drawn before (`draw`).

    prompts: as the estimator sees them; advantages: [N] float32; mask: [N, L] bool, positions that count; importance, objective: as in
    `Studied`.
    """
    rl, clip = config.rl, (config.rl.clip_low, config.rl.clip_high)

    @functools.partial(jax.jit, static_argnames=("importance", "objective"))
    def gradient(params, trajectory, prompts, reads, advantages, mask, *, importance, objective):
        def value(params, rows):
            trajectory, reads, advantages, normalisation = rows
            log_probs, _ = read_log_probs(policy, params, trajectory, reads, temperature=config.sampler.temperature)
            old = jax.lax.stop_gradient(log_probs)
            weights = objectives.IMPORTANCE_WEIGHTS[importance](old - trajectory.log_prob[:, None], rl.importance_cap)
            estimate = objectives.Estimate(log_probs, old, weights, normalisation, reads.weights)
            return objectives.model_objective(estimate, None, advantages, objective=objective, clip=clip, kl_weight=0.0)[0]

        rows = trajectory.replace(prompts=prompts), reads, advantages, objectives.NORMALISATIONS[rl.normalisation](mask)
        return _flat_gradient(value, params, rows, rl.microbatch)

    return gradient


def make_referee(policy: Policy, config: Any, steps: int) -> Callable[..., jax.Array]:
    """`referee(params, trajectory, advantages, mask)`: the exact policy gradient, [parameters] float32; steps: at least every T. Jitted."""

    def objective(params, rows):
        trajectory, advantages, weights = rows
        cuts = all_cuts(trajectory.nfe, steps)
        log_probs = surrogate_log_probs(policy, params, trajectory, cuts, temperature=config.sampler.temperature)
        return masked_sum(weights * advantages[:, None] * log_probs, weights > 0)

    @jax.jit
    def referee(params, trajectory, advantages, mask):
        rows = trajectory, advantages, objectives.NORMALISATIONS[config.rl.normalisation](mask)
        return _flat_gradient(objective, params, rows, config.rl.microbatch)

    return referee


class Products(NamedTuple):
    """Inner products of the gradients of B batches, each unbiased given the rows: m_b an estimator's mean gradient, e_b the exact one."""

    estimate: np.ndarray  # [B, B], <m_b, m_b'>
    cross: np.ndarray  # [B, B], <m_b, e_b'>
    exact: np.ndarray  # [B, B], <e_b, e_b'>
    noise: np.ndarray  # [B], trace of the covariance of one draw given the rows


def products(gradients: np.ndarray, exact: np.ndarray) -> Products:
    """Products of independent draws alone: <m_b, m_b> is the mean of <g_bd, g_bd'> over d other than d', a U-statistic.

    Args:
      gradients: [B, D, parameters], D at least 2 draws of the estimator's noise on the rows of each batch.
      exact: [B, parameters], of the same rows.
    """
    gradients, exact = np.asarray(gradients, np.float64), np.asarray(exact, np.float64)
    draws, means = gradients.shape[1], gradients.mean(1)
    noise = np.sum(np.square(gradients - means[:, None]), axis=(1, 2)) / (draws - 1)
    return Products(means @ means.T - np.diag(noise / draws), means @ exact.T, exact @ exact.T, noise)


def gradient_statistics(found: Products, batches: np.ndarray) -> dict[str, float]:
    """How an estimator's gradient stands to the exact one, on some of the batches, all different.

    Args:
      found: of B batches.
      batches: [n] int, those taken; at least 2.

    Returns:
      cosine, norm: of the mean gradient over the batches to the exact mean gradient on the same rows; norm is their ratio.
      noise: trace of the covariance of one batch's gradient given its rows, over the squared norm of the exact mean gradient.
      variance: the same of the covariance over batches, rows and noise both.
      expected_cosine: of the expected gradients over all rows there could be, from products of different batches alone.
      NaN where a squared norm is estimated not to be positive.
    """
    estimate, cross, exact = (x[np.ix_(batches, batches)] for x in found[:3])
    truth, noise, number = exact.mean(), found.noise[batches].mean(), len(batches)

    def apart(x):
        """Mean over pairs of different batches."""
        return (x.sum() - np.trace(x)) / (number * (number - 1))

    def root(x):
        return np.sqrt(x) if x > 0 else float("nan")

    return {
        "cosine": cross.mean() / root(estimate.mean() * truth),
        "norm": root(estimate.mean() / truth),
        "noise": noise / truth,
        "variance": (np.trace(estimate) / number - apart(estimate) + noise) / truth,
        "expected_cosine": apart(cross) / (root(apart(estimate)) * root(apart(exact))),
    }


def jackknife(statistics: Callable[[np.ndarray], Mapping[str, Any]], batches: int) -> dict[str, dict[str, Any]]:
    """{name: {value, interval: (low, high)}} at 95%, by leaving out each batch in turn (Student's t of batches - 1 degrees of freedom).

    Not the bootstrap: a batch that is drawn twice would bring its noise twice, and products of it with itself would not be unbiased.

    Args:
      statistics: from the batches taken, [n] int, to numbers or arrays by name.
      batches: how many there are, at least 3.
    """
    every = np.arange(batches)
    whole, without = statistics(every), [statistics(np.delete(every, i)) for i in every]
    found = {}
    for name, value in whole.items():
        each = np.array([part[name] for part in without])
        error = np.sqrt((batches - 1) * np.mean(np.square(each - each.mean(0)), axis=0))
        half = stats.t.ppf(0.975, batches - 1) * error
        found[name] = {"value": value, "interval": (value - half, value + half)}
    return found


# --- distributions and importance weights ---


def make_comparison(policy: Policy, config: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`compare(params, trajectory, prompts, reads, exact)`: how what is read differs from what the sampler drew from. Jitted.

    prompts: as the estimator sees them; exact: [N, 1, L, D], hidden states at the latents the positions were drawn at
    (`make_exact_hidden`).

    Returns (KL(p(. | c, z_sigma[k]) || p(. | c, z_read)) in nats, log pihat - recorded log pi), each [N, R, L] float32. The KL is summed
    over the vocabulary, at the sampling temperature.
    """
    temperature = config.sampler.temperature

    @jax.jit
    def compare(params, trajectory, prompts, reads, exact):
        hidden = read_hidden(policy, params, prompts, reads)
        rows, num, length, width = hidden.shape

        def at_positions(exact, hidden, tokens):
            true, read = (jax.nn.log_softmax(policy.head(params, x) / temperature) for x in (exact, hidden))
            return jnp.sum(jnp.exp(true) * (true - read), axis=-1), pick(read, tokens)

        exact, tokens = jnp.tile(exact[:, 0], (1, num, 1)), jnp.tile(trajectory.tokens, (1, num))
        found = map_positions(at_positions, policy.config.head_chunk, exact, hidden.reshape(rows, -1, width), tokens)
        kl, log_probs = (x.reshape(rows, num, length) for x in found)
        return kl, log_probs - trajectory.log_prob[:, None]

    return compare


def make_exact_hidden(policy: Policy, steps: int) -> Callable[[Any, Trajectory], jax.Array]:
    """`exact_hidden(params, trajectory)`: [N, 1, L, D], each position's hidden state before its own step; steps: at least every T."""

    @jax.jit
    def exact_hidden(params, trajectory):
        reads = cut_reads(trajectory, all_cuts(trajectory.nfe, steps), policy.config.mask_id)
        return read_hidden(policy, params, trajectory.prompts, reads)

    return exact_hidden


def kl_sums(kl: np.ndarray, weights: np.ndarray, trajectory: Trajectory, mask: np.ndarray) -> np.ndarray:
    """[2, BINS] float64: sums of weights * KL and of weights over the reads of positions that count, by sigma / T in `BINS` equal bins.

    Args:
      kl: [N, R, L], of `make_comparison`.
      weights: [N, R, L], of the reads.
      trajectory: its sigma and T.
      mask: [N, L] bool, positions that count.
    """
    bins = np.asarray(trajectory.unmask_step) * BINS // np.asarray(trajectory.nfe)[:, None]
    counted = np.asarray(weights, np.float64) * np.asarray(mask)[:, None]
    both = (counted * np.asarray(kl)).sum(1), counted.sum(1)
    return np.array([[x[(bins == i) & np.asarray(mask)].sum() for i in range(BINS)] for x in both])


def kl_statistics(sums: np.ndarray, batches: np.ndarray) -> dict[str, Any]:
    """{kl: mean, by_step: [BINS]} in nats, from sums [B, 2, BINS] of `kl_sums`; NaN where nothing is read."""
    total, count = sums[batches].sum(0)
    with np.errstate(invalid="ignore"):
        return {"kl": total.sum() / count.sum(), "by_step": total / count}


def weight_sums(gap: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over log weights [n]: {count, gap: of |log w|; w, squared, truncated: [CAPS] each, of min(C, w), its square, w above C}.

    Above by more than rounding: a weight of 1, of a position that is read where it was drawn, is not truncated at C = 1.
    """
    gap = np.asarray(gap, np.float64)[:, None]
    weight = np.exp(np.minimum(gap, np.log(CAPS)))
    sums = {"w": weight.sum(0), "squared": np.square(weight).sum(0), "truncated": (gap > np.log(CAPS) + 1e-4).sum(0)}
    return {"count": len(gap), "gap": np.abs(gap).sum()} | sums


def weight_statistics(sums: Sequence[Mapping[str, Any]], batches: np.ndarray) -> dict[str, Any]:
    """{gap: mean |log pihat - log pi|; ess, truncated: [CAPS], shares of the positions}, from `weight_sums` of each batch."""
    total = {name: np.sum([sums[i][name] for i in batches], axis=0) for name in sums[0]}
    ess = np.square(total["w"]) / (total["count"] * total["squared"])
    return {"gap": total["gap"] / total["count"], "ess": ess, "truncated": total["truncated"] / total["count"]}
