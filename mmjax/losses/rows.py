"""Where the rows of a batch lie, for the losses that work tile by tile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from mmjax.errors import ConfigError

Axis = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Static, so that a custom gradient can carry it: the mesh axes that rows are sharded over.

    Attributes:
        mesh: None means one device.
        axis: the axes; None on one device.
    """

    mesh: Mesh | None = None
    axis: tuple[str, ...] | None = None

    @classmethod
    def over(cls, mesh: Mesh | None, axis: Axis, count: int, what: str) -> Rows:
        """`count` rows of `what`, split over `axis` of the mesh.

        Raises:
            ConfigError: the mesh lacks an axis, or the rows cannot be split evenly.
        """
        if mesh is None:
            return cls()
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

    def run(self, function: Callable[..., Any], sharded: Any, whole: Any, out: Any) -> Any:
        """function(sharded, whole, axis) on every device's rows; `out` says True for results by row."""
        if self.mesh is None:
            return function(sharded, whole, None)
        split, same = PartitionSpec(self.axis), PartitionSpec()
        return jax.shard_map(
            lambda sharded, whole: function(sharded, whole, self.axis),
            mesh=self.mesh,
            in_specs=(split, same),
            out_specs=jax.tree.map(lambda by_row: split if by_row else same, out),
            # The other axes, such as one that splits the vocabulary, stay with the compiler.
            axis_names=set(self.axis or ()),
            check_vma=False,
        )(sharded, whole)
