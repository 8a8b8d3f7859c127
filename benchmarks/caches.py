"""What the sampler's caches cost in quality, of a trained run: python benchmarks/caches.py --workdir=DIR --block-length=4

For each cache, and none: accuracy and calls on the test problems, greedily; and of rollouts at the run's temperature what the surrogate
likelihoods of training make of them (exact forward passes, `num_latents` cuts): the mean gap to the recorded log-probabilities, the
effective sample size of the truncated importance weights, the share that is truncated. Thresholds are those of the threshold network.
Differences to no cache are over the same problems, with a 95% bootstrap interval over them.
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rollout import trained

from diffpo_jax import data, objectives
from diffpo_jax.build import Parts
from diffpo_jax.evaluate import make_evaluate, operating_point
from diffpo_jax.likelihood import draw_cuts, surrogate_log_probs
from diffpo_jax.pareto import accuracy_interval
from diffpo_jax.reductions import masked_mean, masked_sum
from diffpo_jax.rollout import rollout_options, sample
from diffpo_jax.sampling.denoise import response_mask
from diffpo_jax.step import likelihood_temperature
from diffpo_jax.structs import Prompts

SETTINGS = [("none", 0), ("prefix", 0), ("prefix", 2), ("dual", 0), ("dual", 2)]  # (cache, refresh)


def weights(parts: Parts, params: Any, threshold_params: Any, prompts: Prompts) -> dict[str, float]:
    """Surrogate gap (nats a token), effective sample size (share of the tokens) and truncated share of one rollout."""
    config = parts.config
    key_sample, key_cuts = jax.random.split(jax.random.fold_in(parts.key("eval"), 1))
    trajectory = sample(parts, params, prompts, key_sample, **rollout_options(parts, threshold_params))
    cuts = draw_cuts(key_cuts, trajectory.nfe, config.likelihood.num_latents, config.task.response_length)
    read = jax.jit(surrogate_log_probs, static_argnames=("policy", "temperature"))
    old = read(parts.policy, params, trajectory, cuts, temperature=likelihood_temperature(config))
    mask, gap = response_mask(trajectory.tokens, parts.tokenizer.eos_id), old - trajectory.log_prob
    weight = objectives.truncated_importance_weights(gap, config.rl.importance_cap)
    sums = masked_sum(weight, mask), masked_sum(weight**2, mask), mask.sum()
    return {
        "gap": float(masked_mean(abs(gap), mask)),
        "ess": float(objectives.effective_sample_size(*sums)),
        "truncated": float(masked_mean(gap > np.log(config.rl.importance_cap), mask)),
        "whole": float(trajectory.whole_calls.mean() / trajectory.nfe.mean()),
    }


def main(args: argparse.Namespace) -> None:
    with trained(args.workdir) as (parts, params, threshold_params):
        config = parts.config
        batch = next(data.eval_batches(parts.sources["train"], parts.tokenizer, config, args.rows))
        prompts = Prompts(batch["prompt"], batch["prompt_mask"])
        shown = Table(title=f"{config.task.name}: blocks of {args.block_length} tokens; 95% intervals of differences to no cache")
        for name in ("cache", "refresh", "accuracy %", "difference", "NFE", "whole calls %", "surrogate gap", "ESS %", "truncated %"):
            shown.add_column(name, justify="right")
        exact = None
        for cache, refresh in SETTINGS:
            own = config.copy_and_resolve_references()
            own.sampler.update(cache=cache, refresh=refresh, block_length=args.block_length)
            own_parts = dataclasses.replace(parts, config=own)
            found = make_evaluate(own_parts)(params, **operating_point(config, threshold_params))
            of_rollout = weights(own_parts, params, threshold_params, prompts)
            exact = exact or found
            low, high = accuracy_interval(found.correct - exact.correct)
            shown.add_row(
                cache, str(refresh), f"{100 * found.correct.mean():.1f}",
                f"{100 * (found.correct - exact.correct).mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", f"{found.nfe.mean():.2f}",
                f"{100 * of_rollout['whole']:.0f}", f"{of_rollout['gap']:.4f}", f"{100 * of_rollout['ess']:.1f}",
                f"{100 * of_rollout['truncated']:.2f}",
            )  # fmt: skip
        Console(width=140).print(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a run")
    parser.add_argument("--block-length", type=int, default=4, help="tokens, a divisor of the response length")
    parser.add_argument("--rows", type=int, default=1024, help="rollouts whose likelihoods are read")
    main(parser.parse_args())
