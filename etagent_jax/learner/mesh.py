"""Devices in a mesh, and which axis of which array lies on which axis of it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from etagent_jax.model.transformer import ModelConfig

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
TABLE = P("tensor", "fsdp")
"""Of a table [V, D]: the embedding, or the head transposed."""
MESH_AXIS_OF = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
"""Logical axes of parameters that are split; the others are whole on every device."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor) of `devices` (default: all there are); at most one size may be -1, what is left.

    ValueError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {named}: sizes must be positive, and one of them may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // -int(np.prod(sizes)), 1)
    if int(np.prod(sizes)) != count:
        raise ValueError(f"mesh {named}: the sizes must multiply to the number of devices, {count}")
    grid = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
    """ValueError unless every device of the tensor axis gets whole heads, equally many."""
    tensor = mesh.shape["tensor"]
    for name, heads in (("query heads", config.num_heads), ("key/value heads", config.num_kv_heads)):
        if heads % tensor:
            raise ValueError(f"mesh: a tensor axis of {tensor} does not divide the model's {heads} {name}; "
                             f"make it a divisor of {config.num_kv_heads} and give the rest to fsdp")  # fmt: skip


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
