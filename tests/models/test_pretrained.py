"""Published weights in and out: golden outputs of the published code, key lists of the published models, round trips, errors."""

import dataclasses
import functools
import json
import re
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffpo_jax.models import pretrained
from diffpo_jax.models.lora import PROJECTIONS, Trainable
from diffpo_jax.models.pretrained import load_pretrained, published_projections, read_config, save_pretrained, tensor_table
from diffpo_jax.models.transformer import ModelConfig, Policy
from diffpo_jax.sampling.denoise import denoise
from diffpo_jax.sharding import make_mesh, param_sharding
from tests.reference import LOGITS

DATA = Path(__file__).resolve().parents[1] / "testdata"
SHARED = Path(__file__).resolve().parents[2].parent / "shared"
LLADA, DREAM, MASK = ("llada_tiny", "llada_tiny_gqa"), "dream_tiny", 60
PUBLISHED = {"llada_8b_instruct": "llada", "dream_7b_instruct": "Dream"}
OTHERS = np.arange(64) != MASK


def load(name):
    return load_pretrained(DATA / name)


def golden(name):
    with np.load(DATA / name / "golden.npz") as arrays:
        return dict(arrays)


def leaves_of(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_bitwise(got, expected):
    got, expected = leaves_of(got), leaves_of(expected)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        assert got[name].dtype == leaf.dtype and got[name].shape == leaf.shape, name
        assert np.asarray(got[name]).tobytes() == np.asarray(leaf).tobytes(), name


# --- the published code's outputs ---


@pytest.mark.parametrize("name", LLADA)
def test_llada_logits_are_the_published(name):
    policy, params = load(name)
    data = golden(name)
    valid = data["attention_mask"].astype(bool)
    assert not valid.all()
    for mask, expected in ((np.ones_like(valid), data["logits"]), (valid, data["logits_masked"])):
        logits = np.asarray(LOGITS(policy, params, data["tokens"], mask))
        np.testing.assert_allclose(logits[mask][:, OTHERS], expected[mask][:, OTHERS], atol=1e-4, rtol=0)
        assert np.all(logits[..., MASK] == -1e30)
    assert np.abs(data["logits"] - data["logits_masked"])[valid].max() > 1  # the mask matters


def test_dream_logits_are_the_published_moved_right_by_one():
    policy, params = load(DREAM)
    data = golden(DREAM)
    valid = data["attention_mask"].astype(bool)
    assert not valid.all()
    for mask, expected in ((np.ones_like(valid), data["logits_unshifted"]), (valid, data["logits_unshifted_padded"])):
        logits = np.asarray(LOGITS(policy, params, data["tokens"], mask))
        seen = mask[:, :-1]
        np.testing.assert_allclose(logits[:, 1:][seen][:, OTHERS], expected[:, :-1][seen][:, OTHERS], atol=1e-4, rtol=0)
    first = np.asarray(LOGITS(policy, params, data["tokens"], np.ones_like(valid)))[:, 0, OTHERS]
    np.testing.assert_allclose(first, data["logits_unshifted"][:, 0, OTHERS], atol=1e-4, rtol=0)


def decode_golden(policy, params, data, setting):
    """(tokens, nfe) of our sampler where `setting` names an array of golden.npz."""
    rule, block = re.fullmatch(r"(greedy|threshold[\d.]+)_L32_B(\d+)(?:_S\d+)?", setting).groups()
    options = {"rule": "low_confidence", "steps": int(setting.rpartition("_S")[2])} if rule == "greedy" else {"rule": "threshold"}
    threshold = 0.5 if rule == "greedy" else float(rule.removeprefix("threshold"))
    trajectory = denoise(
        policy, params, data["prompt"], np.ones((2, 8), bool), jax.random.key(0), length=32, block_length=int(block), threshold=threshold,
        temperature=0.0, eos_id=None, **options,
    )  # fmt: skip
    return np.asarray(trajectory.tokens), np.asarray(trajectory.nfe)


SETTINGS = [
    "greedy_L32_B32_S32", "greedy_L32_B8_S16", "greedy_L32_B16_S8",
    *(f"threshold{threshold}_L32_B{block}" for block in (8, 32) for threshold in (0.3, 0.5, 0.9)),
]  # fmt: skip


@pytest.mark.parametrize("name", ["llada_tiny", pytest.param("llada_tiny_gqa", marks=pytest.mark.slow)])
def test_decoding_is_the_published_token_for_token_where_confidences_count_mask(name):
    policy, params = load(name)
    data = golden(name)
    assert {key for key in data if data[key].shape == (2, 40)} == set(SETTINGS)
    for setting in SETTINGS:
        tokens, nfe = decode_golden(policy, params, data, setting)
        np.testing.assert_array_equal(tokens, data[setting][:, 8:], err_msg=setting)
        expected = int(setting.rpartition("_S")[2]) if setting.startswith("greedy") else data[f"{setting}_nfe"]
        np.testing.assert_array_equal(nfe, np.broadcast_to(expected, 2), err_msg=setting)


def test_mask_counts_in_confidences_but_is_never_drawn():
    """On llada_tiny MASK's probability reaches 0.2: leaving it out of the confidences unmasks more tokens at once than published."""
    policy, params = load("llada_tiny")
    data = golden("llada_tiny")
    without = Policy(dataclasses.replace(policy.config, mask_in_confidence=False))
    _, nfe = decode_golden(without, params, data, "threshold0.9_L32_B32")
    assert (np.asarray(nfe) < data["threshold0.9_L32_B32_nfe"]).all()
    prompt, mask = jnp.asarray(data["prompt"]), jnp.ones((2, 8), bool)
    traj = denoise(policy, params, prompt, mask, jax.random.key(0), length=32, rule="threshold", threshold=0.9, temperature=20.0)
    assert (np.asarray(traj.tokens) != MASK).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["llada_tiny_gqa", DREAM])
def test_padding_order_and_batch_size_change_no_token(name, temperature):
    policy, params = load(name)
    prompt = np.random.default_rng(5).integers(0, 59, (4, 8)).astype(np.int32)
    mask = np.arange(8) >= np.array([0, 3, 0, 1])[:, None]

    def decode(rows, extra=0):
        padding = ((0, 0), (extra, 0))
        trajectory = denoise(
            policy, params, np.pad(prompt[rows], padding, constant_values=7), np.pad(mask[rows], padding), jax.random.key(3), length=16,
            block_length=8, rule="entropy_bounded", threshold=1.0, temperature=temperature, row_ids=jnp.asarray(rows, jnp.int32),
        )  # fmt: skip
        return np.asarray(trajectory.tokens), np.asarray(trajectory.nfe)

    tokens, nfe = decode([0, 1, 2, 3])
    assert len({row.tobytes() for row in tokens}) == 4 and len(np.unique(tokens)) > 5 and 2 <= nfe.min() and nfe.max() < 16
    for rows, extra in (([2, 0, 3, 1], 0), ([3, 1], 5)):
        other, other_nfe = decode(rows, extra)
        np.testing.assert_array_equal(other, tokens[rows])
        np.testing.assert_array_equal(other_nfe, nfe[rows])


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the original golden checkpoints and model metadata are not here")
def test_copies_are_the_originals():
    for name in (*LLADA, DREAM):
        for file in ("config.json", "model.safetensors", "golden.npz"):
            assert (DATA / name / file).read_bytes() == (SHARED / "golden" / name / file).read_bytes(), (name, file)
    for name in PUBLISHED:
        assert (DATA / name / "config.json").read_bytes() == (SHARED / "models" / name / "config.json").read_bytes()
        index = json.loads((SHARED / "models" / name / "model.safetensors.index.json").read_text())
        keys = published_keys(name)
        assert keys.names == set(index["weight_map"]) and keys.total_size == index["metadata"]["total_size"]


# --- the published models, without their weights ---


def published_keys(name):
    keys = json.loads((DATA / name / "keys.json").read_text())
    names = {*keys["others"], *(template.format(layer) for template in keys["per_layer"] for layer in range(keys["layers"]))}
    assert len(names) == keys["tensors"]
    return types.SimpleNamespace(names=names, total_size=keys["total_size"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_tensor_has_one_place_in_the_tree(name):
    config, keys = read_config(DATA / name), published_keys(name)
    table = tensor_table(PUBLISHED[name], config)
    assert table.keys() == keys.names
    assert sum(2 * int(np.prod(slot.shape)) for slot in table.values()) == keys.total_size  # bytes in bfloat16
    tree = leaves_of(jax.eval_shape(Policy(config).init, jax.random.key(0)))
    places = set()
    for slot in table.values():
        leaf = tree["/".join(slot.path)]
        shape = slot.shape[::-1] if slot.transpose else slot.shape
        assert leaf.shape == (shape if slot.layer is None else (config.layers, *shape))
        places.add((slot.path, slot.layer))
    assert len(places) == len(table)  # no place twice, and no leaf without its tensors:
    assert sum(int(np.prod(leaf.shape)) for leaf in tree.values()) * 2 == keys.total_size


def test_published_shapes():
    llada = tensor_table("llada", read_config(DATA / "llada_8b_instruct"))
    assert llada["model.transformer.blocks.7.ff_proj.weight"] == (("blocks", "gate_proj", "kernel"), 7, True, (12288, 4096))
    assert llada["model.transformer.blocks.31.ff_out.weight"] == (("blocks", "down_proj", "kernel"), 31, True, (4096, 12288))
    assert llada["model.transformer.ff_out.weight"] == (("head_proj", "kernel"), None, True, (126464, 4096))
    assert llada["model.transformer.wte.weight"] == (("embed", "embedding"), None, False, (126464, 4096))
    dream = tensor_table("Dream", read_config(DATA / "dream_7b_instruct"))
    assert dream["model.layers.3.self_attn.k_proj.weight"] == (("blocks", "k_proj", "kernel"), 3, True, (512, 3584))
    assert dream["model.layers.3.self_attn.k_proj.bias"] == (("blocks", "k_proj", "bias"), 3, False, (512,))
    assert dream["model.layers.0.post_attention_layernorm.weight"] == (("blocks", "mlp_norm", "scale"), 0, False, (3584,))


def test_published_configs():
    assert read_config(DATA / "llada_8b_instruct", remat="full", head_chunk=32) == ModelConfig(
        vocab_size=126464, mask_id=126336, width=4096, layers=32, heads=32, kv_heads=32, mlp_width=12288, rope_theta=500000.0,
        norm_eps=1e-5, remat="full", head_chunk=32, mask_in_confidence=True,
    )  # fmt: skip
    assert read_config(DATA / "dream_7b_instruct", dtype="bfloat16") == ModelConfig(
        vocab_size=152064, mask_id=151666, width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944, qkv_bias=True, rope_theta=1e6,
        norm_eps=1e-6, dtype="bfloat16", shift=True, count_positions="valid", mask_in_confidence=True,
    )  # fmt: skip


def test_published_projections():
    assert published_projections("llada") == {
        "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "attn_out": "attn_out", "ff_proj": "gate_proj", "up_proj": "up_proj",
        "ff_out": "down_proj",
    }  # fmt: skip
    assert published_projections("Dream") == {
        "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "attn_out", "gate_proj": "gate_proj", "up_proj": "up_proj",
        "down_proj": "down_proj",
    }  # fmt: skip
    with pytest.raises(ValueError, match="'gpt2' is not implemented; known: llada, Dream"):
        published_projections("gpt2")


def test_projections_of_the_table_are_those_of_lora():
    assert set(published_projections("llada").values()) == set(published_projections("Dream").values()) == set(PROJECTIONS)


# --- configurations that are refused ---


def with_config(tmp_path, name, **changes):
    """A folder with the config.json of `name`, changed; a value of None removes the field."""
    raw = json.loads((DATA / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({field: value for field, value in raw.items() if value is not None}))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llada_tiny", {"alibi": True}, "alibi = true is not implemented, only false or null"),
        ("llada_tiny", {"block_type": "sequential"}, 'block_type = "sequential" is not implemented, only "llama"'),
        ("llada_tiny", {"layer_norm_type": "default"}, 'layer_norm_type = "default"'),
        ("llada_tiny", {"activation_type": "swiglu"}, 'activation_type = "swiglu"'),
        ("llada_tiny", {"rope": None}, "rope = null is not implemented, only true"),
        ("llada_tiny", {"rope_scaling": {"factor": 2}}, 'rope_scaling = {"factor": 2}'),
        ("llada_tiny", {"include_bias": True}, "include_bias = true"),
        ("llada_tiny", {"scale_logits": True}, "scale_logits = true"),
        ("llada_tiny", {"mask_token_id": None}, "mask_token_id is missing"),
        ("llada_tiny", {"mask_token_id": 64}, "mask_id = 64 is not in the vocabulary of 64"),
        ("llada_tiny", {"n_heads": 3}, "must be a multiple of 2"),
        ("llada_tiny", {"d_model": "32"}, "d_model = '32' is not an integer"),
        ("llada_tiny", {"model_type": "llama"}, "model_type = 'llama' is not implemented; known: llada, Dream"),
        (DREAM, {"rope_scaling": {"type": "yarn"}}, 'rope_scaling = {"type": "yarn"}'),
        (DREAM, {"use_sliding_window": True}, "use_sliding_window = true"),
        (DREAM, {"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        (DREAM, {"head_dim": 16}, "head_dim = 16 is not implemented, only width / heads = 32 / 4"),
        (DREAM, {"mask_token_id": None}, "mask_token_id is missing"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_config(with_config(tmp_path, name, **changes))
    assert str(tmp_path / "config.json") in str(error.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="mask_token_id is missing; alibi = true .*; scale_logits = true"):
        read_config(with_config(tmp_path, "llada_tiny", alibi=True, scale_logits=True, mask_token_id=None))


def test_optional_fields(tmp_path):
    assert read_config(with_config(tmp_path, "llada_tiny", n_kv_heads=None)).kv_heads == 4
    changed = read_config(with_config(tmp_path, "llada_tiny_gqa", include_qkv_bias=True, weight_tying=True))
    assert (changed.kv_heads, changed.qkv_bias, changed.tie_embeddings) == (2, True, True)
    table = tensor_table("llada", changed)
    assert table["model.transformer.blocks.1.k_proj.bias"].shape == (16,) and "model.transformer.ff_out.weight" not in table
    assert read_config(with_config(tmp_path, DREAM, head_dim=8)).width == 32


def test_special_ids(tmp_path):
    assert pretrained.read_special_ids(DATA / "llada_8b_instruct") == {"eos_id": 126081, "pad_id": 126081}
    assert pretrained.read_special_ids(DATA / "dream_7b_instruct") == {"eos_id": 151643, "pad_id": 151643}
    with pytest.raises(ValueError, match="it has 59 and None"):
        pretrained.read_special_ids(with_config(tmp_path, "llada_tiny", pad_token_id=None))


# --- folders and hub names ---


def test_resolve(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def offline(name, **options):
        asked.append((name, options["allow_patterns"]))
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert pretrained.resolve(tmp_path) == str(tmp_path)
    expected = r"ConnectionError: no network\).*hf download GSAI-ML/LLaDA-8B-Instruct --local-dir DIR.*--config\.model\.pretrained=DIR"
    with pytest.raises(FileNotFoundError, match=expected):
        load_pretrained("GSAI-ML/LLaDA-8B-Instruct")
    assert asked[0][0] == "GSAI-ML/LLaDA-8B-Instruct" and {"*.safetensors", "config.json", "tokenizer*"} <= set(asked[0][1])
    with pytest.raises(FileNotFoundError, match="no folder '/no/such/model'.*--config.model.pretrained"):
        pretrained.resolve("/no/such/model")
    assert len(asked) == 1
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(DATA / "llada_tiny"))
    assert read_config("GSAI-ML/LLaDA-8B-Instruct").layers == 3


# --- weights in and out ---


def make_source(folder, name="llada_tiny_gqa", change=lambda tensors: tensors, dtype=ml_dtypes.bfloat16):
    """A bfloat16 copy of a golden checkpoint in three shards, a norm of the last layer in float32; a tokenizer file and a stray one."""
    folder.mkdir()
    shutil.copy(DATA / name / "config.json", folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_x.py").write_text("raise RuntimeError")
    (folder / "notes.txt").write_text("not part of a model")
    tensors = {key: value.astype(dtype) for key, value in load_file(DATA / name / "model.safetensors").items()}
    for key in tensors:
        if "blocks.2.attn_norm" in key:
            tensors[key] = tensors[key].astype(np.float32)
    tensors = change(tensors)
    weight_map = {key: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, key in enumerate(sorted(tensors))}
    for shard in sorted(set(weight_map.values())):
        part = {key: value for key, value in tensors.items() if weight_map[key] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    total = sum(value.nbytes for value in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def test_tensors_are_stacked_transposed_and_kept_as_stored(tmp_path):
    source = make_source(tmp_path / "source")
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    _, params = load_pretrained(source)
    blocks = params["blocks"]
    assert blocks["k_proj"]["kernel"].dtype == jnp.bfloat16 and blocks["k_proj"]["kernel"].shape == (3, 32, 16)
    np.testing.assert_array_equal(blocks["k_proj"]["kernel"][1], tensors["model.transformer.blocks.1.k_proj.weight"].T)
    np.testing.assert_array_equal(params["head_proj"]["kernel"], tensors["model.transformer.ff_out.weight"].T)
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["model.transformer.wte.weight"])
    assert blocks["attn_norm"]["scale"].dtype == jnp.float32  # one of its layers is
    for layer in range(3):
        stored = tensors[f"model.transformer.blocks.{layer}.attn_norm.weight"]
        np.testing.assert_array_equal(blocks["attn_norm"]["scale"][layer], stored.astype(np.float32))
    _, wide = load_pretrained(source, dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    assert_bitwise(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    _, narrow = load_pretrained(DATA / "llada_tiny_gqa", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(narrow["blocks"]["up_proj"]["kernel"], blocks["up_proj"]["kernel"])
    with pytest.raises(ValueError, match="dtype = 'float16' is unknown"):
        load_pretrained(source, dtype="float16")


@pytest.mark.parametrize("name", ["llada_tiny", DREAM])
def test_arrays_are_laid_out_where_they_are_to_be(name):
    mesh, asked = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}), set()

    def place(path, ndim):
        asked.add((path, ndim))
        return param_sharding(mesh, path, ndim)

    policy, params = load_pretrained(DATA / name, None, place)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(policy.init, jax.random.key(0)))
    expected = {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): len(leaf.shape) for path, leaf in leaves}
    layers = {(path, ndim - 1) for path, ndim in expected.items() if path[0] == "blocks"}  # each before it is put to the others
    assert asked == set(expected.items()) | layers
    for path, ndim in expected.items():
        leaf = functools.reduce(lambda tree, key: tree[key], path, params)
        assert leaf.sharding.mesh == mesh and leaf.sharding.is_equivalent_to(param_sharding(mesh, path, ndim), ndim)
    head, embedding = params["head_proj"]["kernel"], params["embed"]["embedding"]  # put there whole: jit forgets axes of one device
    assert head.sharding.spec == PartitionSpec(None, ("fsdp", "tensor")) and embedding.sharding.spec == PartitionSpec("tensor", "fsdp")
    _, alone = load(name)
    assert {type(leaf.sharding) for leaf in jax.tree.leaves(alone)} == {SingleDeviceSharding}
    assert_bitwise(params, alone)


@pytest.mark.parametrize("transpose", [False, True])
def test_only_the_part_that_a_device_holds_is_read(tmp_path, transpose):
    tensor, read = np.arange(48, dtype=np.float32).reshape(6, 8).astype(ml_dtypes.bfloat16), []
    save_file({"x": tensor}, tmp_path / "x.safetensors")

    class Stored:
        """A stored tensor that notes what is read of it."""

        def __init__(self, tensor):
            self.tensor = tensor

        def __getitem__(self, index):
            part = self.tensor[index]
            read.append(part.size)
            return part

    whole = tensor.T if transpose else tensor
    with safe_open(tmp_path / "x.safetensors", "np") as tensors:
        stored = Stored(tensors.get_slice("x"))
        for index in ((slice(2, 4), slice(3, 6)), (slice(None), slice(0, 2)), (slice(1, 2, None), slice(None)), (slice(None), slice(None))):
            part = pretrained._read_part(stored, transpose, np.float32, index)
            assert part.dtype == np.float32
            np.testing.assert_array_equal(part, whole[index].astype(np.float32))
            assert read.pop() == part.size and not read  # once, and no more than that


def test_a_model_is_read_without_reading_a_whole_tensor_anywhere(monkeypatch):
    class Sliced:
        """`safe_open` without its `get_tensor`."""

        def __init__(self, *args):
            self.file = safe_open(*args)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def __getattr__(self, name):
            assert name != "get_tensor", "a whole tensor was read"
            return getattr(self.file, name)

    _, expected = load("llada_tiny")
    monkeypatch.setattr(pretrained, "safe_open", Sliced)
    assert_bitwise(load("llada_tiny")[1], expected)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("name", ["llada_tiny_gqa", DREAM])
def test_what_is_written_is_what_was_read(tmp_path, name, dtype):
    source = make_source(tmp_path / "source", name)
    policy, params = load_pretrained(source, dtype=dtype)
    save_pretrained(tmp_path / "out", policy, params, source)
    copied = {file.name for file in source.iterdir()} - {"notes.txt"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == copied
    for file in sorted(copied):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes(), file
    assert_bitwise(load_pretrained(tmp_path / "out", dtype=dtype)[1], params)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_changed_parameter_is_written_and_rounded(tmp_path):
    source = make_source(tmp_path / "source")
    policy, params = load_pretrained(source, dtype="float32")
    params["blocks"]["q_proj"]["kernel"] = params["blocks"]["q_proj"]["kernel"].at[2, 3, 5].set(1.0 + 2**-8 + 2**-12)
    (tmp_path / "out").mkdir()  # an empty folder may be there
    save_pretrained(tmp_path / "out", policy, params, source)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    tensor = written["model.transformer.blocks.2.q_proj.weight"]
    assert tensor.dtype == ml_dtypes.bfloat16 and float(tensor[5, 3]) == 1.0 + 2**-7  # the nearest; torch's [out, in]


def test_what_is_not_written(tmp_path):
    policy, params = load("llada_tiny")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="not of the sizes"):
        save_pretrained(out, load(DREAM)[0], params, DATA / "llada_tiny")
    joined = Trainable(rank=2).join(params, Trainable(rank=2).init(jax.random.key(0), params))
    with pytest.raises(ValueError, match=r"merge adapters first(.|\n)*unexpected \(14\): blocks/attn_out/lora_a"):
        save_pretrained(out, policy, joined, DATA / "llada_tiny")
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_pretrained(out, policy, params, DATA / "llada_tiny")
    assert [path.name for path in out.iterdir()] == ["mine.txt"] and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    policy, params = load("llada_tiny")

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(tmp_path / "out", policy, params, DATA / "llada_tiny")
    assert list(tmp_path.iterdir()) == []


def test_one_error_names_all_tensors_that_do_not_fit(tmp_path):
    def change(tensors):
        for layer in range(3):
            for module in ("q_proj", "k_proj", "v_proj", "attn_out"):
                del tensors[f"model.transformer.blocks.{layer}.{module}.weight"]
        tensors["model.transformer.blocks.0.q_norm.weight"] = np.ones(32, np.float32)
        tensors["model.transformer.ln_f.weight"] = np.ones(31, np.float32)
        tensors["model.transformer.blocks.1.ff_proj.weight"] = np.ones((32, 48), np.float32)  # not transposed
        tensors["model.transformer.blocks.1.up_proj.weight"] = np.ones((48, 32), np.int8)
        return tensors

    with pytest.raises(ValueError) as error:
        load_pretrained(make_source(tmp_path / "source", change=change))
    message = str(error.value)
    assert "missing (12): model.transformer.blocks.0.attn_out.weight, " in message and ", and 2 more\n" in message
    assert message.count(".v_proj.") == 2  # the third is beyond the ten named
    assert "unexpected (1): model.transformer.blocks.0.q_norm.weight\n" in message
    assert "mis-shaped (2): model.transformer.blocks.1.ff_proj.weight: expected [48, 32], found [32, 48], " in message
    assert "model.transformer.ln_f.weight: expected [32], found [31]\n" in message
    assert "of a dtype other than F32, BF16, F16 (1): model.transformer.blocks.1.up_proj.weight: I8" in message


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    source = make_source(tmp_path / "source")
    first, second = sorted(source.glob("*.safetensors"))[:2]
    name = sorted(load_file(first))[0]
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    with pytest.raises(ValueError, match=rf"in more than one shard \(1\): {name}"):
        load_pretrained(source)


def test_incomplete_folders(tmp_path):
    source = make_source(tmp_path / "source")
    shard = source / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for cut in (whole[:-8], whole[:100], b""):
        shard.write_bytes(cut)
        with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is damaged or cut short"):
            load_pretrained(source)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="names shards that are not there: model-00002-of-00003.safetensors"):
        load_pretrained(source)
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        load_pretrained(source)
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json does not hold a JSON object"):
        load_pretrained(source)
    (source / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="there is no .*config.json"):
        load_pretrained(source)
