"""LoRA adapters in PEFT's layout in and out, and the threshold network's files, which lie beside them or beside a model."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from diffpo_jax.models.lora import PROJECTIONS, Trainable
from diffpo_jax.models.pretrained import check_fit, new_folder, open_tensors, published_modules, read_json
from diffpo_jax.models.transformer import Policy

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD, HEAD_CONFIG = "threshold_head.safetensors", "threshold_head.json"
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {  # what PEFT's other settings must be for y = x W + (alpha / r) x A B
    "peft_type": ("LORA",), "bias": ("none", None), "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "modules_to_save": ([], None),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"), (False, None)),
}  # fmt: skip


def save_adapter(folder: str | os.PathLike, trainable: Trainable, adapters: Any, model_type: str, base_name: str) -> None:
    """Writes LoRA adapters in PEFT's layout.

    Args:
      folder: new or empty; it appears under this name when all is written.
      trainable: their rank, alpha and dropout.
      adapters: as of `trainable.init`.
      model_type: of the base model, see `read_model_type`.
      base_name: its hub name or folder, for the configuration.

    Raises:
      FileExistsError: `folder` has something in it.
      ValueError: no adapters (rank 0), or an unknown `model_type`.
    """
    if not trainable.rank:
        raise ValueError("lora.rank = 0: there are no adapters to write; write the model with save_pretrained")
    modules, tensors = published_modules(model_type), {}
    for target, pair in adapters["blocks"].items():
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer, matrix in enumerate(np.asarray(pair[ours])):
                tensors[_peft_name(modules[target], layer, theirs)] = np.ascontiguousarray(matrix.T)
    # One pattern for the whole name: a list would be of endings, and that of LLaDA's MLP output is also that of its head.
    names = [re.escape(modules[target]).replace(r"\{\}", r"\d+") for target in adapters["blocks"]]
    settings = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_name, "inference_mode": True, "r": trainable.rank,
        "lora_alpha": trainable.alpha, "lora_dropout": trainable.dropout, "target_modules": "|".join(names), "bias": "none",
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "modules_to_save": None,
    }  # fmt: skip
    with new_folder(folder) as partial:
        save_file(tensors, partial / ADAPTER, metadata={"format": "pt"})
        _write_json(partial / ADAPTER_CONFIG, settings)


def load_adapter(folder: str | os.PathLike, policy: Policy, model_type: str) -> tuple[Trainable, Any]:
    """Reads LoRA adapters in PEFT's layout, for a policy read from their base model: (trainable, adapters as of `trainable.init`).

    The targets are the projections that the file has tensors of.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a variant of LoRA that is not implemented, or tensors that do not fit the policy.
    """
    folder, modules, layers = Path(folder), published_modules(model_type), policy.config.layers
    settings = read_json(folder / ADAPTER_CONFIG)
    problems = [f"{field} = {settings.get(field)!r}" for field, accepted in _PLAIN_LORA.items() if settings.get(field) not in accepted]
    if problems:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: not implemented: {', '.join(problems)}")
    rank, alpha, dropout = settings.get("r"), settings.get("lora_alpha", ""), settings.get("lora_dropout") or 0.0
    if not isinstance(rank, int) or not all(isinstance(value, int | float) for value in (alpha, dropout)):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: r = {rank!r}, lora_alpha = {alpha!r}, lora_dropout = {dropout!r} must be numbers")
    with open_tensors(folder / ADAPTER) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    kernels = jax.eval_shape(policy.init, jax.random.key(0))["blocks"]
    names: dict[str, dict[str, list[str]]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for target in PROJECTIONS:
        mine = {key: [_peft_name(modules[target], layer, key) for layer in range(layers)] for key in ("lora_A", "lora_B")}
        if not stored.keys().isdisjoint(mine["lora_A"] + mine["lora_B"]):
            _, inputs, outputs = kernels[target]["kernel"].shape
            names[target] = mine
            expected |= dict.fromkeys(mine["lora_A"], (rank, inputs)) | dict.fromkeys(mine["lora_B"], (outputs, rank))
    check_fit(f"the adapters in {folder} do not fit the model", expected, {name: tensor.shape for name, tensor in stored.items()})

    def stack(parts):
        return jnp.asarray(np.stack([stored[name].T for name in parts]).astype(np.float32))

    adapters = {target: {"lora_a": stack(mine["lora_A"]), "lora_b": stack(mine["lora_B"])} for target, mine in names.items()}
    targets = () if len(names) == len(PROJECTIONS) else tuple(names)
    return Trainable(rank, float(alpha), float(dropout), targets), {"blocks": adapters}


def save_threshold_head(folder: str | os.PathLike, head_settings: Mapping[str, Any], params: Any) -> None:
    """Writes a threshold network into `folder`, beside the model or adapter of which it read the hidden states.

    Args:
      folder: made if absent.
      head_settings: the fields of its `ThresholdHead`, as JSON can hold them.
      params: its parameters, a nested dict of arrays.

    Raises:
      FileExistsError: one is already there.
    """
    folder = Path(folder)
    there = [name for name in (HEAD, HEAD_CONFIG) if (folder / name).exists()]
    if there:
        raise FileExistsError(f"{folder} already has {' and '.join(there)}: choose another folder")
    tensors = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep=".").items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as partial:
        save_file(tensors, Path(partial) / HEAD, metadata={"format": "pt"})
        _write_json(Path(partial) / HEAD_CONFIG, head_settings)
        for name in (HEAD, HEAD_CONFIG):
            (Path(partial) / name).replace(folder / name)


def load_threshold_head(folder: str | os.PathLike) -> tuple[dict[str, Any], Any]:
    """(head_settings, params) as `save_threshold_head` wrote them.

    Raises:
      FileNotFoundError: a file is missing.
    """
    folder = Path(folder)
    settings = read_json(folder / HEAD_CONFIG)
    with open_tensors(folder / HEAD):  # checks it
        params = load_file(folder / HEAD)
    return settings, unflatten_dict({name: jnp.asarray(leaf) for name, leaf in params.items()}, sep=".")


def _peft_name(module: str, layer: int, key: str) -> str:
    return f"base_model.model.{module.format(layer)}.{key}.weight"


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
