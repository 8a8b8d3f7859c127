"""Adapters in PEFT's layout and the threshold network's files: round trips, names and orientation, errors."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffpo_jax.models.adapters import load_adapter, load_threshold_head, save_adapter, save_threshold_head
from diffpo_jax.models.lora import Trainable
from diffpo_jax.models.pretrained import read_config
from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.models.transformer import Policy
from tests.models.test_pretrained import DATA, DREAM, PUBLISHED, assert_bitwise, load, published_keys


def make_adapters(policy, **options):
    trainable = Trainable(**options)
    base = jax.eval_shape(policy.init, jax.random.key(0))
    shapes = jax.eval_shape(trainable.init, jax.random.key(0), base)
    rng = np.random.default_rng(0)
    return trainable, jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize(("name", "kind"), [("llada_tiny_gqa", "llada"), (DREAM, "Dream")])
@pytest.mark.parametrize("targets", [(), ("v_proj", "down_proj")])
def test_adapters_come_back(tmp_path, name, kind, targets):
    policy = Policy(read_config(DATA / name))
    trainable, adapters = make_adapters(policy, rank=3, alpha=12.0, dropout=0.05, targets=targets)
    save_adapter(tmp_path / "adapter", trainable, adapters, kind, "owner/base")
    again, loaded = load_adapter(tmp_path / "adapter", policy, kind)
    assert again == trainable
    assert_bitwise(loaded, adapters)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_adapter(tmp_path / "adapter", trainable, adapters, kind, "owner/base")


def test_adapters_are_in_pefts_layout(tmp_path):
    """W + (alpha / r) B A with PEFT's names and orientation is the kernel that `merge` gives."""
    policy, params = load("llada_tiny_gqa")
    trainable, adapters = make_adapters(policy, rank=3, alpha=12.0, targets=("k_proj", "gate_proj", "down_proj"))
    save_adapter(tmp_path / "adapter", trainable, adapters, "llada", "owner/base")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights, merged = load_file(DATA / "llada_tiny_gqa" / "model.safetensors"), trainable.merge(params, adapters)["blocks"]
    assert len(tensors) == 3 * 3 * 2
    for ours, theirs, outputs, inputs in (("k_proj", "k_proj", 16, 32), ("gate_proj", "ff_proj", 48, 32), ("down_proj", "ff_out", 32, 48)):
        for layer in range(3):
            module = f"model.transformer.blocks.{layer}.{theirs}"
            a, b = (tensors[f"base_model.model.{module}.lora_{key}.weight"] for key in "AB")
            assert a.shape == (3, inputs) and b.shape == (outputs, 3)
            np.testing.assert_allclose(merged[ours]["kernel"][layer].T, weights[f"{module}.weight"] + 4.0 * b @ a, atol=1e-4)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["base_model_name_or_path"] == "owner/base"
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 12.0, 0.0)


@pytest.mark.parametrize(("published", "kind"), PUBLISHED.items())
def test_the_targets_of_an_adapter_match_its_modules_and_no_other(tmp_path, published, kind):
    """PEFT adapts the modules whose whole name `target_modules`, a pattern, matches: LLaDA's head, also an `ff_out`, is not one of them."""
    policy = Policy(read_config(DATA / "llada_tiny"))
    save_adapter(tmp_path / "adapter", *make_adapters(policy, rank=1, targets=("attn_out", "down_proj")), kind, "owner/base")
    pattern = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    modules = {name.removesuffix(".weight") for name in published_keys(published).names}
    matched = {module for module in modules if re.fullmatch(pattern, module)}
    if kind == "llada":
        assert matched == {f"model.transformer.blocks.{layer}.{module}" for layer in range(32) for module in ("attn_out", "ff_out")}
    else:
        assert matched == {f"model.layers.{layer}.{module}" for layer in range(28) for module in ("self_attn.o_proj", "mlp.down_proj")}


def test_adapters_that_do_not_fit(tmp_path):
    policy = Policy(read_config(DATA / "llada_tiny_gqa"))
    trainable, adapters = make_adapters(policy, rank=3)
    folder = tmp_path / "adapter"
    save_adapter(folder, trainable, adapters, "llada", "owner/base")
    with pytest.raises(ValueError, match=r"unexpected \(42\)"):
        load_adapter(folder, policy, "Dream")
    with pytest.raises(ValueError, match=r"mis-shaped \(6\): .*0\.k_proj\.lora_B\.weight: expected \[32, 3\], found \[16, 3\]"):
        load_adapter(folder, Policy(read_config(DATA / "llada_tiny")), "llada")
    file, tensors = folder / "adapter_model.safetensors", load_file(folder / "adapter_model.safetensors")
    lost = "base_model.model.model.transformer.blocks.1.up_proj.lora_A.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    with pytest.raises(ValueError, match=rf"missing \(1\): {lost}"):
        load_adapter(folder, policy, "llada")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True, "alpha_pattern": {"q_proj": 1}}))
    with pytest.raises(ValueError, match="not implemented: alpha_pattern = .*, use_dora = True"):
        load_adapter(folder, policy, "llada")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_adapter(folder, policy, "llada")
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(tmp_path / "none", Trainable(), {}, "llada", "owner/base")


@pytest.mark.parametrize("distribution", ["normal", "categorical"])
def test_threshold_head_comes_back(tmp_path, distribution):
    settings = dict(hidden=8, gamma_min=0.1, gamma_max=8.0, gamma_init=1.0, std_init=0.5, distribution=distribution, grid_size=5)
    head = ThresholdHead(**settings)
    params = head.init(jax.random.key(0), 32)
    (tmp_path / "config.json").write_text("{}")  # it goes beside a model
    save_threshold_head(tmp_path, settings, params)
    loaded, again = load_threshold_head(tmp_path)
    assert loaded == settings
    assert_bitwise(again, params)
    features = jax.random.normal(jax.random.key(1), (4, 32))
    np.testing.assert_array_equal(ThresholdHead(**loaded).mode(again, features).gamma, head.mode(params, features).gamma)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "threshold_head.safetensors", "threshold_head.json"}
    with pytest.raises(FileExistsError, match="already has threshold_head.safetensors and threshold_head.json"):
        save_threshold_head(tmp_path, settings, params)
    (tmp_path / "threshold_head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="threshold_head.safetensors"):
        load_threshold_head(tmp_path)
