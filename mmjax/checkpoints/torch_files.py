"""What is in a file that torch.save wrote, and where, without running anything that is in it.

Such a file is a zip archive: a pickle that describes tensors, and their bytes beside it as they are. Of
pickle's steps those are taken that put together dicts, tuples and tensors; nothing is looked up by its name.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

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
_MOST_PICKLE, _MOST_AXES, _MOST_BYTES = 1 << 24, 32, 1 << 62
# A zip's own header before each member: its length, and where it says how long the two names in it are.
_HEADER, _LENGTHS = 30, 26
_ORDER = 16  # more than any name of an order of bytes


class _Storage(NamedTuple):
    """Numbers in a row in the file."""

    dtype: str
    begin: int
    values: int


class _Name(NamedTuple):
    """What a pickle calls by its name: here never more than that."""

    module: str
    name: str


class _RefusedError(Exception):
    """What is no description of tensors."""


_DICT = _Name("collections", "OrderedDict")
_TENSOR = _Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Name("torch._utils", "_rebuild_parameter")
_CONSTANTS: Mapping[str, Any] = MappingProxyType({"NONE": None, "NEWTRUE": True, "NEWFALSE": False})
_VALUES = frozenset(
    ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
)
_TUPLES: Mapping[str, int] = MappingProxyType({"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3})


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Place:
    """What torch._utils._rebuild_tensor_v2 makes of a storage, if it lies inside of it."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise _RefusedError("a tensor of no storage, size and stride")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > _MOST_AXES or not all(type(n) is int for n in numbers):
        raise _RefusedError("a tensor whose size and stride are no whole numbers for each axis")
    if min(numbers) < 0 or math.prod(max(n, 1) for n in size) >= _MOST_BYTES:
        raise _RefusedError(f"a tensor of size {size} and stride {stride}")
    # Behind whether it has a gradient, and hooks: whether its numbers are to be negated or conjugated.
    if any(rest[2:]):
        raise _RefusedError("a tensor that stands for other numbers than its own")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.values:
        raise _RefusedError(f"a tensor of size {size} beyond its {storage.values} values")
    width = DTYPES[storage.dtype].itemsize
    steps = tuple(step * width for step in stride)
    return Place(storage.dtype, size, storage.begin + offset * width, steps)


class _Machine:
    """Takes a pickle's steps as far as they put together dicts, tuples and tensors.

    Args:
        storage: what the pickle says of a storage, to where it is.
    """

    def __init__(self, storage: Callable[[Any], _Storage]) -> None:
        self._storage = storage
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """What the pickle describes: names, numbers, dicts, tuples, and `Place`s of tensors."""
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name in _VALUES:
                self._stack.append(arg)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _TUPLES:
                self._stack.append(self._last(_TUPLES[opcode.name]))
            else:
                step = getattr(self, f"_{opcode.name.lower()}", None)
                if step is None:
                    raise _RefusedError(f"the step {opcode.name}, which no tensor needs")
                step(arg)
        return self._stack.pop()

    def _last(self, count: int) -> tuple[Any, ...]:
        if count > len(self._stack):
            raise _RefusedError("more than there is")
        found = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return tuple(found)

    def _since_mark(self) -> tuple[Any, ...]:
        return self._last(len(self._stack) - self._marks.pop())

    def _proto(self, arg: Any) -> None:
        """The version and the lengths of parts say nothing about what is in them."""

    _frame = _stop = _proto

    def _mark(self, arg: Any) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, arg: Any) -> None:
        self._stack.append(self._since_mark())

    def _empty_dict(self, arg: Any) -> None:
        self._stack.append({})

    def _binput(self, arg: Any) -> None:
        self._memo[arg] = self._stack[-1]

    _long_binput = _binput

    def _memoize(self, arg: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _binget(self, arg: Any) -> None:
        self._stack.append(self._memo[arg])

    _long_binget = _binget

    def _global(self, arg: Any) -> None:
        self._stack.append(_known(*arg.split(" ", 1)))

    def _stack_global(self, arg: Any) -> None:
        self._stack.append(_known(*self._last(2)))

    def _binpersid(self, arg: Any) -> None:
        self._stack.append(self._storage(self._stack.pop()))

    def _reduce(self, arg: Any) -> None:
        name, arguments = self._last(2)
        if not isinstance(arguments, tuple):
            raise _RefusedError("a call without arguments")
        if name == _TENSOR:
            self._stack.append(_tensor(*arguments))
        elif name == _PARAMETER and arguments:
            self._stack.append(arguments[0])
        elif name == _DICT and not arguments:
            self._stack.append({})
        else:
            raise _RefusedError("a call of what is no tensor")

    def _build(self, arg: Any) -> None:
        """Attributes, such as a state dict's versions, change no tensor."""
        self._stack.pop()

    def _setitem(self, arg: Any) -> None:
        self._fill(self._last(2))

    def _setitems(self, arg: Any) -> None:
        self._fill(self._since_mark())

    def _fill(self, items: tuple[Any, ...]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or not all(type(key) is str for key in items[::2]):
            raise _RefusedError("something other than values by name")
        target.update(zip(items[::2], items[1::2], strict=True))


def _known(module: Any, name: Any) -> _Name:
    found = _Name(module, name)
    if found in (_DICT, _TENSOR, _PARAMETER) or (module == "torch" and name in _STORAGES):
        return found
    raise _RefusedError(f"it names {str(module)[:60]}.{str(name)[:60]}, which is no tensor's")


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
            found = _described(archive, file)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: not read as tensors (damaged, or no zip archive, as torch writes since 1.6); {advice}"
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{path}: not read as tensors ({reason}); {advice}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Place) for value in found.values()):
        held = "".join(f" {name[:60]!r}" for name in list(found)[:3]) if isinstance(found, dict) else ""
        raise CheckpointError(f"{path}: not one dict of tensors{held and f' (it has{held})'}; {advice}")
    return found


def _described(archive: zipfile.ZipFile, file: Any) -> Any:
    """What the archive's pickle describes."""
    pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE:
        raise _RefusedError("not a file of torch.save")
    root = pickles[0].filename.removesuffix("/data.pkl")
    order = next((info for info in archive.infolist() if info.filename == f"{root}/byteorder"), None)
    if order is not None and (order.file_size > _ORDER or archive.read(order) != b"little"):
        raise _RefusedError("its numbers are not little-endian")

    def storage(entry: Any) -> _Storage:
        kind, name, key, _, count = entry
        if kind != "storage" or not isinstance(name, _Name) or name.name not in _STORAGES:
            raise _RefusedError("a storage of a kind that is not known")
        if type(key) is not str or type(count) is not int:
            raise _RefusedError("a storage without a name or a number of values")
        member, dtype = archive.getinfo(f"{root}/data/{key}"), _STORAGES[name.name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _RefusedError(f"storage {key} is compressed or encrypted")
        if member.file_size != count * DTYPES[dtype].itemsize:
            raise _RefusedError(f"storage {key} has {member.file_size} bytes and claims {count} values")
        file.seek(member.header_offset + _LENGTHS)
        begin = member.header_offset + _HEADER + sum(struct.unpack("<HH", file.read(4)))
        if begin + member.file_size > archive.start_dir:
            raise _RefusedError(f"storage {key} ends behind the last")
        return _Storage(dtype, begin, count)

    return _Machine(storage).run(archive.read(pickles[0]))


__all__ = ["torch_places"]
