"""Checks a configuration before anything runs: every problem in one message, and the known names where one is unknown."""

from collections import ChainMap
from typing import Any

from diffpo_jax import objectives
from diffpo_jax.algorithms import ALGORITHMS
from diffpo_jax.likelihood import ESTIMATORS
from diffpo_jax.models.attention import ATTENTION
from diffpo_jax.models.threshold_head import DISTRIBUTIONS
from diffpo_jax.models.transformer import REMAT
from diffpo_jax.sampling.denoise import CACHES
from diffpo_jax.sampling.unmasking import RULES, THRESHOLD_RULES
from diffpo_jax.step import LIKELIHOOD_TEMPERATURES, MODES, SCHEDULES
from diffpo_jax.tasks import TASKS

CHOICES = {
    "algorithm": ChainMap(ALGORITHMS, {"": {}}),
    "task.name": TASKS,
    "model.param_dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ATTENTION,
    "model.remat": REMAT,
    "eval.rule": RULES,
    "sampler.rule": RULES,
    "sampler.cache": CACHES,
    "threshold_network.distribution": DISTRIBUTIONS,
    "rl.mode": MODES,
    "rl.schedule": SCHEDULES,
    "rl.advantage": objectives.ADVANTAGES,
    "rl.objective": objectives.OBJECTIVES,
    "rl.reward_shape": objectives.REWARD_SHAPES,
    "rl.model_reward": ("total", "task"),
    "rl.importance_weights": objectives.IMPORTANCE_WEIGHTS,
    "rl.kl_estimator": objectives.KL_ESTIMATORS,
    "rl.elbo_rows": ("all", "right"),
    "rl.normalisation": objectives.NORMALISATIONS,
    "likelihood.estimator": ESTIMATORS,
    "likelihood.temperature": LIKELIHOOD_TEMPERATURES,
}
AT_LEAST_ONE = (
    "task.train_size", "task.test_size", "task.prompt_length", "task.response_length", "sft.steps", "sft.batch_size",
    "sft.checkpoint_every", "sft.log_every", "rl.prompts", "rl.group_size", "rl.inner_steps", "rl.max_bad_updates",
    "rl.checkpoint_every", "rl.eval_every", "likelihood.num_latents", "eval.batch_size", "eval.repeats", "eval.num_samples",
    "eval.tokens_per_step",
    "checkpoints_to_keep",
)  # fmt: skip
NOT_NEGATIVE = (
    "sampler.block_length", "sampler.steps", "sampler.threshold", "sampler.temperature", "sampler.lanes", "sampler.refresh",
    "sft.warmup_steps", "rl.steps", "rl.calls", "rl.microbatch", "rl.warmup_steps", "rl.nfe_penalty", "rl.kl_weight", "rl.elbo_weight",
    "rl.sampler_weight", "eval.skip",
    "likelihood.window", "likelihood.prompt_masking", "model.head_chunk", "eval.temperature", "eval.limit", "eval.block_length",
    "lora.rank", "lora.dropout",
)  # fmt: skip
POSITIVE = (
    "sft.learning_rate", "rl.learning_rate", "rl.max_grad_norm", "rl.importance_cap", "threshold_network.learning_rate",
)  # fmt: skip


def check_config(config: Any) -> None:
    """Raises ValueError with all that is wrong in the fields of `config` (see configs/default.py), a line each."""
    flat = dict(_fields(config))
    problems = [
        f"{name} = {flat[name]!r} is unknown; known: {', '.join(known)}" for name, known in CHOICES.items() if flat[name] not in known
    ]
    problems += [f"{name} = {flat[name]} must be at least 1" for name in AT_LEAST_ONE if flat[name] < 1]
    problems += [f"{name} = {flat[name]} must not be negative" for name in NOT_NEGATIVE if not flat[name] >= 0]
    problems += [f"{name} = {flat[name]} must be positive" for name in POSITIVE if not flat[name] > 0]
    if not problems:
        problems += _across_fields(config)
    if problems:
        raise ValueError("the configuration cannot run:\n  " + "\n  ".join(problems))


def _fields(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _across_fields(config) -> list[str]:
    sampler, rl, likelihood, length = config.sampler, config.rl, config.likelihood, config.task.response_length
    problems = []
    blocks = length // (sampler.block_length or length)
    if length % (sampler.block_length or length):
        problems.append(f"task.response_length = {length} is not a multiple of sampler.block_length = {sampler.block_length}")
    elif (sampler.steps or length) % blocks or sampler.steps > length:
        problems.append(f"sampler.steps = {sampler.steps} is not a multiple of the {blocks} blocks, at most the response length {length}")
    if sampler.refresh and sampler.cache == "none":
        problems.append(f"sampler.refresh = {sampler.refresh} has no meaning with sampler.cache = 'none'")
    if likelihood.window and likelihood.estimator == "cuts" and likelihood.num_latents == 1:
        problems.append("likelihood.window with likelihood.num_latents = 1 never reads what was unmasked later: use at least 2 cuts")
    if likelihood.window and likelihood.estimator != "cuts":
        problems.append(f"likelihood.window = {likelihood.window} has no meaning with likelihood.estimator = {likelihood.estimator!r}")
    if likelihood.estimator == "coupled" and likelihood.num_latents % 2:
        problems.append(f"likelihood.num_latents = {likelihood.num_latents}: complementary masks come in pairs, use an even number")
    if MODES[rl.mode][1] and sampler.mixture:
        problems.append(f"sampler.mixture is for a fixed threshold: rl.mode = {rl.mode!r} lets the network choose it")
    if likelihood.prompt_masking >= 1 or config.lora.dropout >= 1:
        problems.append("likelihood.prompt_masking and lora.dropout are shares below 1")
    if rl.group_size < 2:
        problems.append(f"rl.group_size = {rl.group_size}: advantages compare rollouts of one prompt, at least 2 are needed")
    if sampler.temperature == 0:
        problems.append("sampler.temperature = 0: rollouts drawn greedily have no log-probability to learn from; use eval.temperature")
    if MODES[rl.mode][1] and sampler.rule not in THRESHOLD_RULES:
        problems.append(f"rl.mode = {rl.mode!r} trains a threshold, which sampler.rule = {sampler.rule!r} does not use; rules that do: "
                        f"{', '.join(THRESHOLD_RULES)}; or rl.mode = 'model'")  # fmt: skip
    if MODES[rl.mode][0] and sampler.rule == "low_confidence" and rl.importance_weights != "none":
        problems.append("sampler.rule = 'low_confidence' picks positions by the tokens it drew: the recorded probabilities are not those "
                        "of the committed tokens. Use 'top_probability', its counterpart that picks positions first, or "
                        "rl.importance_weights = 'none'")  # fmt: skip
    if not config.distributed.initialize and (config.distributed.coordinator or config.distributed.processes):
        problems.append("distributed.coordinator or distributed.processes is set, but distributed.initialize is not")
    rollout = config.mesh.rollout
    if any(rollout.values()) and not all(rollout.values()):
        problems.append(f"mesh.rollout.data = {rollout.data}, mesh.rollout.fsdp = {rollout.fsdp}, mesh.rollout.tensor = {rollout.tensor}: "
                        "set all three, or none for the mesh of training")  # fmt: skip
    steps = config.profile_steps
    if len(steps) and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        problems.append(f"profile_steps = {tuple(steps)}: give the first and the last iteration, (10, 12), or () for none")
    if not list(config.eval.thresholds):
        problems.append("eval.thresholds is empty")
    return problems
