"""The configurations: every rule of check_config, and the presets."""

import importlib

import ml_collections
import pytest

from configs import default
from diffpo_jax.config import AT_LEAST_ONE, CHOICES, NOT_NEGATIVE, POSITIVE, check_config
from diffpo_jax.sampling.unmasking import RULES

PUBLISHED = {"math": "gsm8k", "countdown": "countdown_cd3", "sudoku": "sudoku_4x4"}


def problems(**changes) -> list[str]:
    """What check_config says about the defaults with `changes` (section__field=value), a string each."""
    config = default.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    try:
        check_config(config)
    except ValueError as error:
        first, *lines = str(error).splitlines()
        assert first == "the configuration cannot run:"
        return [line.strip() for line in lines]
    return []


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


@pytest.mark.parametrize("name", sorted({*AT_LEAST_ONE, *NOT_NEGATIVE, *POSITIVE}))
def test_a_number_out_of_range_is_reported(name):
    rule, least = (
        ("be at least 1", 1) if name in AT_LEAST_ONE else ("not be negative", 0) if name in NOT_NEGATIVE else ("be positive", 1e-9)
    )
    kind = type(default.get_config()[name.split(".")[0]][name.split(".")[1]]) if "." in name else int
    wrong = [kind(least - 1)] + ([0.0] if name in POSITIVE else []) + ([float("nan")] if kind is float else [])
    for value in wrong:
        assert problems(**{name.replace(".", "__"): value}) == [f"{name} = {value} must {rule}"]
    assert not any(name in line and f"must {rule}" in line for line in problems(**{name.replace(".", "__"): kind(least)}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler__block_length": 5}, "task.response_length = 16 is not a multiple of sampler.block_length = 5"),
        ({"sampler__block_length": 4, "sampler__steps": 6}, "sampler.steps = 6 is not a multiple of the 4 blocks"),
        ({"sampler__steps": 17}, "sampler.steps = 17"),
        ({"rl__group_size": 1}, "rl.group_size = 1: "),
        ({"sampler__temperature": 0.0}, "sampler.temperature = 0: "),
        ({"sampler__rule": "margin"}, "rl.mode = 'joint' trains a threshold, which sampler.rule = 'margin' does not use; rules that do: "),
        ({"rl__mode": "sampler", "sampler__rule": "random"}, "rl.mode = 'sampler' trains a threshold"),
        ({"rl__mode": "model", "sampler__rule": "low_confidence"}, "sampler.rule = 'low_confidence' picks positions by the tokens"),
        ({"sampler__refresh": 2}, "sampler.refresh = 2 has no meaning with sampler.cache = 'none'"),
        ({"distributed__coordinator": "host:1234"}, "distributed.coordinator or distributed.processes is set, but distributed.initialize"),
        ({"distributed__processes": 2}, "distributed.coordinator or distributed.processes is set, but distributed.initialize is not"),
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
    wrong = dict.fromkeys(CHOICES, "nonsense") | dict.fromkeys(AT_LEAST_ONE, 0) | dict.fromkeys([*NOT_NEGATIVE, *POSITIVE], -1)
    lines = problems(**{name.replace(".", "__"): value for name, value in wrong.items()})
    assert sorted(line.split(" = ")[0] for line in lines) == sorted(wrong)
    together = problems(
        sampler__block_length=5, rl__group_size=1, distributed__processes=2, mesh__rollout__data=1, eval__thresholds=()
    )  # fmt: skip
    assert len(together) == 5
