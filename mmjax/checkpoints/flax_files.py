"""Tensors of flax_model.msgpack, as transformers' Flax classes wrote them until version 5 dropped them.

Names and layouts there are Flax's; they are given here as the same model's folder has them for torch, so that
one table of names serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

from mmjax.checkpoints.places import DTYPES, Place
from mmjax.errors import CheckpointError

_NAMES: Mapping[np.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
# Flax's kernels have their outputs last: of one, two and three axes more than a vector's.
_KERNELS: Mapping[int, tuple[int, ...]] = MappingProxyType({2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)})
_WEIGHTS = ("kernel", "scale", "embedding")


class FlaxFile:
    """One file, read whole: its tensors are in memory for as long as it is open.

    Args:
        path: the file.

    Attributes:
        path: the file.
        places: dtype and shape of each tensor, by torch's name.

    Raises:
        CheckpointError: it is no such file, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            tree = msgpack_restore(path.read_bytes())
            self._tensors = dict(_as_torch(key, leaf) for key, leaf in flatten_dict(tree).items())
            self.places = {
                name: Place(_NAMES[leaf.dtype], leaf.shape, 0) for name, leaf in self._tensors.items()
            }
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except Exception as error:  # what is no such file can raise nearly anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(f"{path}: not read as Flax parameters ({reason})") from None

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._tensors[name]


def _as_torch(key: tuple[str, ...], leaf: Any) -> tuple[str, np.ndarray]:
    """A parameter under the name, and with the order of axes, that torch's module has for it.

    >>> name, weight = _as_torch(("head", "kernel"), np.zeros((3, 5)))
    >>> name, weight.shape
    ('head.weight', (5, 3))
    """
    value = np.asarray(leaf)
    *path, last = (str(part) for part in key)
    if last == "kernel":
        if value.ndim not in _KERNELS:
            raise ValueError(f"a kernel of {value.ndim} axes: {'/'.join(path)}")
        value = value.transpose(_KERNELS[value.ndim])
    return ".".join([*path, "weight" if last in _WEIGHTS else last]), value


__all__ = ["FlaxFile"]
