"""The configurations: every rule of check_config, and the presets."""

import functools
import importlib
import re

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from diffpo_jax.config import ACROSS, CHOICES, FIELDS, check_config
from diffpo_jax.sampling.unmasking import RULES

PUBLISHED = {"math": "gsm8k", "countdown": "countdown_cd3", "sudoku": "sudoku_4x4"}


def problems(**changes) -> list[str]:
    """What check_config says about the defaults with `changes` (section__field=value), a string each."""
    try:
        check_config(changed({name.replace("__", "."): value for name, value in changes.items()}))
    except ValueError as error:
        first, *lines = str(error).splitlines()
        assert first == "the configuration cannot run:"
        return [line.strip() for line in lines]
    return []


def changed(fields: dict) -> ml_collections.ConfigDict:
    """The defaults with {"section.field": value}, of any type."""
    config = default.get_config().to_dict()
    for name, value in fields.items():
        *sections, last = name.split(".")
        functools.reduce(dict.get, sections, config)[last] = value
    return ml_collections.ConfigDict(config)


@pytest.mark.parametrize("task", ["math", "countdown", "sudoku"])
def test_presets_can_run_and_have_only_known_fields(task):
    module = importlib.import_module(f"configs.{task}")
    assert {"tiny", "small", "suite", "debug"} <= set(module.PRESETS)
    for preset in module.PRESETS:
        config = module.get_config(preset)
        check_config(config)
        assert config.task.name == (task if preset in ("tiny", "small", "suite", "debug") else PUBLISHED[task])
        assert fields(config) == fields(default.get_config())
    assert module.get_config() == module.get_config("tiny")
    with pytest.raises(ValueError, match=rf"configs/{task}.py has no preset 'huge'; known: tiny, small, suite, debug"):
        module.get_config("huge")


def fields(config, prefix="") -> list[str]:
    if not isinstance(config, ml_collections.ConfigDict):
        return [prefix]
    return [name for key, value in config.items() for name in fields(value, f"{prefix}.{key}")]


def test_every_field_has_a_comment():
    with open(default.__file__, encoding="utf-8") as file:
        source = file.read()
    body = source[source.index("def get_config") : source.index("    return c\n")]
    assert [line for line in body.splitlines() if " = " in line and "ConfigDict()" not in line and "  # " not in line] == []


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_an_unknown_choice_lists_the_known_ones(name):
    [line] = problems(**{name.replace(".", "__"): "nonsense"})
    assert line == f"{name} = 'nonsense' is unknown; known: {', '.join(CHOICES[name])}"


def test_every_field_has_a_rule():
    """One for each of configs/default.py: an interval, choices, or that any value of its type will do."""
    names = [name.removeprefix(".") for name in fields(default.get_config())]
    assert sorted(FIELDS) == sorted(names)
    assert {name for names, _ in ACROSS for name in names} <= FIELDS.keys() and CHOICES.keys() <= FIELDS.keys()
    for name, field in FIELDS.items():  # and the default has the type
        value = value_of(name)
        assert isinstance(value, tuple) == field.several
        if not field.several:
            assert type(value) is {"an integer": int, "a finite number": float, "True or False": bool, "text": str}[field.kind]
        assert bool(field.interval) == (field.kind in ("an integer", "a finite number"))


def value_of(name: str):
    value = default.get_config()
    for part in name.split("."):
        value = value[part]
    return value


INTERVALS = sorted((name, field.interval) for name, field in FIELDS.items() if field.interval)


@pytest.mark.parametrize(("name", "interval"), INTERVALS)
def test_a_number_out_of_its_interval_is_reported(name, interval):
    field = FIELDS[name]
    low, high = map(float, interval[1:-1].split(","))
    step, kind = (1, int) if field.kind == "an integer" else (1e-9, float)
    least, most = (low if interval[0] == "[" else low + step), (high if interval[-1] == "]" else high - step)
    outside = [kind(least - step)] + ([kind(most + step)] if high < float("inf") else [])
    inside = [kind(least)] + ([kind(most)] if high < float("inf") else [])
    words = re.compile(rf"{re.escape(name)} = (.*?)(: each)? must (be at least|be positive|not be negative|be in) ?")
    for number in [*outside, *inside]:
        value = (number,) if field.several else number
        said = [match[1] for match in map(words.match, problems(**{name.replace(".", "__"): value})) if match]
        assert said == ([str(value)] if number in outside else [])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rl.steps", "3", "must be an integer"),
        ("rl.steps", 3.0, "must be an integer"),
        ("rl.steps", True, "must be an integer"),
        ("rl.steps", None, "must be an integer"),
        ("rl.kl_weight", "0.1", "must be a finite number"),
        ("rl.kl_weight", float("inf"), "must be a finite number"),
        ("rl.kl_weight", float("nan"), "must be a finite number"),
        ("rl.kl_weight", False, "must be a finite number"),
        ("task.dense_reward", 1, "must be True or False"),
        ("data.path", 3, "must be text"),
        ("task.name", 3, "must be text"),
        ("eval.thresholds", 0.5, "must be a tuple, each entry a finite number"),
        ("eval.thresholds", (0.5, "1"), "must be a tuple, each entry a finite number"),
        ("eval.thresholds", (0.5, float("nan")), "must be a tuple, each entry a finite number"),
        ("eval.lengths", (128, 1.5), "must be a tuple, each entry an integer"),
        ("lora.targets", "q_proj", "must be a tuple, each entry text"),
    ],
)
def test_values_of_another_type_are_reported(name, value, said):
    assert problems(**{name.replace(".", "__"): value}) == [f"{name} = {value!r} {said}"]


def test_values_that_will_do():
    assert problems(rl__kl_weight=0, rl__kl_estimator="k1", eval__thresholds=[1, 2.5], eval__lengths=[], seed=2**32 - 1) == []
    assert problems(rl__importance_cap=10**400) == []


def test_fields_that_are_missing_or_unknown_are_reported():
    config = default.get_config().to_dict()
    del config["rl"]["steps"], config["seed"], config["sudoku"]
    config["rl"]["stepz"] = 3
    with pytest.raises(ValueError) as error:
        check_config(ml_collections.ConfigDict(config))
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        "rl.steps is missing", "seed is missing", "sudoku.clues_max is missing", "sudoku.clues_min is missing",
        "sudoku.first_share is missing", "there is no field rl.stepz",
    ]  # fmt: skip


ANY_VALUE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 20), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-1, 3) | st.floats() | st.text(max_size=3), max_size=3).map(tuple),
)  # fmt: skip


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), ANY_VALUE, min_size=1, max_size=3))
def test_any_value_passes_or_is_named(overrides):
    config = changed(overrides)
    try:
        check_config(config)
    except ValueError as error:
        first, *lines = str(error).splitlines()
        assert first == "the configuration cannot run:" and lines
        for line in lines:  # a rule across fields may name those beside it
            assert any(name in line or name.rpartition(".")[0] in line for name in overrides)
    else:
        for name, value in overrides.items():
            assert isinstance(value, tuple | list) == FIELDS[name].several and value == value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler__block_length": 5}, "task.response_length = 16 is not a multiple of sampler.block_length = 5"),
        ({"sampler__block_length": 4, "sampler__steps": 6}, "sampler.steps = 6 is not a multiple of the 4 blocks"),
        ({"sampler__steps": 17}, "sampler.steps = 17"),
        ({"rl__group_size": 1}, "rl.group_size = 1 must be at least 2 (advantages compare rollouts of one prompt)"),
        ({"sampler__temperature": 0.0}, "sampler.temperature = 0.0 must be positive (rollouts drawn greedily have no log-probability"),
        ({"sudoku__clues_min": 5}, "sudoku.clues_min = 5 is more than sudoku.clues_max = 4"),
        ({"countdown__numbers_min": 4}, "countdown.numbers_min = 4 is more than countdown.numbers_max = 3"),
        ({"math__steps_max": 1}, "math.steps_min = 2 is more than math.steps_max = 1"),
        ({"reasoning_gym__options": "{"}, "reasoning_gym.options = '{' must be a JSON object"),
        ({"reasoning_gym__options": "[1]"}, "reasoning_gym.options = '[1]' must be a JSON object"),
        ({"data__d1_faithful": True}, "task.name 'sudoku' is not a task of the released d1 code (data.d1_faithful)"),
        ({"model__width": 60}, "model.width = 60 must be a multiple of 2 * model.heads = 8 (RoPE rotates pairs)"),
        ({"model__width": 36}, "model.width = 36 must be a multiple of 2 * model.heads = 8 (RoPE rotates pairs)"),
        ({"model__kv_heads": 3}, "model.heads = 4 must be a multiple of model.kv_heads = 3"),
        ({"model__mask_id": 8}, "model.mask_id = 8 is not in the vocabulary of model.vocab_size = 8"),
        ({"threshold_network__gamma_min": 1.0}, "threshold_network.gamma_min = 1.0, gamma_init = 1.0, gamma_max = 8.0: each must be less"),
        ({"threshold_network__gamma_max": 0.5}, "threshold_network.gamma_min = 0.1, gamma_init = 1.0, gamma_max = 0.5: each must be less"),
        ({"eval__thresholds": (0.5, 1.0, 0.5)}, "eval.thresholds = (0.5, 1.0, 0.5) has a threshold more than once"),
        ({"eval__skip": 512}, "eval.skip = 512 leaves none of the task.test_size = 512 test problems"),
        ({"mesh__data": 0}, "mesh.data = 0, mesh.fsdp = 1, mesh.tensor = 1: sizes are at least 1"),
        ({"mesh__fsdp": -1}, "mesh.data = -1, mesh.fsdp = -1, mesh.tensor = 1: sizes are at least 1, and at most one of them is -1"),
        ({"distributed__process_id": 0}, "distributed.coordinator, .processes or .process_id is set, but distributed.initialize"),
        ({"distributed__initialize": True, "distributed__coordinator": "host"}, "distributed.coordinator = 'host' must be HOST:PORT"),
        (
            {"distributed__initialize": True, "distributed__processes": 2, "distributed__process_id": 2},
            "distributed.process_id = 2 must be less than distributed.processes = 2",
        ),
        (
            {"sampler__mixture": (0.5, 1.0), "rl__mode": "model", "sampler__rule": "margin"},
            "sampler.mixture is of thresholds, which sampler.rule = 'margin' does not use",
        ),
        ({"sampler__rule": "margin"}, "rl.mode = 'joint' trains a threshold, which sampler.rule = 'margin' does not use; rules that do: "),
        ({"rl__mode": "sampler", "sampler__rule": "random"}, "rl.mode = 'sampler' trains a threshold"),
        ({"rl__mode": "model", "sampler__rule": "low_confidence"}, "sampler.rule = 'low_confidence' picks positions by the tokens"),
        ({"sampler__refresh": 2}, "sampler.refresh = 2 has no meaning with sampler.cache = 'none'"),
        ({"distributed__coordinator": "host:1234"}, "distributed.coordinator, .processes or .process_id is set, but"),
        ({"distributed__processes": 2}, "distributed.coordinator, .processes or .process_id is set, but distributed.initialize is not"),
        (
            {"mesh__rollout__data": 2, "mesh__rollout__tensor": -1},
            "mesh.rollout.data = 2, mesh.rollout.fsdp = 0, mesh.rollout.tensor = -1: set all three, or none for the mesh of training",
        ),
        ({"mesh__rollout__fsdp": 1}, "mesh.rollout.data = 0, mesh.rollout.fsdp = 1, mesh.rollout.tensor = 0: set all three"),
        ({"eval__thresholds": ()}, "eval.thresholds is empty"),
        ({"likelihood__window": 1, "likelihood__num_latents": 1}, "likelihood.window with likelihood.num_latents = 1 never reads"),
        ({"likelihood__window": 1, "likelihood__estimator": "elbo"}, "likelihood.window = 1 has no meaning with likelihood.estim"),
        ({"likelihood__num_latents": 3, "likelihood__estimator": "coupled"}, "likelihood.num_latents = 3: complementary masks come in pai"),
        ({"sampler__mixture": (0.5, 1.0)}, "sampler.mixture is for a fixed threshold: rl.mode = 'joint'"),
    ],
)
def test_fields_that_do_not_go_together(changes, said):
    [line] = problems(**changes)
    assert line.startswith(said)


def test_fields_that_do_go_together():
    assert problems(sampler__block_length=4, sampler__steps=8, model__head_chunk=8, rl__prompts=3, rl__microbatch=16) == []
    assert problems(model__head_chunk=3, rl__prompts=3, rl__group_size=4, rl__microbatch=5) == []  # most, not exactly
    assert problems(distributed__initialize=True, distributed__coordinator="host:1234", distributed__processes=2) == []
    assert problems(distributed__initialize=True) == []
    assert problems(sampler__block_length=4, sampler__cache="dual", sampler__refresh=2) == []
    assert problems(mesh__data=1, mesh__fsdp=-1, mesh__rollout__data=-1, mesh__rollout__fsdp=1, mesh__rollout__tensor=1) == []
    for rule in set(RULES) - {"low_confidence"}:
        assert problems(rl__mode="model", sampler__rule=rule) == []


def test_all_that_is_wrong_is_said_at_once():
    lines = problems(**{name.replace(".", "__"): object() for name in FIELDS})
    assert sorted(line.split(" = ")[0] for line in lines) == sorted(FIELDS)
    together = problems(
        sampler__block_length=5, model__kv_heads=3, distributed__processes=2, mesh__rollout__data=1, eval__thresholds=(),
        rl__steps=-1, sft__steps=0, sampler__cache="nonsense", sampler__refresh=2,
    )  # fmt: skip
    assert [line.split(" ")[0] for line in together] == [  # those across fields last, but not of fields that are wrong by themselves
        "rl.steps", "sampler.cache", "sft.steps", "model.heads", "task.response_length", "eval.thresholds", "mesh.rollout.data",
        "distributed.coordinator,",
    ]  # fmt: skip
