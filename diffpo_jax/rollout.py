"""Prompts -> trajectories -> reference and old log-probabilities; rewards -> advantages."""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffpo_jax import objectives, sharding
from diffpo_jax.build import Grades, Parts
from diffpo_jax.likelihood import draw_reads, elbo_reads, mask_prompts, read_log_probs
from diffpo_jax.models.lora import Trainable
from diffpo_jax.models.transformer import Policy
from diffpo_jax.reductions import masked_mean
from diffpo_jax.sampling.denoise import denoise, response_mask
from diffpo_jax.sampling.queues import utilisation
from diffpo_jax.step import MODES, likelihood_temperature
from diffpo_jax.structs import Prompts, ScoredGroup, TrainState, Trajectory

ELBO_READS = SimpleNamespace(num_latents=1)  # of the ELBO regulariser: one mask a row and update


def sampler_options(parts: Parts) -> dict[str, Any]:
    """The arguments of `denoise` that rollouts and evaluation share."""
    s = parts.config.sampler
    return {
        "length": parts.config.task.response_length,
        "eos_id": parts.tokenizer.eos_id if s.eos_early_stop else None,
        "block_length": s.block_length,
        "rule": s.rule,
        "steps": s.steps,
        "cache": s.cache,
        "refresh": s.refresh,
    }


def rollout_options(parts: Parts, threshold_params: Any) -> dict[str, Any]:
    """The arguments of `denoise` in rollouts; thresholds are drawn by the threshold network where the mode trains it."""
    s, rl = parts.config.sampler, parts.config.rl
    learned = {"threshold_fn": parts.head.sample, "threshold_params": threshold_params} if MODES[rl.mode][1] else {}
    threshold = jnp.resize(jnp.array(s.mixture), rl.prompts * rl.group_size) if s.mixture else s.threshold
    return sampler_options(parts) | {"threshold": threshold, "temperature": s.temperature} | learned


def lanes(parts: Parts, rows: int) -> int:
    """How many of `rows` rows are denoised at once: sampler.lanes, or all where that is 0 or more than there are."""
    return min(parts.config.sampler.lanes or rows, rows)


def sample(
    parts: Parts, params: Any, prompts: Prompts, key: jax.Array, *, threshold_params: Any = None, row_ids: Any = None, **options: Any
) -> Trajectory:
    """`denoise` over the mesh of rollouts: parameters and prompts go there where it is another one, the trajectory comes back."""
    there = parts.rollout_mesh
    policy = dataclasses.replace(parts.policy, layout=sharding.Layout(there))
    prompts, row_ids = sharding.reshard((prompts, row_ids), sharding.rows_sharding(there))
    threshold_params = sharding.reshard(threshold_params, sharding.replicated_sharding(there))
    options |= {"threshold_params": threshold_params, "row_ids": row_ids, "lanes": lanes(parts, prompts.tokens.shape[0])}
    params = rollout_params(parts, params)
    trajectory = denoise(policy, params, prompts.tokens, prompts.mask, key, **options)
    return sharding.reshard(trajectory, sharding.rows_sharding(parts.mesh))


def rollout_params(parts: Parts, params: Any) -> Any:
    """The policy's parameters as the mesh of rollouts holds them; without a copy where they are laid out so already."""
    return sharding.reshard(params, sharding.params_sharding(parts.rollout_mesh, params))


def make_score(policy: Policy, trainable: Trainable, config: Any) -> Callable[[Any, Any, Trajectory, jax.Array], dict[str, Any]]:
    """`score(trained, base, trajectory, key)`: the fields of a `ScoredGroup` that need no rewards. Jitted.

    They are the reads of each update, and what old policy and reference say there.
    """
    rl, updates = config.rl, config.rl.inner_steps
    train_model, _ = MODES[rl.mode]
    read = functools.partial(read_log_probs, policy, temperature=likelihood_temperature(config))

    def draw_each(draw, key, *args):
        """What `draw` returns with a key of each update, stacked."""
        drawn = [draw(each, *args) for each in jax.random.split(key, updates)]
        return jax.tree.map(lambda *x: jnp.stack(x), *drawn)

    @jax.jit
    def score(trained, base, trajectory, key):
        mask_id = policy.config.mask_id
        old = ref = seen = regulariser = None
        if config.likelihood.prompt_masking:
            key, key_prompts = jax.random.split(key)
            seen = draw_each(mask_prompts, key_prompts, trajectory.prompts, config.likelihood.prompt_masking, mask_id)
        if train_model and rl.elbo_weight:
            key, key_elbo = jax.random.split(key)
            regulariser = draw_each(elbo_reads, key_elbo, trajectory, ELBO_READS, mask_id)
        reads = draw_each(draw_reads, key, trajectory, config.likelihood, mask_id)

        def read_each(params):
            """[U, N, R, L]; one pass after the other, so that a program of many updates is no larger than one of one."""

            def one(each):
                prompts = trajectory.prompts if seen is None else trajectory.prompts.replace(tokens=each[1])
                return read(params, trajectory.replace(prompts=prompts), each[0])[0]

            return jax.lax.map(one, (reads, seen))

        if train_model and rl.kl_weight:
            ref = read_each(base)
        if train_model and updates > 1:
            old = read_each(trainable.join(base, trained))
        return {"reads": reads, "old_log_probs": old, "ref_log_probs": ref, "seen_prompts": seen, "elbo_reads": regulariser}

    return score


def rollout_metrics(trajectory: Trajectory, grades: dict[str, jax.Array], mask: jax.Array, group: int) -> dict[str, jax.Array]:
    """Scalars: mean grades, NFE, calls over whole rows, utilisation, tokens per call, entropy, thresholds.

    Args:
      trajectory: N rows of `denoise`.
      grades: [N] each.
      mask: [N, L], of tokens that count.
      group: rows of a group.
    """
    assert trajectory.whole_calls is not None and trajectory.first_step is not None and trajectory.last_step is not None
    by_group = grades["reward"].reshape(-1, group)
    calls = jnp.sum(trajectory.nfe)
    metrics = {name: jnp.mean(values) for name, values in grades.items()} | {
        "nfe": jnp.mean(trajectory.nfe.astype(jnp.float32)),
        "whole_calls": jnp.mean(trajectory.whole_calls.astype(jnp.float32)),
        "utilisation": utilisation(trajectory.first_step, trajectory.last_step, trajectory.nfe),
        "tokens_per_call": jnp.sum(mask) / calls,
        "entropy": masked_mean(trajectory.entropy, mask),
        "groups_with_signal": jnp.mean(jnp.max(by_group, axis=1) > jnp.min(by_group, axis=1)),
        "denoiser_calls": calls,
    }
    if trajectory.draw is not None:
        gamma = trajectory.draw.gamma
        metrics |= {"threshold/mean": jnp.mean(gamma), "threshold/std": jnp.std(gamma), "threshold/median": jnp.median(gamma)}
    return metrics


def make_rollout(parts: Parts) -> Callable[[TrainState, Any, dict[str, np.ndarray], jax.Array], tuple[Trajectory, dict[str, Any]]]:
    """`rollout(state, base, batch, key)`: responses to a batch, of which a host gives its rows, and their likelihoods (`make_score`).

    It returns before the devices are done: likelihoods need no
    rewards, so that they are computed while hosts fetch the tokens and grade them.
    """
    rows = parts.config.rl.prompts * parts.config.rl.group_size
    score = make_score(parts.policy, parts.trainable, parts.config)

    def rollout(state, base, batch, key):
        key_sample, key_cuts = jax.random.split(key)
        prompts = sharding.put_rows(parts.mesh, Prompts(batch["prompt"], batch["prompt_mask"]), rows)
        params = parts.trainable.join(base, state.params)
        trajectory = sample(parts, params, prompts, key_sample, **rollout_options(parts, state.threshold_params))
        return trajectory, score(state.params, base, trajectory, key_cuts)

    return rollout


def make_credit(parts: Parts) -> Callable[[Trajectory, dict[str, Any], Grades], tuple[ScoredGroup, dict[str, jax.Array]]]:
    """`credit(trajectory, likelihoods, grades)`: the scored group of a rollout, graded for the rows of this host, and its metrics.

    The NFE enters the reward here (algorithm of DiFFPO: R = r (1 - lambda NFE / NFE_max) by default). The metrics are those of
    `rollout_metrics`, on the devices; denoiser calls include what the likelihoods and updates cost (a call = one forward pass of one row).
    """
    config, rl = parts.config, parts.config.rl
    rows, length = rl.prompts * rl.group_size, config.task.response_length
    # an update an inner step, the reference's pass with a KL, the old policy's where it is not the policy itself; m calls each
    passes = (1 + bool(rl.kl_weight) + (rl.inner_steps > 1)) * config.likelihood.num_latents + bool(rl.elbo_weight)
    passes *= rl.inner_steps * MODES[rl.mode][0]

    def advantages(rewards):
        return objectives.ADVANTAGES[rl.advantage](rewards.reshape(-1, rl.group_size)).reshape(-1)

    @jax.jit
    def assign(trajectory, grades):
        rewards = grades["reward"]
        total = objectives.REWARD_SHAPES[rl.reward_shape](rewards, trajectory.nfe, length, rl.nfe_penalty)
        metrics = rollout_metrics(trajectory, grades, response_mask(trajectory.tokens, parts.tokenizer.eos_id), rl.group_size)
        metrics["denoiser_calls"] += rows * passes
        return advantages(total if rl.model_reward == "total" else rewards), advantages(total), metrics

    def credit(trajectory, likelihoods, grades):
        components = grades.components if len(grades.components) > 1 else {}
        named = {"reward": grades.reward, "accuracy": grades.correct} | {f"reward/{name}": part for name, part in components.items()}
        model, sampler, metrics = assign(trajectory, sharding.put_rows(parts.mesh, named, rows))
        right = sharding.put_rows(parts.mesh, grades.correct > 0.5, rows) if rl.elbo_weight else None
        return ScoredGroup(trajectory=trajectory, advantages=model, sampler_advantages=sampler, right=right, **likelihoods), metrics

    return credit
