"""The mesh and all device placement: rows are split over the `data` axis, parameters are replicated.

Programs are `jax.jit` over arrays with a `NamedSharding`; what `pmap` used to give is the mesh's data axis.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of `data` devices on the axis "data"; -1 = all devices.

    Raises:
      ValueError: if there are fewer devices.
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if not 1 <= count <= len(devices):
        raise ValueError(f"mesh.data = {data}, but there are {len(devices)} devices ({devices[0].platform}); use -1 for all")
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Host or device arrays [N, ...] -> device arrays split by rows.

    Raises:
      ValueError: if N is not a multiple of the data axis.
    """
    for leaf in jax.tree.leaves(tree):
        check_divides("rows", np.shape(leaf)[0], mesh)
    return jax.device_put(tree, rows_sharding(mesh))


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Arrays -> device arrays, whole on every device."""
    return jax.device_put(tree, replicated_sharding(mesh))


def check_divides(name: str, size: int, mesh: Mesh) -> None:
    """Raises ValueError unless `size` is a multiple of the data axis."""
    if size % mesh.shape["data"]:
        raise ValueError(f"{name} = {size} is not a multiple of the {mesh.shape['data']} devices on the mesh axis 'data'")
