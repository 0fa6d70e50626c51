"""The device mesh: three named axes, of which any may have size one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax.errors import ConfigError

# data: batch is split, parameters are copies. fsdp: batch and parameters are split.
# tensor: heads, hidden units and vocabulary are split.
MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh with the axes data, fsdp and tensor; layouts inside jit are left to the compiler.

    Args:
        shape: axis name to size; a missing axis has size 1, one axis may be -1 (what remains).
            None means {"data": -1}.
        devices: the devices to use; None means all that jax sees.

    Returns:
        A Mesh whose axes are of type Auto.

    Raises:
        ConfigError: unknown axis, or sizes that do not multiply to the number of devices.

    >>> make_mesh({"data": 1}, jax.devices()[:1]).shape["tensor"]
    1
    """
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ConfigError("mesh: no devices were given")
    wanted = dict(shape if shape is not None else {"data": -1})
    unknown = [axis for axis in wanted if axis not in MESH_AXES]
    if unknown:
        raise ConfigError(f"mesh: unknown axis {unknown[0]!r}; the axes are {', '.join(MESH_AXES)}")
    sizes = {axis: wanted.get(axis, 1) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    whole = all(isinstance(size, numbers.Integral) and size is not True for size in sizes.values())
    if not whole or len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(
            f"mesh: sizes must be positive whole numbers, and at most one may be -1; got {dict(wanted)}"
        )
    if free:
        sizes[free[0]] = len(devices) // math.prod(size for size in sizes.values() if size != -1)
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh: {dict(wanted)} does not fill the {len(devices)} devices; "
            "the sizes must multiply to that number"
        )
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same mesh with axes of type Auto: `jax.make_mesh` makes Explicit ones unless told otherwise."""
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a batch: axis 0 over data and fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard_rows(x: jax.Array, axis: int = 0) -> jax.Array:
    """Activations [B, ...], whose rows stay split over the batch axes of the mesh that is set, if one is.

    A kernel that is split by fsdp can be multiplied in two ways: gathered, or as it lies, which makes every
    device compute a part of every row's features and send whole activations to add them up. Left to itself
    the compiler may take the second, that sends many times as much. `mmjax train` sets its mesh; elsewhere
    `jax.set_mesh` or `jax.sharding.use_abstract_mesh` does. Mesh axes that are not of type Auto are left
    alone, and so are rows that they do not divide.

    Args:
        x: of any shape.
        axis: the one that is split, where it is not the first: columns, where every row is looked up.

    >>> shard_rows(jax.numpy.ones((2, 3))).shape
    (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(name for name in BATCH_AXES if kinds.get(name) == AxisType.Auto and mesh.shape[name] > 1)
    if not axes or x.shape[axis] % math.prod(mesh.shape[name] for name in axes):
        return x
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = axes
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: keys, counters, metrics."""
    return NamedSharding(mesh, PartitionSpec())
