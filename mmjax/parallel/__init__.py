"""The device mesh and the one table of sharding rules."""

from mmjax.parallel.memory import keep_freed_memory, only_cpu
from mmjax.parallel.mesh import (
    BATCH_AXES,
    MESH_AXES,
    auto_mesh,
    batch_sharding,
    make_mesh,
    replicated,
    shard_rows,
)
from mmjax.parallel.sharding import SHARDING_RULES, param_shardings, partition_spec
from mmjax.parallel.specs import LogicalAxes, ParamSpec

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "SHARDING_RULES",
    "LogicalAxes",
    "ParamSpec",
    "auto_mesh",
    "batch_sharding",
    "keep_freed_memory",
    "make_mesh",
    "only_cpu",
    "param_shardings",
    "partition_spec",
    "replicated",
    "shard_rows",
]
