"""Tensors of a file that torch.save wrote, without running anything that is in it.

Such a file is a zip archive: a pickle that describes tensors, and their bytes beside it. The pickle is read
with a table of the few names that describe tensors; any other name is refused.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from mmjax.errors import CheckpointError

_STORAGES: Mapping[str, Any] = MappingProxyType(
    {
        "DoubleStorage": np.float64,
        "FloatStorage": np.float32,
        "HalfStorage": np.float16,
        "BFloat16Storage": ml_dtypes.bfloat16,
        "LongStorage": np.int64,
        "IntStorage": np.int32,
        "ShortStorage": np.int16,
        "CharStorage": np.int8,
        "ByteStorage": np.uint8,
        "BoolStorage": np.bool_,
    }
)
_MOST_PICKLE = 1 << 26


def _tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """What torch._utils._rebuild_tensor_v2 makes of a storage, if it lies inside of it."""
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor of size {size} and stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(storage):
        raise pickle.UnpicklingError(f"a tensor of size {size} beyond its {len(storage)} values")
    steps = tuple(step * storage.itemsize for step in stride)
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
    return np.array(view)


class _Reader(pickle.Unpickler):
    """Reads tensors, and the lists and dicts around them."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(data))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor's")

    def persistent_load(self, entry: Any) -> np.ndarray:
        kind, storage, key, _, count = entry
        if kind != "storage" or storage not in _STORAGES:
            raise pickle.UnpicklingError(f"a storage of kind {storage!r}")
        data = self.archive.read(f"{self.root}/data/{key}")
        values = np.frombuffer(data, np.dtype(_STORAGES[storage]))
        if len(values) != count:
            raise pickle.UnpicklingError(f"storage {key} has {len(values)} values and claims {count}")
        return values


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name.

    Args:
        path: a file of torch.save, 1.6 or later, that holds one dict of tensors.

    Raises:
        CheckpointError: it is something else, damaged, or holds anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE:
                raise CheckpointError(f"{path}: not a file of torch.save; write it as safetensors")
            root = pickles[0].filename.removesuffix("/data.pkl")
            found = _Reader(archive.read(pickles[0]), archive, root).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: not read as tensors ({reason}); write it as safetensors") from None
    if not isinstance(found, dict) or not all(isinstance(value, np.ndarray) for value in found.values()):
        raise CheckpointError(f"{path}: not one dict of tensors; write it as safetensors")
    return {str(name): value for name, value in found.items()}


class LoadedTensors:
    """Tensors in memory, read as those of a folder are (see `TensorReader`)."""

    def __init__(self, path: Path, tensors: Mapping[str, np.ndarray]) -> None:
        kinds = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        self._path, self._tensors = path, dict(tensors)
        self.shapes = {name: value.shape for name, value in self._tensors.items()}
        self.dtypes = {name: kinds.get(str(x.dtype), str(x.dtype)) for name, x in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._tensors[name]

    def file_of(self, name: str) -> Path:
        """The file that it is from."""
        return self._path


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

    def file_of(self, name: str) -> Path:
        """The file that it is in."""
        source, inner = self._owner[name]
        return source.file_of(inner)


__all__ = ["JoinedTensors", "LoadedTensors", "read_torch_file"]
