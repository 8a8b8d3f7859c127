"""Prompts -> trajectories -> rewards -> advantages -> reference and old log-probabilities."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffpo_jax import objectives, sharding
from diffpo_jax.build import Parts, grade
from diffpo_jax.likelihood import draw_cuts, mask_prompts, surrogate_log_probs
from diffpo_jax.models.transformer import Policy
from diffpo_jax.sampling.denoise import denoise, response_mask
from diffpo_jax.step import MODES, likelihood_temperature
from diffpo_jax.structs import Prompts, ScoredGroup, TrainState, Trajectory


def sampler_options(parts: Parts) -> dict[str, Any]:
    """The arguments of `denoise` that rollouts and evaluation share."""
    s = parts.config.sampler
    return {
        "length": parts.config.task.response_length,
        "eos_id": parts.tokenizer.eos_id if s.eos_early_stop else None,
        "block_length": s.block_length,
        "rule": s.rule,
        "steps": s.steps,
    }


def make_score(policy: Policy, config: Any) -> Callable[..., ScoredGroup]:
    """`score(params, base, trajectory, rewards, key)`: advantages, and the surrogates of old policy and reference on the cuts drawn.

    Jitted. `rewards` [N] are the task's; the NFE enters here (algorithm of DiFFPO: R = r (1 - lambda NFE / NFE_max) by default).
    """
    rl, temperature = config.rl, likelihood_temperature(config)
    train_model, train_sampler = MODES[rl.mode]
    length, group, updates = config.task.response_length, rl.group_size, rl.inner_steps
    read = functools.partial(surrogate_log_probs, policy, temperature=temperature, chunk=config.likelihood.head_chunk)

    def advantages(rewards):
        return objectives.ADVANTAGES[rl.advantage](rewards.reshape(-1, group)).reshape(-1)

    @jax.jit
    def score(params, base, trajectory: Trajectory, rewards: jax.Array, key: jax.Array) -> ScoredGroup:
        total = objectives.REWARD_SHAPES[rl.reward_shape](rewards, trajectory.nfe, length, rl.nfe_penalty)
        if config.likelihood.prompt_masking:
            key, key_prompts = jax.random.split(key)
        keys = jax.random.split(key, updates)
        cuts = jnp.stack([draw_cuts(keys[i], trajectory.nfe, config.likelihood.num_cuts, length) for i in range(updates)])
        old = ref = seen = None
        views = [trajectory] * updates
        if config.likelihood.prompt_masking:
            keys = jax.random.split(key_prompts, updates)
            rate, mask_id = config.likelihood.prompt_masking, policy.config.mask_id
            seen = jnp.stack([mask_prompts(keys[i], trajectory.prompts, rate, mask_id) for i in range(updates)])
            views = [trajectory.replace(prompts=trajectory.prompts.replace(tokens=seen[i])) for i in range(updates)]
        if train_model:
            ref = jnp.stack([read(base, views[i], cuts[i]) for i in range(updates)])
            if updates > 1:
                old = jnp.stack([read(params, views[i], cuts[i]) for i in range(updates)])
        return ScoredGroup(
            trajectory=trajectory,
            advantages=advantages(total if rl.model_reward == "total" else rewards),
            sampler_advantages=advantages(total),
            cuts=cuts,
            old_log_probs=old,
            ref_log_probs=ref,
            seen_prompts=seen,
        )

    return score


def make_rollout(parts: Parts) -> Callable[[TrainState, Any, dict[str, np.ndarray], jax.Array], tuple[ScoredGroup, dict[str, float]]]:
    """`rollout(state, base, batch, key)`: G responses to each of the B prompts of a training batch, scored.

    Thresholds are drawn by the threshold network where the mode trains it. Returns the group and its metrics: task reward, accuracy, NFE,
    tokens per call, thresholds, and the denoiser calls that this rollout, its likelihoods and its updates cost (a call = one forward pass
    of one row).
    """
    config, head = parts.config, parts.head
    score = make_score(parts.policy, config)
    train_model, train_sampler = MODES[config.rl.mode]
    options = sampler_options(parts) | {"threshold": config.sampler.threshold, "temperature": config.sampler.temperature}
    # a reference pass and an update an inner step, and the old policy's where it is not the policy itself; m calls each
    passes = config.rl.inner_steps * (2 + (config.rl.inner_steps > 1)) * train_model
    likelihood_calls = passes * config.likelihood.num_cuts

    def rollout(state, base, batch, key):
        key_sample, key_cuts = jax.random.split(key)
        index, *prompts = (np.repeat(batch[name], config.rl.group_size, axis=0) for name in ("index", "prompt", "prompt_mask"))
        prompts = sharding.put_rows(parts.mesh, Prompts(*prompts))
        learned = {"threshold_fn": head.sample, "threshold_params": state.threshold_params} if train_sampler else {}
        params = parts.trainable.join(base, state.params)
        trajectory = denoise(parts.policy, params, prompts.tokens, prompts.mask, key_sample, **options, **learned)
        tokens, nfe, entropy, mask = jax.device_get(
            (trajectory.tokens, trajectory.nfe, trajectory.entropy, response_mask(trajectory.tokens, parts.tokenizer.eos_id))
        )
        grades = grade(parts, "train", index, tokens)
        scored = score(params, base, trajectory, sharding.put_rows(parts.mesh, grades.reward), key_cuts)
        metrics = {
            "reward": grades.reward.mean(),
            "accuracy": grades.correct.mean(),
            "nfe": nfe.mean(),
            "tokens_per_call": mask.sum() / nfe.sum(),
            "entropy": entropy[mask].mean(),
            "groups_with_signal": np.mean(np.ptp(grades.reward.reshape(-1, config.rl.group_size), axis=1) > 0),
            "denoiser_calls": int(nfe.sum()) + len(nfe) * likelihood_calls,
        }
        if len(grades.components) > 1:
            metrics |= {f"reward/{name}": values.mean() for name, values in grades.components.items()}
        if train_sampler:
            gamma = np.asarray(trajectory.draw.gamma)
            metrics |= {"threshold/mean": gamma.mean(), "threshold/std": gamma.std(), "threshold/median": np.median(gamma)}
        return scored, {name: float(value) for name, value in metrics.items()}

    return rollout
