"""Checks a configuration before anything runs: every problem in one message, and the known names where one is unknown."""

import dataclasses
import json
import math
import numbers
import re
from collections import ChainMap
from collections.abc import Callable, Iterator
from typing import Any

from diffpo_jax import objectives
from diffpo_jax.algorithms import ALGORITHMS
from diffpo_jax.likelihood import ESTIMATORS
from diffpo_jax.models.attention import ATTENTION
from diffpo_jax.models.threshold_head import DISTRIBUTIONS
from diffpo_jax.models.transformer import COUNT_POSITIONS, DTYPES, REMAT, misfits
from diffpo_jax.sampling.denoise import CACHES
from diffpo_jax.sampling.unmasking import RULES, THRESHOLD_RULES
from diffpo_jax.step import LIKELIHOOD_TEMPERATURES, MODES, SCHEDULES
from diffpo_jax.tasks import TASKS, find_task

CHOICES: dict[str, Any] = {
    "algorithm": ChainMap(ALGORITHMS, {"": {}}),
    "task.name": TASKS,
    "model.param_dtype": ("auto", "float32", "bfloat16"),
    "model.dtype": DTYPES,
    "model.attention": ATTENTION,
    "model.remat": REMAT,
    "model.count_positions": COUNT_POSITIONS,
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
# Fields by the interval that their number, or each number of a tuple, lies in. NaN and the infinities lie in none.
INTEGERS = {
    "seed": "[0, 4294967295]", "task.seed": "[0, 4294967295]",
    "task.train_size": "[1, inf)", "task.test_size": "[1, inf)", "task.prompt_length": "[1, inf)", "task.response_length": "[1, inf)",
    "sudoku.clues_min": "[0, 16]", "sudoku.clues_max": "[0, 16]",
    "countdown.numbers_min": "[2, 8]", "countdown.numbers_max": "[2, 8]",
    "countdown.largest_number": "[1, 999999]", "countdown.largest_target": "[1, inf)",
    "math.steps_min": "[1, 8]", "math.steps_max": "[1, 8]", "math.largest_number": "[2, 99]",
    "model.width": "[1, inf)", "model.layers": "[1, inf)", "model.heads": "[1, inf)", "model.kv_heads": "[1, inf)",
    "model.mlp_width": "[1, inf)", "model.vocab_size": "[1, inf)", "model.mask_id": "[0, inf)", "model.head_chunk": "[0, inf)",
    "lora.rank": "[0, inf)",
    "sft.steps": "[1, inf)", "sft.batch_size": "[1, inf)", "sft.warmup_steps": "[0, inf)", "sft.checkpoint_every": "[1, inf)",
    "sft.log_every": "[1, inf)",
    "sampler.block_length": "[0, inf)", "sampler.steps": "[0, inf)", "sampler.lanes": "[0, inf)", "sampler.refresh": "[0, inf)",
    "threshold_network.hidden": "[1, inf)", "threshold_network.grid_size": "[2, inf)",
    "rl.steps": "[0, inf)", "rl.calls": "[0, inf)", "rl.prompts": "[1, inf)", "rl.group_size": "[2, inf)", "rl.inner_steps": "[1, inf)",
    "rl.microbatch": "[0, inf)", "rl.warmup_steps": "[0, inf)", "rl.max_bad_updates": "[1, inf)", "rl.checkpoint_every": "[1, inf)",
    "rl.eval_every": "[1, inf)",
    "likelihood.num_latents": "[1, inf)", "likelihood.window": "[0, inf)",
    "eval.batch_size": "[1, inf)", "eval.skip": "[0, inf)", "eval.limit": "[0, inf)", "eval.repeats": "[1, inf)",
    "eval.block_length": "[0, inf)", "eval.tokens_per_step": "[1, inf)", "eval.num_samples": "[1, inf)",
    "serve.port": "[0, 65535]",
    "mesh.data": "[-1, inf)", "mesh.fsdp": "[-1, inf)", "mesh.tensor": "[-1, inf)",
    "mesh.rollout.data": "[-1, inf)", "mesh.rollout.fsdp": "[-1, inf)", "mesh.rollout.tensor": "[-1, inf)",
    "distributed.processes": "[0, inf)", "distributed.process_id": "[-1, inf)", "distributed.timeout": "[1, inf)",
    "checkpoints_to_keep": "[1, inf)",
}  # fmt: skip
NUMBERS = {
    "sudoku.first_share": "[0, 1]",
    "model.rope_theta": "(0, inf)", "model.norm_eps": "(0, inf)",
    "lora.alpha": "(0, inf)", "lora.dropout": "[0, 1)",
    "sft.learning_rate": "(0, inf)", "sft.weight_decay": "[0, inf)",
    "sampler.threshold": "[0, inf)", "sampler.temperature": "(0, inf)",
    "threshold_network.gamma_min": "(0, inf)", "threshold_network.gamma_max": "(0, inf)", "threshold_network.gamma_init": "(0, inf)",
    "threshold_network.std_init": "(0, inf)", "threshold_network.learning_rate": "(0, inf)", "threshold_network.entropy_bonus": "[0, inf)",
    "rl.learning_rate": "(0, inf)", "rl.weight_decay": "[0, inf)", "rl.adam_b2": "[0, 1)", "rl.max_grad_norm": "(0, inf)",
    "rl.sampler_weight": "[0, inf)", "rl.nfe_penalty": "[0, inf)", "rl.clip_low": "[0, 1]", "rl.clip_high": "[0, inf)",
    "rl.importance_cap": "(0, inf)", "rl.kl_weight": "[0, inf)", "rl.elbo_weight": "[0, inf)",
    "likelihood.prompt_masking": "[0, 1)",
    "eval.temperature": "[0, inf)",
}  # fmt: skip
INTEGER_TUPLES = {"eval.lengths": "[1, inf)", "profile_steps": "[1, inf)"}
NUMBER_TUPLES = {"sampler.mixture": "[0, inf)", "eval.thresholds": "(0, inf)"}
FLAGS = (
    "task.dense_reward", "data.d1_faithful", "model.qkv_bias", "model.tie_embeddings", "model.shift", "model.mask_in_confidence",
    "sampler.eos_early_stop", "threshold_network.stop_gradient", "distributed.initialize",
)  # fmt: skip
TEXTS = (  # any text; paths are looked at where they are read
    "reasoning_gym.dataset", "reasoning_gym.options", "data.path", "model.pretrained", "model.tokenizer", "sft.checkpoint", "eval.prefill",
    "eval.score_file", "distributed.coordinator", "serve.host", "wandb.project", "checkpoint_dir",
)  # fmt: skip
TEXT_TUPLES = ("lora.targets",)
KINDS: dict[str, Callable[[Any], bool]] = {
    "an integer": lambda x: isinstance(x, numbers.Integral) and not isinstance(x, bool),
    "a finite number": lambda x: isinstance(x, numbers.Real) and not isinstance(x, bool) and x == x and abs(x) != math.inf,
    "True or False": lambda x: isinstance(x, bool),
    "text": lambda x: isinstance(x, str),
}
REASONS = {  # said beside the interval
    "rl.group_size": "advantages compare rollouts of one prompt",
    "sampler.temperature": "rollouts drawn greedily have no log-probability to learn from; evaluations have eval.temperature",
}


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field's value must be."""

    kind: str  # a key of KINDS
    several: bool = False  # a tuple of such
    interval: str = ""  # of numbers


FIELDS = (
    {name: Field("an integer", False, interval) for name, interval in INTEGERS.items()}
    | {name: Field("a finite number", False, interval) for name, interval in NUMBERS.items()}
    | {name: Field("an integer", True, interval) for name, interval in INTEGER_TUPLES.items()}
    | {name: Field("a finite number", True, interval) for name, interval in NUMBER_TUPLES.items()}
    | dict.fromkeys(FLAGS, Field("True or False"))
    | dict.fromkeys((*TEXTS, *CHOICES), Field("text"))
    | dict.fromkeys(TEXT_TUPLES, Field("text", True))
)


def check_config(config: Any) -> None:
    """Raises ValueError with all that is wrong in the fields of `config` (see configs/default.py), a line each.

    A rule across fields is looked at where each of them is sound by itself.
    """
    found = _flat(config)
    wrong = {name: problem for name, value in found.items() if (problem := _problem(name, value))}
    wrong |= {name: f"{name} is missing" for name in FIELDS if name not in found}
    problems = list(wrong.values())
    for names, rule in ACROSS:
        if wrong.keys().isdisjoint(names):
            problems += rule(*(found[name] for name in names))
    if problems:
        raise ValueError("the configuration cannot run:\n  " + "\n  ".join(problems))


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"section.field": value}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {f"{prefix}{name}": value}
    return flat


def _problem(name: str, value: Any) -> str:
    """What is wrong with a field by itself; "" for nothing."""
    if name not in FIELDS:
        section = name.partition(".")[0]
        own = section in TASKS and not any(field.startswith(f"{section}.") for field in FIELDS)  # a task added later checks its own
        return "" if own else f"there is no field {name}"
    field = FIELDS[name]
    if field.several != isinstance(value, list | tuple) or not all(map(KINDS[field.kind], value if field.several else [value])):
        return f"{name} = {value!r} must be {f'a tuple, each entry {field.kind}' if field.several else field.kind}"
    if name in CHOICES and value not in CHOICES[name]:
        return f"{name} = {value!r} is unknown; known: {', '.join(CHOICES[name])}"
    if field.interval and not all(_inside(number, field.interval) for number in (value if field.several else [value])):
        reason = f" ({REASONS[name]})" if name in REASONS else ""
        return f"{name} = {value}{': each' if field.several else ''} must {_wanted(field.interval)}{reason}"
    return ""


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _inside(number: Any, interval: str) -> bool:
    low, high = _ends(interval)
    above = low <= number if interval[0] == "[" else low < number
    below = number <= high if interval[-1] == "]" else number < high
    return bool(above and below)  # False of NaN


def _wanted(interval: str) -> str:
    """'be at least 1' of '[1, inf)'."""
    low, high = _ends(interval)
    if high < math.inf:
        return f"be in {interval}"
    return "be positive" if interval[0] == "(" else "not be negative" if low == 0 else f"be at least {low:g}"


# --- rules across fields ---

ACROSS: list[tuple[tuple[str, ...], Callable[..., Iterator[str]]]] = []  # the fields that a rule takes the values of, and the rule


def _across(*names: str) -> Callable[[Callable], Callable]:
    def add(rule):
        ACROSS.append((names, rule))
        return rule

    return add


def _in_order(low_name: str, high_name: str) -> None:
    @_across(low_name, high_name)
    def rule(low, high):
        if low > high:
            yield f"{low_name} = {low} is more than {high_name} = {high}"


_in_order("sudoku.clues_min", "sudoku.clues_max")
_in_order("countdown.numbers_min", "countdown.numbers_max")
_in_order("math.steps_min", "math.steps_max")


@_across("task.name", "data.d1_faithful")
def _d1(task, d1_faithful):
    try:
        find_task(task, d1_faithful)
    except ValueError as error:
        yield str(error)


@_across("reasoning_gym.options")
def _options(options):
    try:
        fits = isinstance(json.loads(options), dict)
    except (ValueError, RecursionError):
        fits = False
    if not fits:
        yield f"reasoning_gym.options = {options!r} must be a JSON object, as '{{\"max_digits\": 2}}'"


@_across("model.width", "model.heads", "model.kv_heads")
def _model_sizes(width, heads, kv_heads):
    yield from misfits(width, heads, kv_heads)


@_across("model.mask_id", "model.vocab_size")
def _mask(mask_id, vocab_size):
    if mask_id >= vocab_size:
        yield f"model.mask_id = {mask_id} is not in the vocabulary of model.vocab_size = {vocab_size}"


@_across("task.response_length", "sampler.block_length", "sampler.steps")
def _blocks(length, block, steps):
    blocks = length // (block or length)
    if length % (block or length):
        yield f"task.response_length = {length} is not a multiple of sampler.block_length = {block}"
    elif (steps or length) % blocks or steps > length:
        yield f"sampler.steps = {steps} is not a multiple of the {blocks} blocks, at most the response length {length}"


@_across("sampler.refresh", "sampler.cache")
def _refresh(refresh, cache):
    if refresh and cache == "none":
        yield f"sampler.refresh = {refresh} has no meaning with sampler.cache = 'none'"


@_across("sampler.mixture", "sampler.rule", "rl.mode")
def _mixture(mixture, rule, mode):
    if MODES[mode][1] and mixture:
        yield f"sampler.mixture is for a fixed threshold: rl.mode = {mode!r} lets the network choose it"
    elif mixture and rule not in THRESHOLD_RULES:
        yield f"sampler.mixture is of thresholds, which sampler.rule = {rule!r} does not use; rules that do: {', '.join(THRESHOLD_RULES)}"


@_across("sampler.rule", "rl.mode", "rl.importance_weights")
def _rule(rule, mode, importance_weights):
    if MODES[mode][1] and rule not in THRESHOLD_RULES:
        yield (f"rl.mode = {mode!r} trains a threshold, which sampler.rule = {rule!r} does not use; rules that do: "
               f"{', '.join(THRESHOLD_RULES)}; or rl.mode = 'model'")  # fmt: skip
    if MODES[mode][0] and rule == "low_confidence" and importance_weights != "none":
        yield ("sampler.rule = 'low_confidence' picks positions by the tokens it drew: the recorded probabilities are not those "
               "of the committed tokens. Use 'top_probability', its counterpart that picks positions first, or "
               "rl.importance_weights = 'none'")  # fmt: skip


@_across("threshold_network.gamma_min", "threshold_network.gamma_init", "threshold_network.gamma_max")
def _gammas(low, start, high):
    if not low < start < high:
        yield f"threshold_network.gamma_min = {low}, gamma_init = {start}, gamma_max = {high}: each must be less than the next"


@_across("likelihood.window", "likelihood.estimator", "likelihood.num_latents")
def _window(window, estimator, num_latents):
    if window and estimator != "cuts":
        yield f"likelihood.window = {window} has no meaning with likelihood.estimator = {estimator!r}"
    elif window and num_latents == 1:
        yield "likelihood.window with likelihood.num_latents = 1 never reads what was unmasked later: use at least 2 cuts"


@_across("likelihood.estimator", "likelihood.num_latents")
def _pairs(estimator, num_latents):
    if estimator == "coupled" and num_latents % 2:
        yield f"likelihood.num_latents = {num_latents}: complementary masks come in pairs, use an even number"


@_across("eval.thresholds")
def _thresholds(thresholds):
    if not thresholds:
        yield "eval.thresholds is empty"
    if len(set(thresholds)) < len(thresholds):
        yield f"eval.thresholds = {tuple(thresholds)} has a threshold more than once"


@_across("profile_steps")
def _profile(steps):
    if steps and (len(steps) != 2 or steps[0] > steps[1]):
        yield f"profile_steps = {tuple(steps)}: give the first and the last iteration, (10, 12), or () for none"


@_across("eval.skip", "task.test_size")
def _skip(skip, test_size):
    if skip >= test_size:
        yield f"eval.skip = {skip} leaves none of the task.test_size = {test_size} test problems"


@_across("mesh.data", "mesh.fsdp", "mesh.tensor")
def _mesh(data, fsdp, tensor):
    sizes = (data, fsdp, tensor)
    if 0 in sizes or sizes.count(-1) > 1:
        yield (f"mesh.data = {data}, mesh.fsdp = {fsdp}, mesh.tensor = {tensor}: sizes are at least 1, and at most one of them is -1, "
               "the rest of the devices")  # fmt: skip


@_across("mesh.rollout.data", "mesh.rollout.fsdp", "mesh.rollout.tensor")
def _rollout_mesh(data, fsdp, tensor):
    sizes = (data, fsdp, tensor)
    text = f"mesh.rollout.data = {data}, mesh.rollout.fsdp = {fsdp}, mesh.rollout.tensor = {tensor}"
    if any(sizes) and not all(sizes):
        yield f"{text}: set all three, or none for the mesh of training"
    elif sizes.count(-1) > 1:
        yield f"{text}: at most one of them is -1, the rest of the devices"


@_across("distributed.initialize", "distributed.coordinator", "distributed.processes", "distributed.process_id")
def _processes(initialize, coordinator, processes, process_id):
    if not initialize and (coordinator or processes or process_id >= 0):
        yield "distributed.coordinator, .processes or .process_id is set, but distributed.initialize is not"
    if coordinator and not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator):
        yield f"distributed.coordinator = {coordinator!r} must be HOST:PORT"
    if processes and process_id >= processes:
        yield f"distributed.process_id = {process_id} must be less than distributed.processes = {processes}"
