"""Reading a folder's safetensors: every header checked before any tensor is read, nothing executed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mmjax.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What LLaVA's original repository calls a bridge by itself.
_BRIDGES = ("mm_projector.bin", "mm_projector.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_DTYPES = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U64": np.dtype(np.uint64),
        "U32": np.dtype(np.uint32),
        "U16": np.dtype(np.uint16),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)
# Tensors are read in pieces, several at a time: one reader does not take all that a disk or a cache can give.
_PIECE_BYTES, _READERS = 4 << 20, 4
# What XLA asks of an array's first byte on CPU.
_ALIGNMENT = 64

# Published configs nest about five deep. Deeper ones parse, but exhaust the stack when they are written.
_MAX_DEPTH = 64


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: no such file, not JSON (NaN and Infinity are none), not an object, or nested deeply.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise CheckpointError(f"{path}: nested more than {_MAX_DEPTH} deep; this is no config, download it again")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _inside(value: Any) -> list[Any]:
    """The lists and objects directly inside one."""
    members = value.values() if isinstance(value, dict) else value
    return [member for member in members if isinstance(member, (dict, list))]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a folder's weights.

    Raises:
        CheckpointError: none, pickled ones only, a bridge only, or an index that is wrong or points outside
            the folder.
    """
    if (folder / INDEX).exists():
        return _indexed_files(folder)
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    found = sorted(folder.glob("*.safetensors"))
    _refuse_bridge(folder, found)
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files but no {INDEX} that says which belong together"
        )
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]}: only safetensors weights are read, since opening a pickle can run code; "
            "convert it with transformers' save_pretrained first"
        )
    raise CheckpointError(f"{folder}: no {WEIGHTS}; the folder has no weights")


def _refuse_bridge(folder: Path, found: list[Path]) -> None:
    """Say what to do with a folder of LLaVA's original repository that has a bridge and no other weights."""
    bridges = [name for name in _BRIDGES if (folder / name).is_file()]
    others = any(path.name not in _BRIDGES for path in found) or any(folder.glob("pytorch_model*"))
    if bridges and not others:
        raise CheckpointError(
            f"{folder}: {bridges[0]} is a bridge only, without eyes and brain; put it onto a model with "
            "mmjax.training.load_parts, or train from LlavaFromParts(bridge=...)"
        )


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; download the file again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if (
            Path(name).name != name
            or name in ("", ".", "..")
            or "\\" in name
            or "\0" in name
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(f"{index}: {name!r} is not a safetensors file of this folder; refused")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: named in {INDEX} but missing; download it")
    return [folder / name for name in names]


class _TensorFile:
    """One safetensors file: what is in it, as the library finds it to be, and where."""

    def __init__(self, path: Path, pool: Executor) -> None:
        self.path, self._pool = path, pool
        try:
            with safe_open(path, framework="np") as handle:
                # In the order of their bytes, between which there is nothing.
                slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
                self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self.dtypes = {name: part.get_dtype() for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: not a whole safetensors file ({error}); download it again"
            ) from None
        for name, dtype in self.dtypes.items():
            if dtype not in _DTYPES:
                raise CheckpointError(f"{path}: tensor {name} has dtype {dtype}, which is not read")
        sizes = [math.prod(self.shapes[name]) * _DTYPES[self.dtypes[name]].itemsize for name in self.shapes]
        begins = itertools.accumulate(sizes, initial=path.stat().st_size - sum(sizes))
        self._begins = dict(zip(self.shapes, begins, strict=False))

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored, in memory that jax takes over as it is."""
        shape, dtype = self.shapes[name], _DTYPES[self.dtypes[name]]
        values = _aligned(math.prod(shape) * dtype.itemsize)
        begin = self._begins[name]

        def fill(start: int) -> None:
            part = values[start : start + _PIECE_BYTES].data
            with self.path.open("rb", buffering=0) as file:
                file.seek(begin + start)
                while part:
                    count = file.readinto(part)
                    if not count:
                        raise OSError("it ended early")
                    part = part[count:]

        try:
            list(self._pool.map(fill, range(0, len(values), _PIECE_BYTES)))
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read ({error})") from None
        return values.view(dtype).reshape(shape)


def _aligned(size: int) -> np.ndarray:
    """So many bytes, which begin where jax wants arrays to begin: else it copies them."""
    room = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT
    return room[begin : begin + size]


class TensorReader:
    """The tensors of a folder by name: shapes at once, values on request.

    Use through `open_tensors`, which closes the files.
    """

    def __init__(self, files: list[Path], stack: ExitStack) -> None:
        self._owner: dict[str, _TensorFile] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        pool = stack.enter_context(ThreadPoolExecutor(_READERS))
        for path in files:
            self._add(_TensorFile(path, pool))

    def _add(self, file: _TensorFile) -> None:
        for name in file.shapes:
            if name in self._owner:
                raise CheckpointError(f"{file.path}: tensor {name} is also in {self._owner[name].path.name}")
            self._owner[name] = file
        self.shapes |= file.shapes
        self.dtypes |= file.dtypes

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored."""
        return self._owner[name].read(name)

    def dtype(self, name: str) -> np.dtype:
        """What `read` gives."""
        return _DTYPES[self.dtypes[name]]

    def file_of(self, name: str) -> Path:
        """The file a tensor is in."""
        return self._owner[name].path


@contextmanager
def open_tensors(folder: Path) -> Iterator[TensorReader]:
    """Open all weight files of a folder, checking each header and the index against them.

    Raises:
        CheckpointError: see `weight_files`; a file that is cut short, or whose header or offsets lie.
    """
    with ExitStack() as stack:
        reader = TensorReader(weight_files(folder), stack)
        if (folder / INDEX).exists():
            _check_index(folder, reader)
        yield reader


def _check_index(folder: Path, reader: TensorReader) -> None:
    weight_map: Mapping[str, str] = read_json(folder / INDEX)["weight_map"]
    for name, file in weight_map.items():
        if name not in reader.shapes:
            raise CheckpointError(
                f"{folder / INDEX}: tensor {name} is not in {file}; the index is not of these files"
            )
        if reader.file_of(name).name != file:
            raise CheckpointError(
                f"{folder / INDEX}: tensor {name} is not in {file} but in {reader.file_of(name).name}"
            )
    unlisted = sorted(set(reader.shapes) - set(weight_map))
    if unlisted:
        raise CheckpointError(
            f"{folder / INDEX}: does not list {unlisted[0]}; the index is not of these files"
        )
