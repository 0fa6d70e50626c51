"""Meshes and the table of sharding rules."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax.errors import ConfigError
from mmjax.nn import parameter_specs
from mmjax.parallel import (
    BATCH_AXES,
    MESH_AXES,
    SHARDING_RULES,
    ParamSpec,
    auto_mesh,
    batch_sharding,
    make_mesh,
    param_shardings,
    partition_spec,
    replicated,
    shard_rows,
)
from tests.tiny import MODELS


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (None, (8, 1, 1)),
        ({}, None),
        ({"data": 8}, (8, 1, 1)),
        ({"fsdp": -1}, (1, 8, 1)),
        ({"tensor": 2, "data": -1}, (4, 1, 2)),
        ({"tensor": 2, "fsdp": 2, "data": 2}, (2, 2, 2)),
        ({"data": 8, "fsdp": -1}, (8, 1, 1)),
        ({"data": np.int64(8)}, (8, 1, 1)),
    ],
)
def test_make_mesh(shape, sizes):
    if sizes is None:
        with pytest.raises(ConfigError, match="does not fill the 8 devices"):
            make_mesh(shape)
        return
    mesh = make_mesh(shape)
    assert mesh.axis_names == MESH_AXES == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == sizes
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]


def test_make_mesh_of_some_devices():
    mesh = make_mesh({"fsdp": 2}, jax.devices()[2:4])
    assert [d.id for d in mesh.devices.flat] == [jax.devices()[2].id, jax.devices()[3].id]


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ({"data": 3}, "{'data': 3} does not fill the 8 devices; the sizes must multiply"),
        ({"data": 16}, "does not fill the 8 devices"),
        ({"data": 3, "fsdp": -1}, "does not fill the 8 devices"),
        ({"data": 16, "fsdp": -1}, "does not fill the 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "sizes must be positive"),
        ({"data": -2}, "sizes must be positive"),
        ({"data": 8.0}, "sizes must be positive whole numbers"),
        ({"data": "8"}, "sizes must be positive whole numbers"),
        ({"data": True, "fsdp": 8}, "sizes must be positive whole numbers"),
        ({"data": None}, "sizes must be positive whole numbers"),
        ({"model": 8}, "unknown axis 'model'; the axes are data, fsdp, tensor"),
        ({3: 8}, "unknown axis 3"),
    ],
    ids=str,
)
def test_impossible_meshes(shape, match):
    with pytest.raises(ConfigError, match=f"mesh: .*{match}"):
        make_mesh(shape)


def test_a_mesh_of_no_devices():
    with pytest.raises(ConfigError, match="no devices"):
        make_mesh(None, [])


def test_auto_mesh():
    explicit = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    auto = auto_mesh(explicit)
    assert auto.axis_types == (AxisType.Auto,) * 2
    assert auto.axis_names == explicit.axis_names and (auto.devices == explicit.devices).all()
    assert auto_mesh(auto) is auto


def test_batches_lie_over_data_and_fsdp():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert BATCH_AXES == ("data", "fsdp")
    x = jax.device_put(np.arange(24.0).reshape(8, 3), batch_sharding(mesh))
    assert {part.data.shape for part in x.addressable_shards} == {(2, 3)}
    for part in x.addressable_shards:
        data, fsdp, _ = np.argwhere(mesh.devices == part.device)[0]
        np.testing.assert_array_equal(part.data, np.arange(24.0).reshape(8, 3)[4 * data + 2 * fsdp :][:2])
    key = jax.device_put(np.arange(3.0), replicated(mesh))
    assert {part.data.shape for part in key.addressable_shards} == {(3,)}


MESH = {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        ((), (), ()),
        ((None,), (7,), (None,)),
        (("embed", "mlp"), (8, 6), ("fsdp", "tensor")),
        (("mlp", "embed"), (6, 8), ("tensor", "fsdp")),
        (("embed", "heads"), (8, 4), ("fsdp", "tensor")),
        (("vocab", "embed"), (10, 8), ("tensor", "fsdp")),
        ((None, None, None, "embed"), (2, 2, 3, 8), (None, None, None, "fsdp")),
        # What an axis does not divide stays whole.
        (("vocab", "embed"), (49409, 768), (None, "fsdp")),
        (("embed", "mlp"), (6, 5), (None, None)),
        (("embed",), (0,), ("fsdp",)),
    ],
)
def test_partition_spec(axes, shape, spec):
    mesh = make_mesh(MESH)
    assert partition_spec(axes, shape, mesh) == PartitionSpec(*spec)


def test_partition_spec_of_a_mesh_without_the_axes():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("x", "tensor"))
    assert partition_spec(("embed", "mlp"), (8, 8), mesh) == PartitionSpec(None, "tensor")


@pytest.mark.parametrize(
    ("axes", "shape", "match"),
    [
        (("embed",), (8, 8), r"1 axis names \('embed',\) for an array of shape \(8, 8\)"),
        (("embed", "mlp", None), (8, 8), "3 axis names"),
        (("embed", "hidden"), (8, 8), "no rule for logical axis 'hidden'; known: embed, heads, mlp, vocab"),
        (("embed", "embed"), (8, 8), "two dimensions on one mesh axis"),
        (("heads", "mlp"), (8, 8), r"put two dimensions on one mesh axis: \['tensor', 'tensor'\]"),
        # Also where the sizes would not be split.
        (("vocab", "mlp"), (7, 7), "two dimensions on one mesh axis"),
    ],
)
def test_axes_that_cannot_be(axes, shape, match):
    with pytest.raises(ConfigError, match=f"sharding: .*{match}"):
        partition_spec(axes, shape, make_mesh(MESH))


def test_rules_are_an_argument_and_the_table_is_frozen():
    mesh = make_mesh(MESH)
    rules = {"embed": "tensor", "mlp": "fsdp"}
    assert partition_spec(("embed", "mlp"), (8, 8), mesh, rules) == PartitionSpec("tensor", "fsdp")
    specs = {"a": {"b": ParamSpec((8, 8), "float32", ("embed", "mlp"))}}
    assert param_shardings(mesh, specs, rules) == {
        "a": {"b": NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))}
    }
    with pytest.raises(TypeError):
        SHARDING_RULES["embed"] = "data"  # type: ignore[index]


def test_spec_sizes():
    spec = ParamSpec((3, 5), "bfloat16", (None, "embed"))
    assert (spec.size, spec.nbytes) == (15, 30)
    assert ParamSpec((), "float32", ()).size == 1


@pytest.mark.parametrize("name", MODELS)
def test_every_large_kernel_of_every_model_is_split(name):
    """Otherwise a model that needs the mesh would not fit it."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    specs = flatten_dict(parameter_specs(MODELS[name]), sep="/")
    shardings = flatten_dict(param_shardings(mesh, parameter_specs(MODELS[name])), sep="/")
    assert specs.keys() == shardings.keys()
    split = {path for path, sharding in shardings.items() if not sharding.is_fully_replicated}
    layers = [path for path in specs if path.endswith("kernel") and "/layers_" in path]
    assert layers
    for path in layers:
        assert set(shardings[path].spec) == {"fsdp", "tensor"}, path
    for path in specs:
        if path.endswith(("/kernel", "/embedding")) and "classifier" not in path:
            assert path in split, path


@pytest.mark.parametrize(
    ("rows", "axis", "kind", "spec"),
    [
        (8, 0, AxisType.Auto, (("data", "fsdp"),)),
        (8, -1, AxisType.Auto, (None, ("data", "fsdp"))),
        (6, 0, AxisType.Auto, ()),
        (8, 0, AxisType.Explicit, ()),
    ],
)
def test_rows_are_split_where_the_mesh_that_is_set_can(rows, axis, kind, spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), MESH_AXES, axis_types=(kind,) * 3)
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: shard_rows(x, axis))(x)
    np.testing.assert_array_equal(y, x)
    assert tuple(y.sharding.spec) == spec


def test_rows_are_left_alone_where_no_mesh_is_set():
    assert "sharding" not in str(jax.make_jaxpr(shard_rows)(np.ones((8, 4))))
