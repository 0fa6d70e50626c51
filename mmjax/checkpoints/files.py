"""Reading a folder's safetensors: every header checked before any tensor is read, nothing executed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mmjax.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What LLaVA's original repository calls a bridge by itself.
_BRIDGES = ("mm_projector.bin", "mm_projector.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
# A map that more than this was read from is made anew.
_MAPPED_BYTES = 32 << 20

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


class _MappedFile:
    """One safetensors file, mapped anew now and then: pages that were read stay in memory until then."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self._open()
        stack.callback(self.close)

    def _open(self) -> None:
        self._taken = 0
        try:
            self.handle = safe_open(self.path, framework="np").__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: not a whole safetensors file ({error}); download it again"
            ) from None

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored."""
        try:
            tensor = self.handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read ({error})") from None
        self._taken += tensor.nbytes
        if self._taken > _MAPPED_BYTES:
            self.close()
            self._open()
        return tensor

    def close(self) -> None:
        """Take the map away."""
        self.handle.__exit__(None, None, None)


class TensorReader:
    """The tensors of a folder by name: shapes at once, values on request.

    Use through `open_tensors`, which closes the files.
    """

    def __init__(self, files: list[Path], stack: ExitStack) -> None:
        self._owner: dict[str, _MappedFile] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in files:
            self._add(_MappedFile(path, stack))

    def _add(self, file: _MappedFile) -> None:
        path, handle = file.path, file.handle
        for name in handle.keys():  # noqa: SIM118 (a safe_open is no mapping)
            if name in self._owner:
                raise CheckpointError(f"{path}: tensor {name} is also in {self._owner[name].path.name}")
            part = handle.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} has dtype {part.get_dtype()}, which is not read"
                )
            self._owner[name] = file
            self.shapes[name] = tuple(part.get_shape())
            self.dtypes[name] = part.get_dtype()

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored."""
        return self._owner[name].read(name)

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
