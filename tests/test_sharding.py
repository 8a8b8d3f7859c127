"""The layout of every array by hand, meshes and what is wrong with them, rows between hosts and devices; in one process, on one device.

Meshes of several devices are abstract ones here, and other hosts are played; tests/multidevice has real ones.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from configs.default import get_config
from diffpo_jax import sft, sharding
from diffpo_jax.models.lora import PROJECTIONS, Trainable
from diffpo_jax.models.threshold_head import ThresholdHead
from diffpo_jax.models.transformer import EMBEDDING_AXES, KERNEL_AXES, ModelConfig, Policy
from diffpo_jax.step import init_state
from diffpo_jax.structs import Prompts

SIZES = dict(vocab_size=20, mask_id=15, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, qkv_bias=True, dtype="float32")
POLICY = Policy(ModelConfig(**SIZES))
HEAD = ThresholdHead(hidden=4, gamma_min=0.1, gamma_max=8.0, gamma_init=1.0, std_init=1.0)
KEY = jax.random.key(0)


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def one_device():
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})


MESH = abstract_mesh(2, 2, 2)

# By hand: the first dimension of a block's leaf is its layer.
TO_HEADS, FROM_HEADS = P(None, ("fsdp",), ("tensor",)), P(None, ("tensor",), ("fsdp",))  # also of the MLP
KERNELS = {
    "blocks/q_proj/kernel": TO_HEADS,
    "blocks/k_proj/kernel": TO_HEADS,
    "blocks/v_proj/kernel": TO_HEADS,
    "blocks/attn_out/kernel": FROM_HEADS,
    "blocks/gate_proj/kernel": TO_HEADS,
    "blocks/up_proj/kernel": TO_HEADS,
    "blocks/down_proj/kernel": FROM_HEADS,
    "embed/embedding": P(("tensor",), ("fsdp",)),
    "head_proj/kernel": P(None, ("fsdp", "tensor")),
}
POLICY_SPECS = KERNELS | {
    "blocks/q_proj/bias": P(None, ("tensor",)),
    "blocks/k_proj/bias": P(None, ("tensor",)),
    "blocks/v_proj/bias": P(None, ("tensor",)),
    "blocks/attn_norm/scale": P(None, None),
    "blocks/mlp_norm/scale": P(None, None),
    "final_norm/scale": P(None),
}
ADAPTER_SPECS = {f"blocks/{name}/lora_a": P(None, ("fsdp", "tensor"), None) for name in PROJECTIONS}
ADAPTER_SPECS |= {f"blocks/{name}/lora_b": P(None, None, ("fsdp", "tensor")) for name in PROJECTIONS}
THRESHOLD_SPECS = {  # whole on every device
    "hidden/bias": P(None),
    "hidden/kernel": P(None, None),
    "norm/bias": P(None),
    "norm/scale": P(None),
    "out/bias": P(None),
    "out/kernel": P(None, None),
    "log_std": P(),
}


def by_path(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def specs(tree, mesh=MESH):
    return {path: layout.spec for path, layout in by_path(sharding.params_sharding(mesh, tree)).items()}


def below(folder, tree):
    return {f"{folder}/{path}": spec for path, spec in tree.items()}


def shapes(policy=POLICY):
    return jax.eval_shape(policy.init, KEY)


def train_state(rank):
    """Shapes of the state of RL; warm-up, so that the optimisers hold counters too."""
    trainable, base = Trainable(rank), shapes()

    def init(base):
        return init_state(get_config(), trainable.init(KEY, base), HEAD.init(KEY, POLICY.config.width))

    return jax.eval_shape(init, base)


# --- layouts ---


def test_every_leaf_of_a_policy_by_hand():
    assert specs(shapes()) == POLICY_SPECS
    tied = Policy(ModelConfig(**SIZES | {"tie_embeddings": True, "qkv_bias": False}))
    expected = {path: spec for path, spec in POLICY_SPECS.items() if "bias" not in path and "head_proj" not in path}
    assert specs(shapes(tied)) == expected
    assert specs(shapes(), one_device()) == POLICY_SPECS  # whatever the sizes of the axes


def test_every_leaf_of_adapters_by_hand():
    trained = jax.eval_shape(Trainable(3).init, KEY, shapes())
    assert specs(trained) == ADAPTER_SPECS
    joined = jax.eval_shape(Trainable(3).join, shapes(), trained)
    assert specs(joined) == POLICY_SPECS | ADAPTER_SPECS


@pytest.mark.parametrize(("rank", "trained"), [(0, POLICY_SPECS), (3, ADAPTER_SPECS)])
def test_every_leaf_of_a_training_state_by_hand(rank, trained):
    """Parameters, threshold network, and of both Adam's two moments, which lie as the parameters do."""
    moments = [f"opt_state/1/0/{moment}" for moment in ("mu", "nu")]
    expected = below("params", trained) | below("threshold_params", THRESHOLD_SPECS)
    for folder in moments:
        expected |= below(folder, trained) | below(f"threshold_{folder}", THRESHOLD_SPECS)
    counters = ("step", "bad_updates", "total_bad_updates", "opt_state/1/0/count", "opt_state/1/2/count", "threshold_opt_state/1/0/count")
    assert specs(train_state(rank)) == expected | dict.fromkeys(counters, P())


def test_every_leaf_of_the_state_of_supervised_training_by_hand():
    def init(params):
        return sft.SftState(jnp.zeros((), jnp.int32), params, sft.make_optimiser(get_config()).init(params))

    expected = {}
    for folder in ("params", "opt_state/1/0/mu", "opt_state/1/0/nu"):
        expected |= below(folder, POLICY_SPECS)
    counters = ("step", "opt_state/1/0/count", "opt_state/1/2/count")
    assert specs(jax.eval_shape(init, shapes())) == expected | dict.fromkeys(counters, P())


def test_no_kernel_of_the_denoiser_is_replicated():
    """Of each kernel and each adapter's factors a device holds 1 in fsdp x tensor, of biases 1 in tensor, and of all else the whole."""
    mesh = abstract_mesh(3, 2, 2)
    seen = set()
    for tree in (shapes(), train_state(0), train_state(3)):
        layouts = by_path(sharding.params_sharding(mesh, tree))
        for path, leaf in by_path(tree).items():
            name = path.rpartition("/")[2]
            share = leaf.size / int(np.prod(layouts[path].shard_shape(leaf.shape)))
            if path.startswith("threshold") or name not in ("kernel", "embedding", "bias", "lora_a", "lora_b"):
                assert share == 1 and layouts[path].is_fully_replicated, path
                assert leaf.ndim < 2 or name == "scale" or path.startswith("threshold"), path
            else:
                assert share == {"kernel": 4, "embedding": 4, "bias": 2, "lora_a": 4, "lora_b": 4}[name], path
                seen.add(name)
    assert seen == {"kernel", "embedding", "bias", "lora_a", "lora_b"}


def test_every_projection_and_every_name_of_a_dimension_has_its_rule():
    assert set(KERNEL_AXES) == {*PROJECTIONS, "head_proj"}
    names = {name for axes in (*KERNEL_AXES.values(), EMBEDDING_AXES) for name in axes}
    assert names - {None} | {"rows", "batch", "adapter"} == set(sharding.RULES)
    assert {axis for axes in sharding.RULES.values() for axis in axes} == set(sharding.AXES)


def test_rows_and_names():
    assert sharding.rows_sharding(MESH).spec == P(("data", "fsdp"))
    assert sharding.replicated_sharding(MESH).spec == P() and sharding.replicated_sharding(MESH).is_fully_replicated
    assert sharding.named(MESH, "batch", None, "head_vocab").spec == P(("data",), None, ("fsdp", "tensor"))
    assert sharding.named(abstract_mesh(4, 2, 3), "rows", "heads").shard_shape((16, 6, 5)) == (2, 2, 5)
    assert [sharding.split(abstract_mesh(5, 3, 2), name) for name in ("rows", "batch", "embed", "heads", "head_vocab")] == [15, 5, 3, 2, 6]
    assert sharding.split(None, "rows") == 1


def test_without_a_mesh_nothing_is_laid_out():
    tree = {"x": jnp.ones(3)}
    assert sharding.lay_out_rows(None, tree) is tree and sharding.lay_out_params(None, tree) is tree


def test_a_layout_is_a_static_argument_and_changes_no_value():
    layout = sharding.Layout(one_device())
    assert layout == sharding.Layout(one_device()) and hash(layout) == hash(sharding.Layout(one_device()))
    assert [layout.splits(name) for name in ("rows", "heads")] == [POLICY.layout.splits(name) for name in ("rows", "heads")] == [1, 1]
    assert sharding.Layout(abstract_mesh(5, 3, 2)).splits("rows") == 15
    laid_out = Policy(POLICY.config, layout)
    tokens, mask, params = jnp.arange(12).reshape(2, 6), jnp.ones((2, 6), bool), POLICY.init(KEY)
    logits = jax.jit(Policy.logits, static_argnums=0)
    np.testing.assert_allclose(logits(laid_out, params, tokens, mask), logits(POLICY, params, tokens, mask), atol=1e-6)


def test_the_policy_names_the_dimensions_it_has():
    """Sizes of what is laid out in a forward pass: kernels without their part over fsdp, and logits by vocabulary, never by row alone."""
    calls, sizes = set(), {"rows": {2, 12}, "batch": {2, 12}, "embed": {16}, "heads": {4, 16}, "kv_heads": {2, 8}, "mlp": {24}}
    sizes |= {"vocab": {20}, "head_vocab": {20}}

    def note(x, *names):
        assert len(names) == x.ndim or names == ("batch",) and x.ndim == 1
        calls.add((x.shape, names))
        return x

    trainable = Trainable(3)
    base = POLICY.init(KEY)
    params = trainable.join(base, trainable.init(KEY, base))
    policy = Policy(POLICY.config, note)
    jax.eval_shape(policy.logits, params, jnp.zeros((2, 6), jnp.int32), jnp.ones((2, 6), bool))
    for shape, names in calls:
        assert all(name is None or size in sizes[name] for size, name in zip(shape, names, strict=True)), (shape, names)
    assert {name for _, names in calls for name in names} - {None} == set(sharding.RULES) - {"vocab", "adapter"}  # of parameters alone
    expected = {
        ((16, 16), (None, "heads")), ((16, 8), (None, "kv_heads")), ((16, 16), ("heads", None)), ((16, 24), (None, "mlp")),
        ((24, 16), ("mlp", None)), ((16, 3), (None, None)), ((3, 16), (None, "heads")), ((24, 3), ("mlp", None)), ((3, 16), (None, None)),
        ((2, 6, 20), ("batch", None, "head_vocab")), ((12, 16), ("batch", "embed")), ((2, 4, 6, 4), ("rows", "heads", None, None)),
    }  # fmt: skip
    assert expected <= calls


# --- meshes ---

DEVICES = [SimpleNamespace(platform="fake")] * 8


@pytest.fixture
def meshes(monkeypatch):
    """make_mesh of eight devices that are not there: (sizes, devices taken)."""

    def make(sizes, names, *, axis_types, devices):
        assert names == ("data", "fsdp", "tensor") and axis_types == (AxisType.Auto,) * 3
        return sizes, len(devices)

    monkeypatch.setattr(jax, "make_mesh", make)
    return lambda data, fsdp, tensor: sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, DEVICES)


def test_the_rest_of_the_devices_go_where_a_size_is_minus_1(meshes):
    assert meshes(-1, 1, 1) == ((8, 1, 1), 8)
    assert meshes(2, -1, 2) == ((2, 2, 2), 8)
    assert meshes(1, 2, -1) == ((1, 2, 4), 8)
    assert meshes(2, 2, 2) == ((2, 2, 2), 8)
    assert meshes(1, 8, -1) == ((1, 8, 1), 8)
    assert meshes(4, 1, 1) == ((4, 1, 1), 4)  # rows alone may leave out devices
    assert meshes(1, 1, 1) == ((1, 1, 1), 1)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((-1, -1, 1), "mesh.data = -1, mesh.fsdp = -1, mesh.tensor = 1: sizes are at least 1, and at most one of them is -1, the rest of"),
        ((-1, -1, -1), "at most one of them is -1"),
        ((0, 1, 1), "mesh.data = 0, mesh.fsdp = 1, mesh.tensor = 1: sizes are at least 1"),
        ((8, 1, -2), "mesh.tensor = -2: sizes are at least 1"),
        ((16, 1, 1), "mesh.data = 16, mesh.fsdp = 1, mesh.tensor = 1 makes 16 devices, but there are 8 (fake)"),
        ((-1, 16, 1), "mesh.data = -1, mesh.fsdp = 16, mesh.tensor = 1 makes 16 devices, but there are 8"),
        ((-1, 3, 1), "mesh.data = -1, mesh.fsdp = 3, mesh.tensor = 1 makes 6 devices, but there are 8"),
        ((1, 4, 1), "mesh.fsdp = 4, mesh.tensor = 1 makes 4 devices, but there are 8 (fake); use -1 for the rest on one axis"),
        ((2, 1, 2), "mesh.data = 2, mesh.fsdp = 1, mesh.tensor = 2 makes 4 devices"),
    ],
)
def test_sizes_that_the_devices_do_not_make(meshes, sizes, said):
    with pytest.raises(ValueError) as error:
        meshes(*sizes)
    assert said in str(error.value)


def test_several_hosts_leave_out_no_device(meshes, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert meshes(8, 1, 1) == ((8, 1, 1), 8)
    with pytest.raises(ValueError, match="mesh.data = 4, .* makes 4 devices, but there are 8"):
        meshes(4, 1, 1)


def test_a_real_mesh():
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    assert mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1} and mesh.axis_names == sharding.AXES
    assert set(mesh.axis_types) == {AxisType.Auto} and mesh == one_device()


def test_remesh():
    mesh = one_device()
    assert sharding.remesh(mesh, {"data": -1, "fsdp": 1, "tensor": 1}) == mesh
    for sizes, said in (
        ((2, 1, 1), r"^mesh.rollout.data = 2, mesh.rollout.fsdp = 1, mesh.rollout.tensor = 1 makes 2 devices, but there are 1 \(cpu\)"),
        ((-1, -1, 1), "^mesh.rollout.data = -1, mesh.rollout.fsdp = -1, mesh.rollout.tensor = 1: sizes are at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            sharding.remesh(mesh, dict(zip(sharding.AXES, sizes, strict=True)))


@pytest.mark.parametrize(
    ("mesh", "name", "size", "said"),
    [
        ((2, 3, 5), "rows", 8, "field = 8 is not a multiple of the 6 devices on the mesh axes data = 2 x fsdp = 3"),
        ((4, 1, 1), "rows", 6, "field = 6 is not a multiple of the 4 devices on the mesh axes data = 4"),
        ((1, 4, 2), "rows", 6, "field = 6 is not a multiple of the 4 devices on the mesh axes fsdp = 4"),
        ((2, 3, 5), "heads", 8, "field = 8 is not a multiple of the 5 devices on the mesh axes tensor = 5"),
        ((2, 3, 5), "head_vocab", 10, "field = 10 is not a multiple of the 15 devices on the mesh axes fsdp = 3 x tensor = 5"),
    ],
)
def test_what_a_mesh_does_not_divide_is_said_with_field_size_and_axes(mesh, name, size, said):
    with pytest.raises(ValueError) as error:
        sharding.check_divides("field", size, abstract_mesh(*mesh), name)
    assert str(error.value) == said
    sharding.check_divides("field", 60, abstract_mesh(*mesh), name)
    sharding.check_divides("field", size, abstract_mesh(1, 1, 1), name)


@pytest.mark.parametrize(
    ("mesh", "sizes", "said"),
    [
        ((7, 3, 1), {}, "model.width = 16 is not a multiple of the 3 devices on the mesh axes fsdp = 3"),
        ((1, 16, 2), {}, "model.width = 16 is not a multiple of the 32 devices on the mesh axes fsdp = 16 x tensor = 2"),
        ((1, 1, 8), {}, "model.heads = 4 is not a multiple of the 8 devices on the mesh axes tensor = 8"),
        ((1, 1, 4), {}, "model.kv_heads = 2 is not a multiple of the 4 devices on the mesh axes tensor = 4"),
        ((1, 16, 1), {}, "model.mlp_width = 24 is not a multiple of the 16 devices on the mesh axes fsdp = 16"),
        ((3, 2, 2), {"vocab_size": 18}, "model.vocab_size = 18 is not a multiple of the 4 devices on the mesh axes fsdp = 2 x tensor = 2"),
        (
            (1, 16, 1), {"mlp_width": 32, "vocab_size": 32},
            "model.kv_heads * head dimension = 8 is not a multiple of the 16 devices on the mesh axes fsdp = 16",
        ),
        ((5, 2, 2), {}, None),
        ((1, 4, 1), {}, None),
        ((9, 1, 1), {}, None),
    ],
)  # fmt: skip
def test_a_model_that_a_mesh_does_not_divide(mesh, sizes, said):
    config, mesh = ModelConfig(**SIZES | sizes), abstract_mesh(*mesh)
    if said is None:
        sharding.check_model(config, mesh)
        for path, leaf in by_path(shapes()).items():  # and indeed every leaf of it is divided
            by_path(sharding.params_sharding(mesh, shapes()))[path].shard_shape(leaf.shape)
        return
    with pytest.raises(ValueError) as error:
        sharding.check_model(config, mesh)
    assert str(error.value) == said


# --- parameters on a mesh ---


def test_parameters_are_made_and_moved_with_their_values():
    mesh, expected = one_device(), jax.jit(POLICY.init)(KEY)
    made = sharding.init_sharded(mesh, POLICY.init, KEY)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(made)} == {mesh}
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    moved = sharding.reshard(expected, sharding.params_sharding(mesh, expected))
    jax.tree.map(np.testing.assert_array_equal, moved, expected)
    again = sharding.reshard(moved, sharding.params_sharding(sharding.remesh(mesh, mesh.shape), moved))
    pointers = [[leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)] for tree in (moved, again)]
    assert pointers[0] == pointers[1]  # nothing is copied where nothing moves


# --- rows ---


def test_rows_go_in_and_come_back():
    mesh = one_device()
    prompts = Prompts(np.arange(12, dtype=np.int32).reshape(4, 3), np.arange(12).reshape(4, 3) % 2 > 0)
    tree = (prompts, np.linspace(0, 1, 4, dtype=np.float32))
    put = sharding.put_rows(mesh, tree, 4)
    for leaf in jax.tree.leaves(put):
        assert leaf.shape[0] == 4 and leaf.sharding.is_equivalent_to(sharding.rows_sharding(mesh), leaf.ndim)
    assert put[0].mask.dtype == bool and put[1].dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, sharding.get_rows(put), tree)
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch(put), tree)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((sharding.get_rows(put), sharding.fetch(put))))
    mine = sharding.host_rows(mesh, 4)
    assert mine.dtype == np.int64 and mine.tolist() == [0, 1, 2, 3]
    whole = sharding.put_replicated(mesh, prompts)
    np.testing.assert_array_equal(whole.tokens, prompts.tokens)
    assert whole.tokens.sharding.is_fully_replicated


def test_rows_of_the_wrong_number():
    with pytest.raises(ValueError, match="^this host holds 4 of 4 rows, but was given 3$"):
        sharding.put_rows(one_device(), {"a": np.zeros((4, 2)), "b": np.zeros(3)}, 4)
    for call in (lambda mesh: sharding.put_rows(mesh, np.zeros(6), 6), lambda mesh: sharding.host_rows(mesh, 6)):
        with pytest.raises(ValueError, match="^rows = 6 is not a multiple of the 4 devices on the mesh axes data = 2 x fsdp = 2$"):
            call(abstract_mesh(2, 2, 3))


@pytest.fixture
def a_host_of_several(monkeypatch):
    """A host with rows 0 .. 2 and 6 .. 8 of 12, the former on two devices."""
    parts = {"third": (slice(6, 9),), "first": (slice(0, 3),), "second": (slice(0, 3),)}
    layout = SimpleNamespace(addressable_devices_indices_map=lambda shape: parts if shape == (12,) else None)
    monkeypatch.setattr(sharding, "rows_sharding", lambda mesh: layout)
    return abstract_mesh(2, 2, 2)


def test_the_rows_of_a_host_of_several(a_host_of_several, monkeypatch):
    mesh = a_host_of_several
    assert sharding.host_rows(mesh, 12).tolist() == [0, 1, 2, 6, 7, 8]
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, layout, part: (shape, part))
    rows = 10 * np.array([0, 1, 2, 6, 7, 8])[:, None] + np.arange(2)
    shape, part = sharding.put_rows(mesh, rows, 12)
    assert shape == (12, 2)
    for start in (0, 6):
        np.testing.assert_array_equal(part((slice(start, start + 3), slice(None)))[:, 0], 10 * np.arange(start, start + 3))
    with pytest.raises(ValueError, match="^this host holds 6 of 12 rows, but was given 12$"):
        sharding.put_rows(mesh, np.zeros(12), 12)

    def shard(start):
        return SimpleNamespace(index=(slice(start, start + 3), slice(None)), data=jnp.asarray(part((slice(start, start + 3),))))

    array = SimpleNamespace(addressable_shards=[shard(6), shard(0), shard(0)])
    np.testing.assert_array_equal(sharding.get_rows({"x": array})["x"], rows)


# --- between hosts ---


def test_on_one_host_nothing_is_asked():
    assert sharding.first_host(lambda: b"abc") == b"abc"
    for error in (ValueError("no"), KeyError("no"), FileNotFoundError("no")):

        def call(error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            sharding.first_host(call)
        assert raised.value is error
    assert sharding.any_host(True) is True and sharding.any_host(False) is False


@pytest.mark.parametrize("message", [b"abc", b"", bytes(range(256))])
def test_what_the_first_host_says_is_heard_by_the_others(monkeypatch, message):
    said = two_hosts(monkeypatch)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    assert sharding.first_host(lambda: message) == message
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert sharding.first_host(None) == message  # is not called there
    assert said == []


def test_what_fails_on_the_first_host_fails_on_the_others(monkeypatch):
    said = two_hosts(monkeypatch)
    monkeypatch.setattr(jax, "process_index", lambda: 0)

    def call():
        raise FileNotFoundError("no checkpoint folder /γ: train first")

    with pytest.raises(FileNotFoundError, match="^no checkpoint folder /γ: train first$"):
        sharding.first_host(call)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(RuntimeError, match="^the first host says: no checkpoint folder /γ: train first$"):
        sharding.first_host(None)
    assert said == []


def two_hosts(monkeypatch):
    """Two hosts, played one after the other: what the first says is kept until the second has heard it."""
    said = []

    def broadcast(value):
        if jax.process_index() == 0:
            said.append(np.array(value))
            return said[-1]
        heard = said.pop(0)
        assert (heard.shape, heard.dtype) == (value.shape, value.dtype)
        return heard

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    return said


def test_any_host_and_fetch_ask_all_hosts(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for mine, others, expected in ((False, True, True), (True, False, True), (False, False, False)):
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda value, others=others: np.stack([value, others]))
        assert sharding.any_host(mine) is expected
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda tree, tiled: {"whole": tree} if tiled else None)
    assert sharding.fetch("tree") == {"whole": "tree"}
