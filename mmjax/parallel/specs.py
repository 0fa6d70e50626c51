"""What a parameter is before it has a value: shape, dtype, and the logical names of its axes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

LogicalAxes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter's shape, dtype and logical axes (one name or None per dimension).

    >>> ParamSpec((768, 3072), "float32", ("embed", "mlp")).size
    2359296
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: LogicalAxes

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in this spec's dtype."""
        return self.size * np.dtype(self.dtype).itemsize
