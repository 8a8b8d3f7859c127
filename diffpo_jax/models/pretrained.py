"""Published weights in and out: LLaDA and Dream in Hugging Face's layout.

Layouts as published: LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487). A table (`tensor_table`) says where each published tensor lies
in the policy's parameters; reading and writing both follow it. Hosts never hold more of a model than the tensor (reading) or the shard
(writing) at hand.
"""

import contextlib
import functools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffpo_jax import storage
from diffpo_jax.models.lora import PROJECTIONS
from diffpo_jax.models.transformer import OURS, ModelConfig, Policy

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = (  # what a model directory holds beside its weights; modelling code is copied for the export's readers, never run here
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "*.py",
)  # fmt: skip
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # by safetensors' names
SHOWN = 10  # tensors of a kind that an error names

_MODULES = {  # by `model_type` of config.json: our module -> the published one
    "llada": {
        "embed": "model.transformer.wte", "final_norm": "model.transformer.ln_f", "head_proj": "model.transformer.ff_out",
    } | {
        ours: f"model.transformer.blocks.{{}}.{theirs}" for ours, theirs in {
            "attn_norm": "attn_norm", "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "attn_out": "attn_out",
            "mlp_norm": "ff_norm", "gate_proj": "ff_proj", "up_proj": "up_proj", "down_proj": "ff_out",
        }.items()
    },
    "Dream": {
        "embed": "model.embed_tokens", "final_norm": "model.norm", "head_proj": "lm_head",
    } | {
        ours: f"model.layers.{{}}.{theirs}" for ours, theirs in {
            "attn_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
            "attn_out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
        }.items()
    },
}  # fmt: skip
_FIELDS = {  # field of ModelConfig -> of config.json
    "llada": {
        "vocab_size": "embedding_size", "mask_id": "mask_token_id", "width": "d_model", "layers": "n_layers", "heads": "n_heads",
        "mlp_width": "mlp_hidden_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "tie_embeddings": "weight_tying",
    },
    "Dream": {
        "vocab_size": "vocab_size", "mask_id": "mask_token_id", "width": "hidden_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "mlp_width": "intermediate_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
}  # fmt: skip
_KV_HEADS = {"llada": "n_kv_heads", "Dream": "num_key_value_heads"}  # absent or null = as many as query heads
_CONVENTIONS = {
    "llada": {"shift": False, "count_positions": "all", "mask_in_confidence": True},
    "Dream": {"shift": True, "count_positions": "valid", "mask_in_confidence": True, "qkv_bias": True},
}
# Field of config.json -> the values that the transformer here implements; None = absent or null
_ACCEPTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llada": {
        "block_type": ("llama",), "layer_norm_type": ("rms",), "activation_type": ("silu",), "rope": (True,), "block_group_size": (1, None),
        "rope_full_precision": (True, None), "layer_norm_with_affine": (True, None),
        **dict.fromkeys(
            ("alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias", "input_emb_norm", "multi_query_attention",
             "scale_logits", "use_sliding_window"), (False, None),
        ),
        **dict.fromkeys(("clip_qkv", "rope_scaling", "rope_parameters", "sliding_window"), (None,)),
    },
    "Dream": {
        "hidden_act": ("silu",), "rope_scaling": (None,), "rope_parameters": (None,), "use_sliding_window": (False, None),
        "use_mrope": (False, None),
    },
}  # fmt: skip


def resolve(path: str | os.PathLike, weights: bool = True) -> str:
    """The folder of a model: `path` itself where it is one, else that of the hub name `path` ("GSAI-ML/LLaDA-8B-Instruct"), downloaded,
    on request without its weights.

    Raises:
      FileNotFoundError: it is neither, or cannot be downloaded; the message says what to download and which field to set.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"there is no folder {name!r}: set --config.model.pretrained to a model's folder or to its hub name")
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(name, allow_patterns=[*(["*.safetensors", INDEX] if weights else []), *COMPANIONS])
    except Exception as error:  # offline, unknown, gated, not installed: whatever it is, the way out is the same
        cause = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{name!r} is no folder here, and downloading it from the hub failed ({type(error).__name__}: {cause}). Where there is a "
            f"network run `hf download {name} --local-dir DIR` (once `huggingface-cli download`), then set --config.model.pretrained=DIR"
        ) from error


def read_model_type(path: str | os.PathLike) -> str:
    """`model_type` of a model's config.json: a key of the layouts known here.

    Raises:
      FileNotFoundError: no such model, see `resolve`.
      ValueError: another architecture; the known ones are listed.
    """
    file = Path(resolve(path)) / "config.json"
    found: Any = read_json(file).get("model_type")
    published_modules(found, f"{file}: ")
    return found


def read_config(path: str | os.PathLike, **ours: Any) -> ModelConfig:
    """The `ModelConfig` of a published model's config.json; the fields in `OURS` may be given.

    Raises:
      FileNotFoundError: no such model, see `resolve`.
      ValueError: another architecture, a field that is missing, or one whose value is not implemented here; all in one message.
    """
    kind, file = read_model_type(path), Path(resolve(path)) / "config.json"
    raw = read_json(file)
    problems = []
    numbers = {theirs: float if ours in ("rope_theta", "norm_eps") else int for ours, theirs in _FIELDS[kind].items()}
    numbers |= {_KV_HEADS[kind]: int} if raw.get(_KV_HEADS[kind]) is not None else {}
    for field, number in numbers.items():
        if not isinstance(raw.get(field), int | number):
            what = "a number" if number is float else "an integer"
            problems.append(f"{field} = {raw[field]!r} is not {what}" if field in raw else f"{field} is missing")
    for field, accepted in _ACCEPTED[kind].items():
        if raw.get(field) not in accepted:
            known = " or ".join("null" if value is None else json.dumps(value) for value in accepted)
            problems.append(f"{field} = {json.dumps(raw.get(field))} is not implemented, only {known}")
    fields: dict[str, Any] = {ours: raw.get(theirs) for ours, theirs in _FIELDS[kind].items()}
    if not problems and raw.get("head_dim") not in (None, fields["width"] / max(fields["heads"], 1)):
        problems.append(f"head_dim = {raw['head_dim']} is not implemented, only width / heads = {fields['width']} / {fields['heads']}")
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    kv_heads = raw.get(_KV_HEADS[kind])
    fields |= {"kv_heads": fields["heads"] if kv_heads is None else kv_heads, "qkv_bias": bool(raw.get("include_qkv_bias"))}
    fields |= {"tie_embeddings": bool(fields["tie_embeddings"]), **_CONVENTIONS[kind], **ours}
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_special_ids(path: str | os.PathLike) -> dict[str, int]:
    """`eos_id` and `pad_id` of a model's config.json.

    Raises:
      FileNotFoundError: no such model, see `resolve`.
      ValueError: one is missing or not a number.
    """
    file = Path(resolve(path)) / "config.json"
    raw = read_json(file)
    ids: dict[str, Any] = {"eos_id": raw.get("eos_token_id"), "pad_id": raw.get("pad_token_id")}
    if not all(isinstance(value, int) for value in ids.values()):
        raise ValueError(f"{file} must give eos_token_id and pad_token_id as numbers; it has {ids['eos_id']!r} and {ids['pad_id']!r}")
    return ids


class Slot(NamedTuple):
    """Where a published tensor lies in the policy's parameters."""

    path: tuple[str, ...]  # of the leaf
    layer: int | None  # index in the leaf's first axis; None = the tensor is the leaf
    transpose: bool  # Torch keeps [out, in]
    shape: tuple[int, ...]  # as published


def tensor_table(model_type: str, config: ModelConfig) -> dict[str, Slot]:
    """Published name -> `Slot`, of every parameter of a policy of `config`; needs no weights.

    Raises:
      ValueError: unknown `model_type`.
    """
    modules = published_modules(model_type)
    table = {}
    for path, leaf in flatten_dict(jax.eval_shape(Policy(config).init, jax.random.key(0))).items():
        module, kind = path[-2:]
        name = f"{modules[module]}.{'bias' if kind == 'bias' else 'weight'}"
        stacked, transpose = path[0] == "blocks", kind == "kernel"
        shape = leaf.shape[1:] if stacked else leaf.shape
        for layer in range(config.layers) if stacked else [None]:
            table[name.format(layer)] = Slot(path, layer, transpose, shape[::-1] if transpose else shape)
    return table


def published_projections(model_type: str) -> dict[str, str]:
    """The published names of a block's seven projections -> our names (`lora.PROJECTIONS`).

    Raises:
      ValueError: unknown `model_type`.
    """
    modules = published_modules(model_type)
    return {modules[ours].rpartition(".")[2]: ours for ours in PROJECTIONS}


# --- the weights ---


def on_default_device(path: tuple[str, ...], ndim: int) -> Sharding:
    """The sharding of every parameter where one device holds all of them."""
    del path, ndim
    return SingleDeviceSharding(jnp.zeros(()).device)


def load_pretrained(
    path: str | os.PathLike, dtype: str | None = None, place: Callable[[tuple[str, ...], int], Sharding] = on_default_device
) -> tuple[Policy, Any]:
    """Reads a published model, tensor by tensor, straight into device arrays; a host reads only what its devices hold.

    Args:
      path: folder or hub name, see `resolve`.
      dtype: of the parameters: float32 | bfloat16; None = as stored (the wider one where the layers of a leaf differ).
      place: the sharding of a parameter, of its path and number of dimensions (see `sharding.param_sharding`).

    Returns:
      (policy, params): params as of `Policy.init`.

    Raises:
      FileNotFoundError: no such model, no config.json, no weights, or a shard that is missing.
      ValueError: an architecture that is not implemented, a damaged shard, or tensors that do not fit config.json.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype = {dtype!r} is unknown; known: float32, bfloat16, None (as stored)")
    folder = Path(resolve(path))
    config = read_config(folder)
    table = tensor_table(read_model_type(folder), config)
    shards = _stored_tensors(folder)
    _check_tensors(folder, {name: slot.shape for name, slot in table.items()}, shards)

    dtypes: dict[tuple[str, ...], Any] = {}
    for name, (_, stored) in ((name, info) for shard in shards.values() for name, info in shard.items()):
        leaf = table[name].path
        dtypes[leaf] = jnp.dtype(dtype or jnp.promote_types(dtypes.get(leaf, DTYPES[stored]), DTYPES[stored]))
    leaves: dict[tuple[str, ...], Any] = {}
    for file, shard in shards.items():
        with safe_open(file, "np") as tensors:
            for name in shard:
                slot, stored = table[name], tensors.get_slice(name)
                shape = slot.shape[::-1] if slot.transpose else slot.shape
                read = functools.partial(_read_part, stored, slot.transpose, dtypes[slot.path])
                leaf = jax.make_array_from_callback(shape, place(slot.path, len(shape)), read)
                if slot.layer is not None:
                    write = _layer_writer(config.layers, place(slot.path, len(shape) + 1))
                    leaf = write(leaves.get(slot.path), leaf, slot.layer)
                leaves[slot.path] = jax.block_until_ready(leaf)  # or tensors wait on the host faster than they leave it
    return Policy(config), unflatten_dict(leaves)


def _read_part(stored: Any, transpose: bool, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """The part of a stored tensor that belongs at `index` of the parameter."""
    return (stored[index[::-1]].T if transpose else stored[index]).astype(dtype)


@functools.cache
def _layer_writer(layers: int, sharding: Sharding):
    """`write(stacked, leaf, layer)`: puts a layer's leaf where it belongs; `stacked` is None before the first."""

    def write(stacked, leaf, layer):
        stacked = jnp.zeros((layers, *leaf.shape), leaf.dtype) if stacked is None else stacked
        return jax.lax.dynamic_update_index_in_dim(stacked, leaf, layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def save_pretrained(folder: str | os.PathLike, policy: Policy, params: Any, source: str | os.PathLike) -> None:
    """Writes a policy as a model directory like `source`, the one it was read from.

    Names, shards and dtypes of the tensors are the source's (float32 parameters are rounded to its bfloat16); configuration, tokenizer
    and modelling code are copied. Reading it back gives the same parameters bit for bit where they have the source's precision.

    Args:
      folder: new or empty; it appears under this name when all is written.
      policy: of the source's sizes.
      params: as of `Policy.init`, without adapters (see `Trainable.merge`).
      source: folder or hub name.

    Raises:
      FileExistsError: `folder` has something in it.
      ValueError: `policy`, `params` and `source` do not fit together.
    """
    source = Path(resolve(source))
    ours = policy.config
    expected = read_config(source, **{name: getattr(ours, name) for name in OURS})
    if ours != expected:
        raise ValueError(f"the policy is not of the sizes of {source}: {ours} instead of {expected}")
    table, shards, leaves = tensor_table(read_model_type(source), expected), _stored_tensors(source), flatten_dict(params)
    _check_tensors(source, {name: slot.shape for name, slot in table.items()}, shards)
    shapes = _shapes(jax.eval_shape(policy.init, jax.random.key(0)))
    check_fit("the parameters do not fit the policy (merge adapters first)", shapes, _shapes(params))
    with new_folder(folder) as partial:
        for file, shard in shards.items():
            tensors = {name: _published(leaves[table[name].path], table[name], DTYPES[stored]) for name, (_, stored) in shard.items()}
            save_file(tensors, partial / file.name, metadata={"format": "pt"})
        index = [INDEX] if set(shards) != {source / WEIGHTS} else []
        for file in sorted({file for pattern in [*COMPANIONS, *index] for file in source.glob(pattern) if file.is_file()}):
            shutil.copyfile(file, partial / file.name)


def _published(leaf: jax.Array, slot: Slot, dtype: str) -> np.ndarray:
    """The published tensor of `slot`, on the host."""
    tensor = np.asarray((leaf if slot.layer is None else leaf[slot.layer]).astype(jnp.dtype(dtype)))
    return np.ascontiguousarray(tensor.T if slot.transpose else tensor)


def _stored_tensors(folder: Path) -> dict[Path, dict[str, tuple[tuple[int, ...], str]]]:
    """Shard -> tensor -> (shape, dtype by safetensors' name), from the headers alone."""
    if (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).exists():
        files = [folder / name for name in _shard_names(folder / INDEX)]
        lost = [file.name for file in files if not file.exists()]
        if lost:
            raise FileNotFoundError(f"{folder}: {INDEX} names shards that are not there: {_some(lost)}; download them into that folder")
    else:
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}: only weights in safetensors are read; download them")
    shards = {}
    for file in files:
        with open_tensors(file) as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            shards[file] = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    return shards


def _shard_names(index: Path) -> list[str]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index}: weight_map must be an object that gives the file of each tensor. Download it again")
    return sorted(set(named.values()))


def _check_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]], shards: Mapping) -> None:
    """Raises ValueError unless the shards hold each expected tensor once, in its shape, in a dtype that is read here."""
    pairs = [(name, info) for shard in shards.values() for name, info in shard.items()]
    more = {
        "in more than one shard": sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1),
        f"of a dtype other than {', '.join(DTYPES)}": [f"{name}: {dtype}" for name, (_, dtype) in pairs if dtype not in DTYPES],
    }
    check_fit(f"the weights in {folder} do not fit its config.json", expected, {name: shape for name, (shape, _) in pairs}, more)


# --- helpers ---


def published_modules(model_type: Any, where: str = "") -> dict[str, str]:
    if not isinstance(model_type, str) or model_type not in _MODULES:
        raise ValueError(f"{where}model_type = {model_type!r} is not implemented; known: {', '.join(_MODULES)}")
    return _MODULES[model_type]


def check_fit(what: str, expected: Mapping[str, Any], found: Mapping[str, Any], more: Mapping[str, list[str]] | None = None) -> None:
    """Raises one ValueError, headed by `what`, that lists the differences between two {name: shape} and the faults in `more`."""
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "mis-shaped": [
            f"{name}: expected {list(expected[name])}, found {list(found[name])}"
            for name in sorted(expected.keys() & found.keys())
            if tuple(expected[name]) != tuple(found[name])
        ],
    } | dict(more or {})
    lines = [f"  {kind} ({len(names)}): {_some(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise ValueError("\n".join([f"{what}:", *lines]))


def _some(names: list[str]) -> str:
    return ", ".join([*names[:SHOWN], *([f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else [])])


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{"blocks/q_proj/kernel": shape} of parameters."""
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def read_json(file: Path) -> dict:
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}")
    return storage.read_object(file)


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """`safe_open`, with errors that say which file."""
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}")
    try:
        tensors = safe_open(file, "np")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): download it again") from None
    with tensors:
        yield tensors


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` at the end; nothing is left of it after an error."""
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another, or remove it")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
