"""The mesh, the layout of every array over it, and all device placement; on several hosts, who holds which rows.

The mesh has the axes `data`, `fsdp` and `tensor`. Rows (prompts, trajectories, activations) are split over data x fsdp; parameters, their
gradients and optimiser states over fsdp x tensor, each layer gathered over fsdp when it is used (ZeRO-3, arXiv 1910.02054) and computed in
parts over tensor (arXiv 1909.08053). `RULES` says this of the logical names that `diffpo_jax.models.transformer` gives to dimensions.

Programs are `jax.jit` over arrays with a `NamedSharding`; what `pmap` used to give is the mesh's data axis. A host puts in, and gets back,
the rows of which its devices hold a part (`host_rows`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffpo_jax.models.transformer import EMBEDDING_AXES, KERNEL_AXES, LORA_A_AXES, LORA_B_AXES, ModelConfig

AXES = ("data", "fsdp", "tensor")
RULES = {  # logical name of a dimension -> the mesh axes it is split over
    "rows": ("data", "fsdp"),
    "batch": ("data",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_vocab": ("fsdp", "tensor"),
    "adapter": ("fsdp", "tensor"),
}


# --- the mesh ---


def make_mesh(sizes: Mapping[str, int], devices: Any = None) -> Mesh:
    """A mesh of `sizes` {"data", "fsdp", "tensor": devices on the axis}, one of which may be -1: the rest.

    Args:
      sizes: as `config.mesh`.
      devices: to take; all by default.

    Raises:
      ValueError: more than one -1, or sizes whose product is not the number of devices. A mesh on the data axis alone may leave out some.
    """
    devices = jax.devices() if devices is None else list(devices)
    wanted = {axis: sizes[axis] for axis in AXES}
    text = ", ".join(f"mesh.{axis} = {size}" for axis, size in wanted.items())
    free = [axis for axis, size in wanted.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in wanted.values()):
        raise ValueError(f"{text}: sizes are at least 1, and at most one of them is -1, the rest of the devices")
    taken = int(np.prod([size for size in wanted.values() if size != -1]))
    if free:
        wanted[free[0]] = max(len(devices) // taken, 1)
    count = int(np.prod(list(wanted.values())))
    if count > len(devices) or (count < len(devices) and (free or jax.process_count() > 1 or wanted["data"] != count)):
        raise ValueError(
            f"{text} makes {count} devices, but there are {len(devices)} ({devices[0].platform}); use -1 for the rest on one axis"
        )
    return jax.make_mesh(tuple(wanted.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:count])


def remesh(mesh: Mesh, sizes: Mapping[str, int]) -> Mesh:
    """The same devices, in the same order, as a mesh of other sizes: arrays go from one to the other by `reshard`.

    Raises:
      ValueError: as `make_mesh`; the sizes are named mesh.rollout.
    """
    try:
        other = make_mesh(sizes, mesh.devices.flat)
    except ValueError as error:
        raise ValueError(str(error).replace("mesh.", "mesh.rollout.")) from None
    if other.size != mesh.size:
        raise ValueError(f"mesh.rollout makes {other.size} devices, but the mesh of training has {mesh.size}: both must have the same")
    return Mesh(mesh.devices.reshape(tuple(other.shape.values())), AXES, axis_types=mesh.axis_types)


def split(mesh: Mesh | None, name: str) -> int:
    """Into how many parts `mesh` splits a dimension of logical name `name`; 1 without a mesh."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in RULES[name]]))


def check_divides(field: str, size: int, mesh: Mesh, name: str = "rows") -> None:
    """Raises ValueError unless `size` is a multiple of the devices over which dimensions of logical name `name` are split."""
    if size % split(mesh, name):
        axes = " x ".join(f"{axis} = {mesh.shape[axis]}" for axis in RULES[name] if mesh.shape[axis] > 1)
        raise ValueError(f"{field} = {size} is not a multiple of the {split(mesh, name)} devices on the mesh axes {axes}")


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError for the first size of the model that the mesh does not divide."""
    for field, name in (
        ("width", "adapter"), ("heads", "heads"), ("kv_heads", "kv_heads"), ("mlp_width", "adapter"), ("vocab_size", "head_vocab")
    ):  # fmt: skip
        check_divides(f"model.{field}", getattr(config, field), mesh, name)
    kv_width = config.kv_heads * config.width // config.heads
    check_divides("model.kv_heads * head dimension", kv_width, mesh, "adapter")


# --- layouts ---


@dataclasses.dataclass(frozen=True)
class Layout:
    """Lays out arrays over a mesh inside jitted programs: `layout(x, *logical names)`; hashable, the `layout` of a `Policy`."""

    mesh: Mesh

    def __call__(self, x: jax.Array, *names: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, named(self.mesh, *names))

    def splits(self, name: str) -> int:
        """Into how many parts a dimension of logical name `name` is split."""
        return split(self.mesh, name)


def lay_out_rows(mesh: Mesh | None, tree: Any) -> Any:
    """Inside jitted programs: arrays [N, ...] split by rows; as they are without a mesh."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, rows_sharding(mesh))


def lay_out_params(mesh: Mesh | None, tree: Any) -> Any:
    """Inside jitted programs: parameters, gradients or optimiser states as `params_sharding` says; as they are without a mesh."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, params_sharding(mesh, tree))


def named(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical names; None, and dimensions not named, are not split."""
    return NamedSharding(mesh, PartitionSpec(*(None if name is None else RULES[name] for name in names)))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over data x fsdp."""
    return named(mesh, "rows")


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return named(mesh)


def param_sharding(mesh: Mesh, path: tuple[str, ...], ndim: int) -> NamedSharding:
    """Layout of the parameter at `path`, names that end with those of module and leaf; adapters and optimiser states likewise.

    What has no kernel's name (norms, the threshold network, counters) is whole on every device.
    """
    module, leaf = ("", "", *path)[-2:]
    names: tuple[str | None, ...] = ()
    if leaf == "embedding":
        names = EMBEDDING_AXES
    elif module in KERNEL_AXES:
        inputs, outputs = KERNEL_AXES[module]
        names = {"kernel": (inputs, outputs), "bias": (outputs,), "lora_a": LORA_A_AXES, "lora_b": LORA_B_AXES}[leaf]
    return named(mesh, *[None] * (ndim - len(names)), *names)  # layers are stacked in front


def params_sharding(mesh: Mesh, tree: Any) -> Any:
    """`param_sharding` of every array (or jax.ShapeDtypeStruct) in `tree`, by the path it has there."""
    return jax.tree_util.tree_map_with_path(lambda path, x: param_sharding(mesh, _names(path), len(x.shape)), tree)


def _names(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def init_sharded(mesh: Mesh, init: Callable[..., Any], *args: Any) -> Any:
    """`init(*args)`, jitted, with every parameter made where it will live."""
    return jax.jit(init, out_shardings=params_sharding(mesh, jax.eval_shape(init, *args)))(*args)


def reshard(tree: Any, shardings: Any) -> Any:
    """Arrays on one mesh -> the same on another of the same devices (see `remesh`). Arrays that are laid out so already are not copied."""
    return jax.device_put(tree, shardings)


# --- between hosts and devices ---


def host_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of `rows` rows this host's devices hold a part of: ascending indices, int64. On one host: all.

    Raises:
      ValueError: if `rows` is not a multiple of the devices over which rows are split.
    """
    check_divides("rows", rows, mesh)
    parts = {index[0].indices(rows)[:2] for index in rows_sharding(mesh).addressable_devices_indices_map((rows,)).values()}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def put_rows(mesh: Mesh, tree: Any, rows: int) -> Any:
    """This host's rows [n, ...], those of `host_rows`, -> device arrays [rows, ...] split by rows.

    Raises:
      ValueError: if `rows` is not a multiple of the devices over which rows are split, or n is not as `host_rows` says.
    """
    mine, sharding = host_rows(mesh, rows), rows_sharding(mesh)

    def put(values):
        values = np.asarray(values)
        if len(values) != len(mine):
            raise ValueError(f"this host holds {len(mine)} of {rows} rows, but was given {len(values)}")

        def part(index):  # a device's rows lie together here too
            start = np.searchsorted(mine, index[0].start or 0)
            return values[start : start + rows // split(mesh, "rows")]

        return jax.make_array_from_callback((rows, *values.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


def get_rows(tree: Any) -> Any:
    """Device arrays [rows, ...] split by rows -> this host's rows, as numpy arrays; the inverse of `put_rows`."""

    def get(array):
        parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(get, tree)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Arrays -> device arrays, whole on every device."""
    return jax.device_put(tree, replicated_sharding(mesh))


def fetch(tree: Any) -> Any:
    """Device arrays, however they are split -> whole numpy arrays on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


# --- between hosts ---


def any_host(flag: bool) -> bool:
    """Whether `flag` is true on any host. All hosts must ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def first_host(call: Callable[[], bytes]) -> bytes:
    """What `call()` gives on the first host, the only one that runs it, on every host: for files that need not be seen by all.

    Raises:
      what `call` raises, there; on the other hosts a RuntimeError that says the same.
    """
    if jax.process_count() == 1:
        return call()
    failure, message = None, np.zeros(0, np.uint8)
    if jax.process_index() == 0:
        try:
            message = np.frombuffer(call(), np.uint8)
        except (ValueError, OSError, RuntimeError) as error:
            failure, message = error, np.frombuffer(str(error).encode(), np.uint8)
    length, failed = multihost_utils.broadcast_one_to_all(np.array([len(message), failure is not None]))
    if jax.process_index() != 0:
        message = np.zeros(length, np.uint8)
    text = multihost_utils.broadcast_one_to_all(message).tobytes() if length else b""
    if failed:
        raise failure or RuntimeError(f"the first host says: {text.decode()}")
    return text
