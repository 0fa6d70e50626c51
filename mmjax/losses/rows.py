"""Where the rows of a batch lie, for the losses that work tile by tile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax.errors import ConfigError

Axis = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Static, so that a custom gradient can carry it: the mesh axes that rows are sharded over.

    Attributes:
        mesh: None means one device.
        axis: the axes; None on one device.
    """

    mesh: Mesh | AbstractMesh | None = None
    axis: tuple[str, ...] | None = None

    @classmethod
    def over(cls, mesh: Mesh | AbstractMesh | None, axis: Axis, count: int, what: str) -> Rows:
        """`count` rows of `what`, split over `axis` of the mesh.

        Raises:
            ConfigError: the mesh lacks an axis, or the rows cannot be split evenly.
        """
        if mesh is None:
            return cls()
        if not isinstance(mesh, Mesh | AbstractMesh):
            raise ConfigError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
        named = (axis,) if isinstance(axis, str) else axis
        if not isinstance(named, tuple | list) or not named or len(set(named)) < len(named):
            raise ConfigError(
                f"axis: expected a mesh axis, or a tuple of several different ones, got {axis!r}"
            )
        axes = (axis,) if isinstance(axis, str) else tuple(axis)
        missing = [name for name in axes if name not in mesh.shape]
        if missing:
            raise ConfigError(f"axis: the mesh has no axis {missing[0]!r}; it has {', '.join(mesh.shape)}")
        rows = cls(mesh, axes)
        if count % rows.devices:
            raise ConfigError(
                f"{what}: {count} rows cannot be split evenly over the {rows.devices} devices of {axes}"
            )
        return rows

    @property
    def devices(self) -> int:
        """How many ways the rows are split."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in self.axis or ())

    def lay(self, x: jax.Array, what: str) -> jax.Array:
        """Rows as a mesh with Explicit axes has to find them, wherever they lie; else as they are.

        Raises:
            ConfigError: they are split over such axes, and no mesh was given.
        """
        if self.mesh is None:
            split: Any = getattr(jax.typeof(x).sharding, "spec", ())
            if any(entry is not None for entry in split):
                raise ConfigError(f"{what}: sharded as {split} with Explicit axes; give mesh and axis")
            return x
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        explicit = tuple(name for name in self.axis or () if kinds[name] == AxisType.Explicit)
        if not explicit:
            return x
        return jax.sharding.reshard(x, NamedSharding(self._here(), PartitionSpec(explicit)))

    def _here(self) -> Any:
        """The mesh as a shard_map around the loss has it, which has made some of its axes its own."""
        around = jax.sharding.get_abstract_mesh()
        return around if AxisType.Manual in around.axis_types else self.mesh

    def run(self, function: Callable[..., Any], sharded: Any, whole: Any, out: Any) -> Any:
        """function(sharded, whole, axis) on every device's rows; `out` says True for results by row."""
        if self.mesh is None:
            return function(sharded, whole, None)
        split, same = PartitionSpec(self.axis), PartitionSpec()
        return jax.shard_map(
            lambda sharded, whole: function(sharded, whole, self.axis),
            mesh=self._here(),
            in_specs=(split, same),
            out_specs=jax.tree.map(lambda by_row: split if by_row else same, out),
            # The other axes, such as one that splits the vocabulary, stay with the compiler.
            axis_names=set(self.axis or ()),
            check_vma=False,
        )(sharded, whole)


def vary_alike(tree: Any, like: Any = None) -> Any:
    """Arrays that vary over the same axes of a shard_map that they are in, if they are in one.

    Args:
        tree: pytree of arrays.
        like: pytree of arrays whose axes count too.
    """
    axes = frozenset[str]().union(*(_varying(leaf) for leaf in jax.tree.leaves((tree, like))))

    def vary(leaf: Any) -> Any:
        missing = tuple(axes - _varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def _varying(x: Any) -> frozenset[str]:
    kind: Any = jax.typeof(x)
    return kind.manual_axis_type.varying
