"""Parameters from a folder's tensors and back, one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file

from mmjax.checkpoints.files import INDEX, WEIGHTS, TensorReader
from mmjax.checkpoints.rules import KeyRules, Link, expand, link
from mmjax.errors import CheckpointError
from mmjax.nn import TransposedKernel
from mmjax.nn.kernels import StoredKernel
from mmjax.parallel import ParamSpec, auto_mesh, partition_spec

SHARD_BYTES = 4 * 10**9
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def load_params(
    reader: TensorReader,
    rules: KeyRules,
    specs: Mapping[str, Any],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    where: str = "",
    transposed: str | None = None,
) -> dict[str, Any]:
    """Fill a model's parameters from a folder.

    Each tensor is read, cut and put on its device(s) before the next one is touched.

    Args:
        reader: the open folder.
        rules: the family's table.
        specs: nested dict of ParamSpec.
        dtype: None keeps each tensor's own.
        mesh: None puts everything on the default device; otherwise each parameter goes to its shards.
        where: the folder, for messages.
        transposed: kernels whose whole path this regular expression matches become a TransposedKernel.

    Returns:
        Nested dict of arrays.

    Raises:
        CheckpointError: the tensors do not fit the model; all faults are listed.
    """
    flat: dict[str, ParamSpec] = flatten_dict(dict(specs), sep="/")
    links = link(rules, reader.shapes, flat, where)
    _check_dtypes(reader, [entry.source for entry in links], dtype)
    mesh = None if mesh is None else auto_mesh(mesh)
    params: dict[str, Any] = {}
    for targets, group in itertools.groupby(links, key=lambda entry: entry.targets):
        pieces = _read(list(group), reader)
        for target in targets:
            place = _place_transposed if _is_turned(target, flat[target], transposed) else _place
            # Nothing here keeps a host copy while the next tensor is read.
            params[target] = place(pieces.pop(0), flat[target], dtype, mesh)
    return unflatten_dict(params, sep="/")


def param_shapes(
    reader: TensorReader,
    rules: KeyRules,
    specs: Mapping[str, Any],
    *,
    dtype: str | None = None,
    where: str = "",
    transposed: str | None = None,
) -> dict[str, Any]:
    """What `load_params` will give, as `jax.ShapeDtypeStruct`s; no tensor is read.

    Args:
        reader, rules, specs, dtype, where, transposed: as there.

    Raises:
        CheckpointError: as there.
    """
    flat: dict[str, ParamSpec] = flatten_dict(dict(specs), sep="/")
    links = link(rules, reader.shapes, flat, where)
    _check_dtypes(reader, [entry.source for entry in links], dtype)
    params: dict[str, Any] = {}
    for entry in links:
        kind = jnp.dtype(dtype) if dtype is not None else reader.dtype(entry.source)
        for target in entry.targets:
            shape = flat[target].shape
            if _is_turned(target, flat[target], transposed):
                params[target] = TransposedKernel(jax.ShapeDtypeStruct(shape[::-1], kind))  # type: ignore[arg-type]
            else:
                params[target] = jax.ShapeDtypeStruct(shape, kind)
    return unflatten_dict(params, sep="/")


def _is_turned(target: str, spec: ParamSpec, transposed: str | None) -> bool:
    return transposed is not None and len(spec.shape) == 2 and re.fullmatch(transposed, target) is not None


def _read(entries: Sequence[Link], reader: TensorReader) -> list[np.ndarray]:
    pieces = entries[0].transform.load(reader.read(entries[0].source))
    if entries[0].index is None:
        return list(pieces)
    return [_stack(pieces[0], entries, reader)]


def _stack(first: np.ndarray, entries: Sequence[Link], reader: TensorReader) -> np.ndarray:
    """The entries of one parameter's first axis, each from its own tensor."""
    whole = np.empty((len(entries), *first.shape), first.dtype)
    for entry in entries:
        whole[entry.index] = entry.transform.load(reader.read(entry.source))[0]
    return whole


def _check_dtypes(reader: TensorReader, names: list[str], dtype: str | None) -> None:
    narrow = jax.dtypes.canonicalize_dtype("float64") != "float64"
    for name in names:
        if reader.dtypes[name] == "F64" and dtype is None and narrow:
            raise CheckpointError(
                f"{reader.file_of(name)}: tensor {name} is float64, which jax only has with jax_enable_x64; "
                "set it, or load with dtype='float32'"
            )
        if reader.dtypes[name] not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(
                f"{reader.file_of(name)}: tensor {name} has dtype {reader.dtypes[name]}; "
                "quantised weights are not read, use a floating-point folder"
            )


def _place(piece: np.ndarray, spec: ParamSpec, dtype: str | None, mesh: Mesh | None) -> jax.Array:
    """One array on its device(s); every device gets a copy of its own part only, one after another."""
    target = jnp.dtype(dtype) if dtype is not None else piece.dtype
    if mesh is None:
        there, axes = _put(piece, None, target, alias=True)
        del piece  # nobody else has it: where the device needs memory of its own, the host's goes now
        return _arranged(there, axes, target)
    sharding = NamedSharding(mesh, partition_spec(spec.axes, spec.shape, mesh))
    parts = sharding.addressable_devices_indices_map(piece.shape).items()
    # Other processes' parts would stay with what is part of the whole.
    arrays = [_arranged(*_put(piece[index], device, target, alias=False), target) for device, index in parts]
    return jax.make_array_from_single_device_arrays(piece.shape, sharding, arrays, dtype=target)


def _place_transposed(
    piece: np.ndarray, spec: ParamSpec, dtype: str | None, mesh: Mesh | None
) -> TransposedKernel:
    """A kernel [D, F] as torch's folders have it, [F, D]: nothing is turned."""
    turned = dataclasses.replace(spec, shape=spec.shape[::-1], axes=spec.axes[::-1])
    return TransposedKernel(_place(piece.T, turned, dtype, mesh))


def _put(piece: np.ndarray, device: Any, dtype: Any, *, alias: bool) -> tuple[jax.Array, tuple[int, ...]]:
    """A piece on a device as it lies in memory, and the order of axes that makes it the piece again.

    numpy takes seconds to transpose what a device transposes in no time. On a CPU the host's own memory will
    do for what is arranged afterwards, and with `alias` for what stays as it is, too.
    """
    order = sorted(range(piece.ndim), key=lambda axis: -piece.strides[axis])
    axes = tuple(order.index(axis) for axis in range(piece.ndim))
    # Not ascontiguousarray: that makes a scalar an array of one entry.
    laid = np.asarray(piece.transpose(order), order="C")
    there = jax.device_put(laid, device, may_alias=alias or _changes(laid, axes, dtype))
    return there.block_until_ready(), axes


def _changes(x: Any, axes: tuple[int, ...], dtype: Any) -> bool:
    return axes != tuple(range(x.ndim)) or x.dtype != dtype


def _arranged(there: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """What `_put` gave as it is to be, in memory of its own."""
    return _arrange(there, axes, dtype).block_until_ready() if _changes(there, axes, dtype) else there


@functools.partial(jax.jit, static_argnames=("axes", "dtype"))
def _arrange(x: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    return x.transpose(axes).astype(dtype)


def named_tensors(rules: KeyRules, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters as (tensor name, array) under the names and shapes that the family's folders have.

    Raises:
        CheckpointError: as `refuse_stored_kernels`.
    """
    flat = flatten_dict(dict(params), sep="/")
    refuse_stored_kernels(flat)
    for entry in sorted(expand(rules, flat), key=lambda r: r.source):
        pieces = [np.asarray(jax.device_get(flat[target])) for target in entry.targets]
        for index, single in enumerate(entry.pieces(pieces[0].shape)):
            parts = [piece[index] for piece in pieces] if "{e}" in entry.source else pieces
            yield (
                single.source,
                np.ascontiguousarray(entry.transform.save(parts)).reshape(
                    entry.transform.source_shape([part.shape for part in parts])
                ),
            )


def refuse_stored_kernels(flat: Mapping[str, Any]) -> None:
    """Nothing, if every parameter is one array, as folders hold them.

    Args:
        flat: parameters by path.

    Raises:
        CheckpointError: one is an int8, transposed or adapted kernel.
    """
    for path, leaf in flat.items():
        if isinstance(leaf, StoredKernel):
            raise CheckpointError(
                f"{path} is stored as {type(leaf).__name__}, which hub folders cannot hold; save "
                "mmjax.nn.quantized.dequantize(params), where every kernel is one array again"
            )


def save_params(
    folder: Path, rules: KeyRules, params: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write safetensors (with an index when there are several), one shard in host memory at a time.

    Every file is written under another name; what an earlier save left stays as it is until all are whole.
    """
    written: list[tuple[Path, list[str]]] = []
    total = 0
    try:
        for number, shard in enumerate(_shards(named_tensors(rules, params), shard_bytes)):
            path = folder / f".{WEIGHTS}.part{number}"
            written.append((path, list(shard)))
            path.touch()
            mode = path.stat().st_mode
            save_file(shard, path, metadata={"format": "pt"})
            # safetensors makes files that only their owner reads, whatever the umask says.
            path.chmod(mode)
            total += sum(array.nbytes for array in shard.values())
        _replace_weights(folder, written, total)
    finally:
        for path, _ in written:
            path.unlink(missing_ok=True)


def _replace_weights(folder: Path, written: list[tuple[Path, list[str]]], total: int) -> None:
    """Move whole files to their names, then remove those that an earlier save left over."""
    count = len(written)
    names = (
        [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    stale = {path.name for path in folder.iterdir() if _OURS.fullmatch(path.name)} - set(names)
    if count > 1:
        # A crash between two moves must not leave old and new shards under an index that fits both.
        (folder / INDEX).unlink(missing_ok=True)
    for (path, _), name in zip(written, names, strict=True):
        os.replace(path, folder / name)
    if count > 1:
        weight_map = {t: name for (_, tensors), name in zip(written, names, strict=True) for t in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for name in stale:
        (folder / name).unlink()


def _shards(tensors: Iterator[tuple[str, np.ndarray]], limit: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, with the line ends that the text has."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(text.encode())
    os.replace(part, path)
