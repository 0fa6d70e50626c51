"""`mmjax.load` and `mmjax.save`: hub folders in and out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError

from mmjax.checkpoints.files import TensorReader, open_tensors, read_json, weight_names
from mmjax.checkpoints.weights import (
    SHARD_BYTES,
    load_params,
    param_shapes,
    refuse_stored_kernels,
    save_params,
    write_json,
    write_text,
)
from mmjax.errors import CheckpointError, ConfigError
from mmjax.language.config import DecoderConfig
from mmjax.models.assemblies import Model
from mmjax.models.family import FAMILIES, Family, choose_architecture, family_of_model, family_of_type
from mmjax.models.hub_config import merge, refuse_code_and_quantisation
from mmjax.models.processor import Processor
from mmjax.nn import Execution, canonical_dtype, parameter_specs, transposed

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Says which ids end an answer, among others: nothing that a model computes with, so it travels as text.
_GENERATION = "generation_config.json"
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# Fetched one after another where there is nothing else; read without running anything in them.
_OTHER_FILES = ("pytorch_model*.bin", "flax_model*.msgpack")


def find_folder(folder_or_hub_id: str | os.PathLike[str]) -> Path:
    """A local folder as it is; a hub id through huggingface_hub's cache.

    A path object, and a string that starts like a path or whose first part exists here, is never
    looked up on the hub.

    Raises:
        CheckpointError: no such folder, or the hub does not give it.
    """
    if not isinstance(folder_or_hub_id, (str, os.PathLike)):
        raise CheckpointError(f"{folder_or_hub_id!r}: expected the path of a folder or a hub id")
    name = str(folder_or_hub_id)
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return path
    local = isinstance(folder_or_hub_id, os.PathLike) or path.exists()
    local = local or not _HUB_ID.fullmatch(name) or ("/" in name and Path(name.split("/")[0]).exists())
    if local:
        what = "is a file, not a folder" if path.is_file() else "no such folder"
        raise CheckpointError(
            f"{name or repr(name)}: {what}; give a folder with config.json and weights, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
        for pattern in _OTHER_FILES:
            found = weight_names(folder)
            # Some of this kind may be left from a download that was broken off.
            if found and not fnmatch(found[0], pattern):
                break
            folder = Path(snapshot_download(name, allow_patterns=[pattern]))
        return folder
    except Exception as error:  # The errors of its http library change with its version.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name}: no such folder here, and the hub did not give it ({reason})"
        ) from None


def open_model(folder: Path, reader: TensorReader, execution: Execution) -> tuple[Family, Model]:
    """The model that a folder's config.json describes, without its parameters.

    Raises:
        ConfigError, CheckpointError: the config is missing, damaged, unknown or impossible.
    """
    where = str(folder / "config.json")
    hub = read_json(folder / "config.json")
    family = family_of_type(hub.get("model_type"), where)
    refuse_code_and_quantisation({**hub, "auto_map": None} if family.own_code else hub, where)
    architecture = choose_architecture(family, hub, where)
    config = family.read_config(hub, architecture, reader.shapes.keys(), where)
    return family, family.architectures[architecture](config, execution=execution)


@contextlib.contextmanager
def open_headers(folder: Path, execution: Execution) -> Iterator[tuple[Family, Model, TensorReader]]:
    """A folder in any layout that its family has: its model without parameters, and its tensors by name.

    Yields:
        The family, the model as the folder's tensors have it, and the tensors, of which none is read.

    Raises:
        ConfigError, CheckpointError: as `open_model` and `open_tensors`.
    """
    hub = read_json(folder / "config.json")
    family = family_of_type(hub.get("model_type"), str(folder / "config.json"))
    other = family.other_tensors and family.other_tensors(folder, hub, find_folder)
    if other:
        with other as (config, reader):
            (architecture,) = family.architectures.values()
            yield family, architecture(config, execution=execution), reader
        return
    with open_tensors(folder) as reader:
        yield *open_model(folder, reader, execution), reader


def load(
    folder_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    execution: Execution | None = None,
    transpose_kernels: bool = False,
) -> tuple[Model, dict[str, Any], Processor | None]:
    """Open a hub folder.

    Args:
        folder_or_hub_id: a folder with config.json and safetensors, or else pytorch_model.bin (of which
            only tensors are read) or flax_model.msgpack; anything that is not a folder here and reads like
            "name" or "organisation/name" is fetched through huggingface_hub.
        dtype: dtype of the parameters, such as "bfloat16"; None keeps the folder's.
        mesh: put every parameter onto its shards (see `mmjax.parallel`); None means the default device.
        execution: compute dtype, scanned layers, remat; None of them changes the parameters.
        transpose_kernels: keep kernels as the transposes that most folders have (see
            `mmjax.nn.transpose_kernels`): for generating text in bfloat16 on a CPU.

    Returns:
        The model, its parameters, and its processor (None if the folder has no processor files).

    Raises:
        ConfigError, CheckpointError: anything wrong, with the file and what to do. Nothing in the folder is
            ever executed.
    """
    options: dict[str, Any] = dict(execution=execution, transpose_kernels=transpose_kernels)
    with open_folder(folder_or_hub_id, dtype, mesh, **options) as opened:
        return opened.model, opened.read(), opened.processor


@dataclasses.dataclass(frozen=True)
class OpenFolder:
    """A hub folder in which everything but the parameters has been read.

    Attributes:
        model, processor: as `load` returns them.
        shapes: gives the parameters as `jax.ShapeDtypeStruct`s, without shardings.
        read: gives the parameters; both raise CheckpointError.
    """

    model: Model
    processor: Processor | None
    shapes: Callable[[], dict[str, Any]]
    read: Callable[[], dict[str, Any]]


@contextlib.contextmanager
def open_folder(
    folder_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    execution: Execution | None = None,
    transpose_kernels: bool = False,
) -> Iterator[OpenFolder]:
    """What `load` does in two steps, so that a call can be checked before parameters are read.

    Args:
        folder_or_hub_id, dtype, mesh, execution, transpose_kernels: as there.

    Yields:
        The folder, whose parameters can be read until the block ends; those of another layout than the
        family's own (see `Family.other_layout`) have been.

    Raises:
        ConfigError, CheckpointError: as there.
    """
    dtype = None if dtype is None else canonical_dtype(dtype)
    if dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise ConfigError(
            "dtype: 'float64' needs jax_enable_x64; set it, or use one of float16, bfloat16, float32"
        )
    folder = find_folder(folder_or_hub_id)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder / 'config.json'}: no such file; a hub folder needs one")
    hub = read_json(folder / "config.json")
    kind = hub.get("model_type")
    known = isinstance(kind, str) and kind in FAMILIES
    other = family_of_type(kind, str(folder / "config.json")).other_layout if known else None
    opened = other and other(folder, hub, dtype=dtype, mesh=mesh, execution=execution, find=find_folder)
    if opened:
        model, params, processor = opened
        params = transposed.transpose_kernels(params) if transpose_kernels else params
        shapes = functools.partial(jax.eval_shape, lambda: params)
        yield OpenFolder(_with_generation(model, folder), processor, shapes, lambda: params)
        return
    with open_tensors(folder) as reader:
        family, model = open_model(folder, reader, execution or Execution())
        try:
            specs = parameter_specs(model)
        except ConfigError as error:
            raise ConfigError(f"{folder / 'config.json'}: {error}") from None
        given: dict[str, Any] = dict(
            dtype=dtype,
            where=str(folder),
            transposed=transposed.FEW_ROWS_KERNELS if transpose_kernels else None,
        )
        rules = family.rules(model)
        yield OpenFolder(
            _with_generation(model, folder),
            Processor.from_folder(folder),
            functools.partial(param_shapes, reader, rules, specs, **given),
            functools.partial(load_params, reader, rules, specs, mesh=mesh, **given),
        )


def _with_generation(model: Model, folder: Path) -> Model:
    """A language model with the folder's generation_config.json in its brain's config, for `save`.

    Raises:
        CheckpointError: the file is damaged.
    """
    path, config = folder / _GENERATION, model.config
    brain = _brain(config)
    if brain is None or not path.is_file():
        return model
    read_json(path)
    brain = dataclasses.replace(brain, generation_config=path.read_bytes().decode())
    alone = isinstance(config, DecoderConfig)
    return model.clone(config=brain if alone else dataclasses.replace(config, text_config=brain))


def _brain(config: Any) -> DecoderConfig | None:
    """The config of the decoder that a model is or has."""
    brain = getattr(config, "text_config", config)
    return brain if isinstance(brain, DecoderConfig) else None


def save(
    folder: str | os.PathLike[str],
    model: Model,
    params: Mapping[str, Any],
    processor: Processor | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `load` and transformers open.

    The generation_config.json of the folder that a language model was opened from is written again as it is.

    Args:
        folder: made if it does not exist; the model files of an earlier save in it are replaced.
        model, params: as `load` or training gives them; parameters may be sharded.
        processor: written too, if given.
        shard_bytes: weights larger than this are split into several files.

    Raises:
        CheckpointError: parameters that do not fit the model, kernels that are not arrays (int8, transposed;
            see `mmjax.nn.quantized.dequantize`), or a folder that cannot be written.
    """
    family, architecture = family_of_model(model)
    flat = check_params(model, params)
    dtypes = {jnp.dtype(leaf.dtype).name for leaf in flat.values()}
    hub = merge(
        model.config.hub,
        {
            **family.write_config(model.config, architecture),
            "architectures": [architecture],
            "dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
        },
    )
    hub.pop("torch_dtype", None)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_params(folder, family.rules(model), params, shard_bytes)
        write_json(folder / "config.json", hub)
        brain = _brain(model.config)
        if brain is not None and brain.generation_config:
            write_text(folder / _GENERATION, brain.generation_config)
        if processor is not None:
            processor.save(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: cannot be written ({reason})") from None


def check_params(model: Model, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path, if they are exactly the model's.

    Raises:
        CheckpointError: missing, extra or misshapen ones, and what is no array of floats, all listed; or a
            stored kernel.
    """
    flat = flatten_dict(dict(params), sep="/")
    refuse_stored_kernels(flat)
    specs = flatten_dict(parameter_specs(model), sep="/")
    faults = [f"missing: {path}" for path in specs if path not in flat]
    faults += [f"extra: {path}" for path in flat if path not in specs]
    for path in specs.keys() & flat.keys():
        value, shape = flat[path], specs[path].shape
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
            faults.append(f"no array of floats: {path} is {getattr(value, 'dtype', type(value).__name__)}")
        elif tuple(value.shape) != shape:
            faults.append(f"misshapen: {path} is {list(value.shape)}, expected {list(shape)}")
    if faults:
        raise CheckpointError("parameters do not fit the model:\n  " + "\n  ".join(sorted(faults)))
    return flat
