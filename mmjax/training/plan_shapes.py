"""A model, its state and its batches as shapes: nothing is made, and no data is looked at."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from mmjax.errors import ConfigError
from mmjax.parallel import param_shardings
from mmjax.training.experiment import Experiment
from mmjax.training.source import FromConfig, FromFolder, OpenedModel
from mmjax.training.state import merge

MOST_DEVICES = 4096
Shapes = dict[str, jax.ShapeDtypeStruct]


def mesh_shape(experiment: Experiment) -> dict[str, int]:
    """The experiment's mesh with every size known: an axis of -1, or no mesh at all, means one device.

    Raises:
        ConfigError: an axis of no devices, or more devices than can be planned for.
    """
    shape = {axis: 1 if size == -1 else size for axis, size in dict(experiment.mesh).items()}
    if any(size < 1 for size in shape.values()):
        raise ConfigError(
            f"mesh: sizes must be positive, or -1 for what remains; got {dict(experiment.mesh)}"
        )
    devices = math.prod(shape.values())
    if devices > MOST_DEVICES:
        raise ConfigError(f"mesh: {devices:,} devices; a plan is for {MOST_DEVICES:,} at most")
    return shape


def open_shapes(experiment: Experiment, mesh: Mesh) -> OpenedModel:
    """The experiment's model as shapes: no parameter is made or read, and no processor is opened.

    Args:
        experiment: its model comes from a config or from a folder, of which the headers are read, or says
            itself what it will be, by `open_shapes(mesh)`.
        mesh: what the shardings are for.

    Raises:
        ConfigError, CheckpointError: the model's config or folder is at fault.
    """
    own = getattr(experiment.model, "open_shapes", None)
    if own is not None:
        return own(mesh)
    if isinstance(experiment.model, FromFolder):
        return folder_shapes(experiment.model, mesh)
    bare: FromConfig = dataclasses.replace(experiment.model, processor=None)
    return bare.open(None, jax.random.key(experiment.train.seed), mesh)


def folder_shapes(source: FromFolder, mesh: Mesh) -> OpenedModel:
    """A folder's model as shapes, from the headers of its files; without weights, from its config.json alone.

    Args:
        source: names the folder. Without weights and without a dtype of its own, parameters are taken to be
            stored as config.json says.
        mesh: what the shardings are for.

    Raises:
        ConfigError, CheckpointError: the folder is at fault.
    """
    from mmjax.checkpoints.files import weight_names
    from mmjax.models.hub import find_folder
    from mmjax.nn import Execution, parameter_specs

    folder, execution = find_folder(source.path), source.execution or Execution()
    has_weights = bool(weight_names(folder))
    model, dtypes = (_weights_dtypes if has_weights else _config_dtypes)(folder, execution, source.dtype)
    nested = parameter_specs(model)
    specs = flatten_dict(nested, sep="/")
    shapes = {path: jax.ShapeDtypeStruct(spec.shape, dtypes[path]) for path, spec in specs.items()}
    shardings = flatten_dict(param_shardings(mesh, nested), sep="/")
    return OpenedModel(model=model, processor=None, shapes=shapes, shardings=shardings, params=dict)


def _weights_dtypes(folder: Path, execution: Any, dtype: str | None) -> tuple[Any, dict[str, str]]:
    """A folder's model, and every parameter's dtype: that of its tensor, if none is given."""
    from mmjax.checkpoints.files import open_tensors
    from mmjax.checkpoints.weights import param_shapes
    from mmjax.models.hub import open_model
    from mmjax.nn import parameter_specs

    with open_tensors(folder) as reader:
        family, model = open_model(folder, reader, execution)
        specs, rules = parameter_specs(model), family.rules(model)
        shapes = param_shapes(reader, rules, specs, dtype=dtype, where=str(folder))
        return model, {path: leaf.dtype.name for path, leaf in flatten_dict(shapes, sep="/").items()}


def _config_dtypes(folder: Path, execution: Any, dtype: str | None) -> tuple[Any, dict[str, str]]:
    """The same from config.json alone, which may name one dtype for all."""
    from mmjax.checkpoints.files import TensorReader, read_json
    from mmjax.models.hub import open_model
    from mmjax.nn import parameter_specs
    from mmjax.nn.config import canonical_dtype

    with contextlib.ExitStack() as stack:
        _, model = open_model(folder, TensorReader([], stack), execution)
    hub = read_json(folder / "config.json")
    dtype = dtype or canonical_dtype(hub.get("dtype") or hub.get("torch_dtype") or "float32")
    return model, dict.fromkeys(flatten_dict(parameter_specs(model), sep="/"), dtype)


def batch_shapes(model: Any, loss: Any, data: Any, params: Mapping[str, Any], size: int) -> Shapes:
    """The arrays of a batch.

    Args:
        model: its `example_batch` tells the inputs' shapes; texts are taken to come with a mask.
        loss: what it reads besides them is told by its own `example_batch`, where it has one, and taken for
            int32 [B] otherwise, as labels are.
        data: its own `example_batch(model)`, where it has one, tells all arrays of a batch of one; else its
            `max_length`, where it has one, is the texts' length.
        params: shapes of the parameters, flat.
        size: B.

    Returns:
        Name to jax.ShapeDtypeStruct.

    Raises:
        ConfigError: the loss reads something else, and does not tell what.
    """
    told = getattr(data, "example_batch", None)
    if told is not None:
        return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in told(model).items()}
    own = getattr(loss, "example_batch", None)
    examples = {**model.example_batch(1), **(own(1) if own else {})}
    shapes = {name: (x.shape[1:], x.dtype) for name, x in examples.items()}
    if "input_ids" in shapes:
        length = getattr(data, "max_length", None) or shapes["input_ids"][0][0]
        shapes |= dict.fromkeys(("input_ids", "attention_mask"), ((length,), jnp.dtype("int32")))
    small = {name: jax.ShapeDtypeStruct((2, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    others = _other_names(model, loss, params, small)
    shapes |= {name: ((), jnp.dtype("int32")) for name in sorted(others) if name not in shapes}
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def _other_names(model: Any, loss: Any, params: Mapping[str, Any], inputs: Shapes) -> set[str]:
    """Names that a loss looks up in a batch though they are none of the model's inputs."""
    groups = getattr(loss, "groups", None)
    asked: set[str] = set() if groups is None else {groups}

    class Batch(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            asked.add(name)
            return jnp.zeros(2, jnp.int32)

    def probe(params: Any, inputs: Any) -> Any:
        batch = Batch(inputs)
        for name in asked:
            batch[name] = jnp.zeros(2, jnp.int32)
        return loss(model, merge(params), batch, jax.random.key(0))

    try:
        jax.eval_shape(probe, dict(params), inputs)
    except (TypeError, ValueError) as error:
        if not asked:
            raise
        raise ConfigError(
            f"{type(loss).__name__}: the shapes of {', '.join(sorted(asked))} in its batches are not known; "
            "give the loss a method example_batch(batch_size) that returns them"
        ) from error
    return asked


def device_bytes(shapes: Any, shardings: Any) -> int:
    """Bytes that one device holds of a pytree of shapes.

    Args:
        shapes: pytree with shape and dtype; a PRNG key counts with its data.
        shardings: a sharding per leaf, or one for all.

    >>> from jax.sharding import SingleDeviceSharding
    >>> device_bytes(jax.ShapeDtypeStruct((4, 2), "bfloat16"), SingleDeviceSharding(jax.devices()[0]))
    16
    """
    leaves = jax.tree.leaves(shapes)
    if isinstance(shardings, jax.sharding.Sharding):
        placed = [shardings] * len(leaves)
    else:
        placed = jax.tree.leaves(shardings)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, placed, strict=True)
    )
