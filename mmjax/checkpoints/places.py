"""Where tensors are in files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import ml_dtypes
import numpy as np

#: safetensors' names of dtypes.
DTYPES: Mapping[str, np.dtype] = MappingProxyType(
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
# What XLA asks of an array's first byte on CPU.
_ALIGNMENT = 64


class Place(NamedTuple):
    """A tensor in a file.

    Attributes:
        dtype: safetensors' name of it.
        shape: of the tensor.
        begin: of its first number in the file, in bytes.
        strides: from one index of each axis to the next, in bytes; None: row after row.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    strides: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Bytes in the file from the first to the last number.

        >>> Place("F32", (2, 3), 0).size, Place("F32", (2, 3), 0, (4, 16)).size
        (24, 40)
        """
        width = DTYPES[self.dtype].itemsize
        if self.strides is None or not math.prod(self.shape):
            return math.prod(self.shape) * width
        return width + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))

    def tensor(self, data: np.ndarray) -> np.ndarray:
        """The tensor, of its bytes in the file; it shares their memory.

        Args:
            data: uint8 [size].
        """
        values = data.view(DTYPES[self.dtype])
        if self.strides is None or not math.prod(self.shape):
            return values.reshape(self.shape)
        return np.lib.stride_tricks.as_strided(values, self.shape, self.strides)


def aligned(size: int) -> np.ndarray:
    """So many bytes, which begin where jax wants arrays to begin: else it copies them."""
    room = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT
    return room[begin : begin + size]


__all__ = ["DTYPES", "Place", "aligned"]
