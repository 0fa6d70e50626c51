"""Reading a folder's weights: every header checked before any tensor is read, nothing executed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mmjax.checkpoints.flax_files import FlaxFile
from mmjax.checkpoints.places import DTYPES, Place, aligned
from mmjax.checkpoints.torch_files import torch_places
from mmjax.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What transformers called them before, as torch.save writes them.
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
# What its Flax classes called them.
FLAX_WEIGHTS = "flax_model.msgpack"
FLAX_INDEX = "flax_model.msgpack.index.json"
#: How files of torch.save are called.
TORCH = (".bin", ".pt", ".pth")
#: What a folder's weights are looked for in, the first that is there: their patterns, whole, and an index.
KINDS = (
    ("*.safetensors", WEIGHTS, INDEX),
    ("pytorch_model*.bin", TORCH_WEIGHTS, TORCH_INDEX),
    ("flax_model*.msgpack", FLAX_WEIGHTS, FLAX_INDEX),
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
# What goes onto a folder's weights; the first two are bridges of LLaVA's original repository.
_PARTS = ("mm_projector.bin", "mm_projector.safetensors", "parts.safetensors", *_ADAPTERS)
_NOT_READ = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
# Tensors are read in pieces, several at a time: one reader does not take all that a disk or a cache can give.
_PIECE_BYTES, _READERS = 4 << 20, 4

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


def weight_names(folder: Path) -> list[str]:
    """Files of a folder that may hold its weights: safetensors, else those of torch.save, else of Flax.

    What belongs onto another folder's weights (adapters, bridges, parts) is none of them.
    """
    for pattern, _, _ in KINDS:
        found = sorted(path.name for path in folder.glob(pattern) if path.name not in _PARTS)
        if found:
            return found
    return []


def weight_files(folder: Path) -> list[Path]:
    """The files that make up a folder's weights: safetensors, else those of torch.save, else of Flax.

    Raises:
        CheckpointError: none, those of other kinds only, parts only, or an index that is wrong or points
            outside the folder.
    """
    return _find_weights(folder)[0]


def _find_weights(folder: Path) -> tuple[list[Path], Path | None]:
    """`weight_files`, and the index that lists them, if one does."""
    if (folder / INDEX).exists():
        return _indexed_files(folder / INDEX, "*.safetensors"), folder / INDEX
    found = weight_names(folder)
    for pattern, whole, index in KINDS:
        if whole in found:
            return [folder / whole], None
        if (folder / index).exists():
            return _indexed_files(folder / index, pattern), folder / index
    if len(found) == 1 and found[0].endswith(".safetensors"):
        return [folder / found[0]], None
    if found:
        index = next(index for pattern, _, index in KINDS if fnmatch(found[0], pattern))
        raise CheckpointError(
            f"{folder / found[0]}: {len(found)} {found[0].rpartition('.')[2]} files but no {index} that says "
            "which belong together"
        )
    _refuse_parts(folder)
    others = sorted(path.name for pattern in _NOT_READ for path in folder.glob(pattern))
    if others:
        raise CheckpointError(
            f"{folder / others[0]}: only safetensors, {TORCH_WEIGHTS} and {FLAX_WEIGHTS} are read, since "
            "opening a pickle can run code; convert it with transformers' save_pretrained first"
        )
    raise CheckpointError(f"{folder}: no {WEIGHTS}; the folder has no weights")


def _refuse_parts(folder: Path) -> None:
    """Say what to do with a folder that has a bridge or an adapter and no other weights."""
    adapters, there = ([n for n in names if (folder / n).is_file()] for names in (_ADAPTERS, _PARTS))
    if adapters:
        raise CheckpointError(
            f"{folder}: {adapters[0]} is an adapter, without the model that it is for; put it onto that with "
            "mmjax.training.load_tuned, or train on from LoraFromFolder(adapter=...)"
        )
    if there:
        raise CheckpointError(
            f"{folder}: {there[0]} is a bridge only, without eyes and brain; put it onto a model with "
            "mmjax.training.load_parts, or train from LlavaFromParts(bridge=...)"
        )


def _indexed_files(index: Path, pattern: str) -> list[Path]:
    """The files that an index lists, all of this pattern's kind."""
    folder, kind = index.parent, pattern.rpartition(".")[2]
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
            or not name.endswith("." + kind)
        ):
            raise CheckpointError(f"{index}: {name!r} is not a {kind} file of this folder; refused")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: named in {index.name} but missing; download it")
    return [folder / name for name in names]


def _safetensors_places(path: Path) -> dict[str, Place]:
    """Where the tensors of a safetensors file are, as the library finds them to be."""
    try:
        with safe_open(path, framework="np") as handle:
            # In the order of their bytes, between which there is nothing.
            slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); download it again") from None
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has dtype {dtype}, which is not read")
    sizes = [Place(dtypes[name], shapes[name], 0).size for name in shapes]
    begins = itertools.accumulate(sizes, initial=path.stat().st_size - sum(sizes))
    return {
        name: Place(dtypes[name], shapes[name], begin) for name, begin in zip(shapes, begins, strict=False)
    }


class _TensorFile:
    """One file: what is in it, and where."""

    def __init__(self, path: Path, pool: Executor) -> None:
        self.path, self._pool = path, pool
        self.places = torch_places(path) if path.suffix in TORCH else _safetensors_places(path)

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored, in memory that jax takes over as it is."""
        place = self.places[name]
        values = aligned(place.size)

        def fill(start: int) -> None:
            part = values[start : start + _PIECE_BYTES].data
            with self.path.open("rb", buffering=0) as file:
                file.seek(place.begin + start)
                while part:
                    count = file.readinto(part)
                    if not count:
                        raise OSError("it ended early")
                    part = part[count:]

        try:
            list(self._pool.map(fill, range(0, len(values), _PIECE_BYTES)))
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read ({error})") from None
        return place.tensor(values)


def _opened(path: Path, pool: Executor) -> _TensorFile | FlaxFile:
    return FlaxFile(path) if path.suffix == ".msgpack" else _TensorFile(path, pool)


class TensorReader:
    """The tensors of a folder by name: shapes at once, values on request.

    Use through `open_tensors`, which closes the files.
    """

    def __init__(self, files: list[Path], stack: ExitStack) -> None:
        self._owner: dict[str, _TensorFile | FlaxFile] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        pool = stack.enter_context(ThreadPoolExecutor(_READERS))
        for path in files:
            self._add(_opened(path, pool))

    def _add(self, file: _TensorFile | FlaxFile) -> None:
        for name, place in file.places.items():
            if name in self._owner:
                raise CheckpointError(f"{file.path}: tensor {name} is also in {self._owner[name].path.name}")
            self._owner[name] = file
            self.shapes[name], self.dtypes[name] = place.shape, place.dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored."""
        return self._owner[name].read(name)

    def dtype(self, name: str) -> np.dtype:
        """What `read` gives."""
        return DTYPES[self.dtypes[name]]

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
        files, index = _find_weights(folder)
        reader = TensorReader(files, stack)
        # What Flax's index names, it names in Flax's way.
        if index is not None and index.name != FLAX_INDEX:
            _check_index(index, reader)
        yield reader


def _check_index(index: Path, reader: TensorReader) -> None:
    weight_map: Mapping[str, str] = read_json(index)["weight_map"]
    for name, file in weight_map.items():
        if name not in reader.shapes:
            raise CheckpointError(f"{index}: tensor {name} is not in {file}; the index is not of these files")
        if reader.file_of(name).name != file:
            raise CheckpointError(
                f"{index}: tensor {name} is not in {file} but in {reader.file_of(name).name}"
            )
    unlisted = sorted(set(reader.shapes) - set(weight_map))
    if unlisted:
        raise CheckpointError(f"{index}: does not list {unlisted[0]}; the index is not of these files")


class JoinedTensors:
    """Several sources of tensors as one, some under other names.

    Args:
        parts: (source, its names as they are called here, to what they are called there).
    """

    def __init__(self, *parts: tuple[Any, Mapping[str, str]]) -> None:
        self._owner = {name: (source, inner) for source, names in parts for name, inner in names.items()}
        self.shapes = {name: source.shapes[inner] for name, (source, inner) in self._owner.items()}
        self.dtypes = {name: source.dtypes[inner] for name, (source, inner) in self._owner.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        source, inner = self._owner[name]
        return source.read(inner)

    def dtype(self, name: str) -> np.dtype:
        """What `read` gives."""
        return DTYPES[self.dtypes[name]]

    def file_of(self, name: str) -> Path:
        """The file that it is in."""
        source, inner = self._owner[name]
        return source.file_of(inner)
