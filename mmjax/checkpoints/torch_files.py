"""What is in a file that torch.save wrote, and where, without running anything that is in it.

Such a file is a zip archive: a pickle that describes tensors, and their bytes beside it as they are. The
pickle is read with a table of the few names that describe tensors; any other name is refused.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from mmjax.checkpoints.places import DTYPES, Place
from mmjax.errors import CheckpointError

# torch's names of what numbers are stored as, to those of safetensors.
_STORAGES: Mapping[str, str] = MappingProxyType(
    {
        "DoubleStorage": "F64",
        "FloatStorage": "F32",
        "HalfStorage": "F16",
        "BFloat16Storage": "BF16",
        "LongStorage": "I64",
        "IntStorage": "I32",
        "ShortStorage": "I16",
        "CharStorage": "I8",
        "ByteStorage": "U8",
        "BoolStorage": "BOOL",
    }
)
_MOST_PICKLE = 1 << 26
# A zip's own header before each member: its length, and where it says how long the two names in it are.
_HEADER, _LENGTHS = 30, 26


class _Storage(NamedTuple):
    """Numbers in a row in the file."""

    dtype: str
    begin: int
    values: int


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any) -> Place:
    """What torch._utils._rebuild_tensor_v2 makes of a storage, if it lies inside of it."""
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor of size {size} and stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.values:
        raise pickle.UnpicklingError(f"a tensor of size {size} beyond its {storage.values} values")
    width = DTYPES[storage.dtype].itemsize
    steps = tuple(step * width for step in stride)
    return Place(storage.dtype, size, storage.begin + offset * width, steps)


class _Reader(pickle.Unpickler):
    """Reads tensors, and the lists and dicts around them."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, file: BinaryIO, root: str) -> None:
        super().__init__(io.BytesIO(data))
        self.archive, self.file, self.root = archive, file, root

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

    def persistent_load(self, entry: Any) -> _Storage:
        kind, storage, key, _, count = entry
        if kind != "storage" or storage not in _STORAGES:
            raise pickle.UnpicklingError(f"a storage of kind {storage!r}")
        member = self.archive.getinfo(f"{self.root}/data/{key}")
        dtype = _STORAGES[storage]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise pickle.UnpicklingError(f"storage {key} is compressed or encrypted")
        if member.file_size != count * DTYPES[dtype].itemsize:
            raise pickle.UnpicklingError(
                f"storage {key} has {member.file_size} bytes and claims {count} values"
            )
        self.file.seek(member.header_offset + _LENGTHS)
        begin = member.header_offset + _HEADER + sum(struct.unpack("<HH", self.file.read(4)))
        if begin + member.file_size > self.archive.start_dir:
            raise pickle.UnpicklingError(f"storage {key} ends behind the last")
        return _Storage(dtype, begin, count)


def torch_places(path: Path) -> dict[str, Place]:
    """Where the tensors of a file are, by name.

    Args:
        path: a file of torch.save, 1.6 or later, that holds one dict of tensors.

    Raises:
        CheckpointError: it is something else, damaged, or holds anything but tensors.
    """
    advice = "nothing in it was run; write it as safetensors"
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE:
                raise CheckpointError(f"{path}: not a file of torch.save; {advice}")
            root = pickles[0].filename.removesuffix("/data.pkl")
            order = f"{root}/byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise CheckpointError(f"{path}: its numbers are not little-endian; {advice}")
            found = _Reader(archive.read(pickles[0]), archive, file, root).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: not read as tensors ({reason}); {advice}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Place) for value in found.values()):
        raise CheckpointError(f"{path}: not one dict of tensors; {advice}")
    return {str(name): place for name, place in found.items()}


__all__ = ["torch_places"]
