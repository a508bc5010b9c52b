"""Devices in a mesh, and which axis of which array lies on which axis of it."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
MESH_AXIS_OF = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
"""Logical axes of parameters that are split; the others are whole on every device."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh (data, fsdp, tensor) of all devices; at most one size may be -1, what is left.

    ValueError if the sizes do not multiply to the number of devices.
    """
    sizes, count = [data, fsdp, tensor], jax.device_count()
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {named}: sizes must be positive, and one of them may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // -int(np.prod(sizes)), 1)
    if int(np.prod(sizes)) != count:
        raise ValueError(f"mesh {named}: the sizes must multiply to the number of devices, {count}")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def logical_axes(params: nnx.State) -> dict[str, Any]:
    """For every parameter a PartitionSpec of its logical axis names, in a tree of plain dicts.

    A parameter with one axis more than its metadata names is stacked over "layers".
    """
    named = []
    for path, variable in nnx.to_flat_state(params):
        axes = variable.get_metadata("axes")
        stacked = ("layers",) * (len(variable.shape) - len(axes))
        named.append((path, P(*stacked, *axes)))
    return nnx.to_pure_dict(nnx.from_flat_state(named))


def parameter_shardings(abstract: Any, axes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter, from the tree of its logical axes.

    ValueError names a parameter with an axis that the mesh does not divide.
    """

    def one(path: tuple, leaf: jax.ShapeDtypeStruct, names: P) -> NamedSharding:
        spec = [MESH_AXIS_OF.get(name) if isinstance(name, str) else None for name in names]
        for size, name, axis in zip(leaf.shape, names, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(f"{where} {leaf.shape}: its axis {name!r} of size {size} cannot be split over "
                                 f"the mesh axis {axis} of size {mesh.shape[axis]}")  # fmt: skip
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(one, abstract, axes)


def state_shardings(abstract: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that holds copies of the parameter tree (an optimizer's moments).

    A leaf whose path ends in a parameter's path lies where that parameter does; others are replicated.
    """
    by_path = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    replicated = NamedSharding(mesh, P())

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        tails = (path[i:] for i in range(len(path)))
        return next((by_path[tail] for tail in tails if tail in by_path), replicated)

    return jax.tree_util.tree_map_with_path(one, abstract)


def check_rows(rows: int, micro_batches: int, mesh: Mesh) -> None:
    """ValueError unless every device gets equally many rows of every micro-batch."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (devices * micro_batches):
        raise ValueError(f"a batch of {rows} rows cannot be split into {micro_batches} micro-batches over "
                         f"{devices} devices: make it a multiple of {devices * micro_batches}")  # fmt: skip
