import json

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import math, reasoning_gym, sudoku
from diffpo_jax import build, sharding
from diffpo_jax.models.transformer import ModelConfig
from tests.published_model import write_model


def make_config(preset, **fields):
    config = math.get_config(preset)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def test_targets_have_the_published_names(tmp_path):
    model = str(write_model(tmp_path / "model"))
    config = make_config("published_debug", model__pretrained=model, lora__targets=("q_proj", "ff_proj", "ff_out"))
    assert build.make_trainable(config).targets == ("q_proj", "gate_proj", "down_proj")
    with pytest.raises(ValueError, match="lora.targets: down_proj matches nothing; known: .*ff_out"):
        build.make_trainable(make_config("published_debug", model__pretrained=model, lora__targets=("q_proj", "down_proj")))
    with pytest.raises(ValueError, match="ff_proj matches nothing; known: .*gate_proj"):
        build.make_trainable(make_config("tiny", lora__rank=2, lora__targets=("ff_proj",)))


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="gsm8k holds any text: set --config.model.pretrained"):
        build.build(make_config("published_debug"), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no folder 'nowhere'"):
        build.build(make_config("published_debug", model__pretrained="nowhere"), str(tmp_path))
    model = str(write_model(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match="data.path"):
        build.build(make_config("published_debug", model__pretrained=model), str(tmp_path))


def test_a_vocabulary_that_is_not_the_tokenizers():
    config = sudoku.get_config("debug")
    config.model.vocab_size = 9
    with pytest.raises(ValueError, match="model.vocab_size = 9 and model.mask_id = 2, but the tokenizer of sudoku has 8 and 2"):
        build.own_policy(config)


SIZES = dict(vocab_size=12, mask_id=2, width=16, layers=1, heads=4, kv_heads=2, mlp_width=24)


def fake_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def make_meshes(monkeypatch, mesh, rollout=None, sizes=None, **fields):
    """build.make_meshes where the devices make these meshes."""
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices: fake_mesh(*mesh))
    monkeypatch.setattr(sharding, "remesh", lambda mesh, sizes: fake_mesh(*rollout))
    batches = {"sft__batch_size": 12, "rl__prompts": 4, "rl__group_size": 3, "eval__batch_size": 12}
    config = make_config("debug", **batches | fields | {f"mesh__rollout__{axis}": 1 for axis in sharding.AXES if rollout})
    return build.make_meshes(config, ModelConfig(**SIZES | (sizes or {})))


def test_meshes_of_training_and_of_rollouts(monkeypatch):
    assert make_meshes(monkeypatch, (3, 1, 2)) == (fake_mesh(3, 1, 2), fake_mesh(3, 1, 2))
    assert make_meshes(monkeypatch, (3, 2, 1), (6, 1, 1)) == (fake_mesh(3, 2, 1), fake_mesh(6, 1, 1))


@pytest.mark.parametrize(
    ("mesh", "rollout", "fields", "sizes", "said"),
    [
        ((2, 2, 1), None, {"sft__batch_size": 6}, {}, "sft.batch_size = 6 is not a multiple of the 4 devices .* data = 2 x fsdp = 2"),
        ((4, 1, 1), None, {"rl__prompts": 6}, {}, r"rl.prompts \* rl.group_size = 18 is not a multiple of the 4 .* data = 4"),
        ((4, 1, 1), None, {"eval__batch_size": 6}, {}, "eval.batch_size = 6 is not a multiple of the 4"),
        ((4, 1, 1), (1, 8, 1), {}, {}, r"rl.prompts \* rl.group_size = 12 is not a multiple of the 8 devices on the mesh axes fsdp = 8"),
        ((4, 1, 1), (8, 1, 1), {"rl__prompts": 8}, {}, "eval.batch_size = 12 is not a multiple of the 8 devices on the mesh axes data = 8"),
        ((4, 1, 1), (8, 1, 1), {"rl__prompts": 8, "eval__batch_size": 8}, {}, None),  # sft does not run on the mesh of rollouts
        ((4, 1, 1), None, {"sampler__lanes": 6}, {}, "sampler.lanes = 6 is not a multiple of the 4 devices on the mesh axes data = 4"),
        ((1, 1, 1), (1, 4, 1), {"sampler__lanes": 6}, {}, "sampler.lanes = 6 is not a multiple of the 4 .* fsdp = 4"),
        ((4, 1, 1), (1, 1, 1), {"sampler__lanes": 3}, {}, None),  # lanes are those of rollouts
        ((1, 1, 4), None, {}, {}, "model.kv_heads = 2 is not a multiple of the 4 devices on the mesh axes tensor = 4"),
        ((1, 1, 1), (1, 1, 4), {}, {}, "model.kv_heads = 2 is not a multiple of the 4"),
    ],
)
def test_sizes_that_the_meshes_do_not_divide(monkeypatch, mesh, rollout, fields, sizes, said):
    if said is None:
        make_meshes(monkeypatch, mesh, rollout, sizes, **fields)
        return
    with pytest.raises(ValueError, match=said):
        make_meshes(monkeypatch, mesh, rollout, sizes, **fields)


def test_presets_of_published_models_differ_by_named_fields():
    presets = math.PRESETS
    assert {"llada_8b", "dream_7b_d1", "llada_8b_wd1"} <= presets.keys()
    differing = {name for name in presets["llada_8b_d1"] if presets["llada_8b_d1"][name] != presets["llada_8b"].get(name)}
    assert differing == {
        "algorithm", "rl.mode", "rl.objective", "rl.importance_weights", "rl.nfe_penalty", "likelihood.estimator", "likelihood.num_latents",
        "likelihood.prompt_masking", "likelihood.window", "sampler.rule", "sampler.steps",
    }  # fmt: skip


def test_a_data_set_of_reasoning_gym(tmp_path):
    pytest.importorskip("reasoning_gym", reason="the optional extra gym is not installed")
    config = reasoning_gym.get_config("published_debug")
    config.model.pretrained = str(write_model(tmp_path / "model"))
    config.reasoning_gym.dataset = "chain_sum"
    parts = build.build(config, str(tmp_path))
    assert [len(parts.sources[split]) for split in ("train", "test")] == [64, 8]
    problem = parts.sources["test"][0]
    entry = json.loads(problem["answer"])
    right = parts.tokenizer.encode(f"<reasoning></reasoning><answer>{entry['entry']['answer']}</answer>")
    grades = build.grade(parts, "test", np.array([0, 0]), np.array([right, parts.tokenizer.encode("?") * len(right)]))
    np.testing.assert_array_equal(grades.correct, [1.0, 0.0])
