"""The one table from logical axes to mesh axes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax.errors import ConfigError
from mmjax.parallel.specs import LogicalAxes, ParamSpec

# embed is split by fsdp, since every large kernel has it; the other axes are those that a layer can be
# cut along with one all-reduce at its end.
SHARDING_RULES: Mapping[str, str] = MappingProxyType(
    {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
)


def partition_spec(
    axes: LogicalAxes, shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, str] = SHARDING_RULES
) -> PartitionSpec:
    """Translate a parameter's logical axes for one mesh.

    A dimension that its mesh axis does not divide stays whole: a vocabulary of 49,409 entries is a
    fact of the checkpoint, not an error. So does one whose axis the mesh does not have.

    Raises:
        ConfigError: an axis name without a rule, or two dimensions on one mesh axis.

    >>> mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    >>> tuple(partition_spec(("embed", "mlp"), (8, 32), mesh))
    ('fsdp', 'tensor')
    """
    if len(axes) != len(shape):
        raise ConfigError(f"sharding: {len(axes)} axis names {axes} for an array of shape {shape}")
    unknown = [name for name in axes if name is not None and name not in rules]
    if unknown:
        raise ConfigError(f"sharding: no rule for logical axis {unknown[0]!r}; known: {', '.join(rules)}")
    targets = [None if name is None else rules[name] for name in axes]
    used = [target for target in targets if target is not None]
    if len(used) != len(set(used)):
        raise ConfigError(f"sharding: axes {axes} put two dimensions on one mesh axis: {targets}")
    fits = [
        target if target in mesh.shape and size % mesh.shape[target] == 0 else None
        for target, size in zip(targets, shape, strict=True)
    ]
    return PartitionSpec(*fits)


def param_shardings(mesh: Mesh, specs: Any, rules: Mapping[str, str] = SHARDING_RULES) -> Any:
    """NamedSharding for every ParamSpec of a nested dict (see `mmjax.nn.parameter_specs`)."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, partition_spec(spec.axes, spec.shape, mesh, rules)),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )
