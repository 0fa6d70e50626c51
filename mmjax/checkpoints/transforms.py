"""How one checkpoint tensor becomes parameters, and back. Each is its own exact inverse pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Transform(Protocol):
    """A bijection between one source tensor and one or more target arrays."""

    @property
    def parts(self) -> int:
        """How many targets one source fills."""

    def source_shape(self, targets: Sequence[Shape]) -> Shape:
        """The source's shape, from the targets' shapes."""

    def load(self, source: np.ndarray) -> list[np.ndarray]:
        """Source to targets; views where possible."""

    def save(self, targets: Sequence[np.ndarray]) -> np.ndarray:
        """Targets to source."""


@dataclasses.dataclass(frozen=True)
class Permute:
    """Target axis k is source axis axes[k].

    >>> Permute((1, 0)).source_shape([(3, 4)])
    (4, 3)
    """

    axes: tuple[int, ...]
    parts: int = 1

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(int(axis) for axis in np.argsort(self.axes))

    def source_shape(self, targets: Sequence[Shape]) -> Shape:
        return tuple(targets[0][axis] for axis in self.inverse)

    def load(self, source: np.ndarray) -> list[np.ndarray]:
        return [source.transpose(self.axes)]

    def save(self, targets: Sequence[np.ndarray]) -> np.ndarray:
        return targets[0].transpose(self.inverse)


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The source has `before` leading and `after` trailing axes of size 1 that the target lacks.

    >>> Reshape(before=2).source_shape([(7,)])
    (1, 1, 7)
    """

    before: int = 0
    after: int = 0
    parts: int = 1

    def source_shape(self, targets: Sequence[Shape]) -> Shape:
        return (1,) * self.before + targets[0] + (1,) * self.after

    def load(self, source: np.ndarray) -> list[np.ndarray]:
        return [source.reshape(source.shape[self.before : source.ndim - self.after])]

    def save(self, targets: Sequence[np.ndarray]) -> np.ndarray:
        return targets[0].reshape(self.source_shape([targets[0].shape]))


@dataclasses.dataclass(frozen=True)
class Chain:
    """`first`, then `second` on its result.

    >>> Chain(Reshape(after=2), LINEAR).source_shape([(4, 9)])
    (9, 4, 1, 1)
    """

    first: Permute | Reshape
    second: Permute | Reshape
    parts: int = 1

    def source_shape(self, targets: Sequence[Shape]) -> Shape:
        return self.first.source_shape([self.second.source_shape(targets)])

    def load(self, source: np.ndarray) -> list[np.ndarray]:
        return self.second.load(self.first.load(source)[0])

    def save(self, targets: Sequence[np.ndarray]) -> np.ndarray:
        return self.first.save([self.second.save(targets)])


@dataclasses.dataclass(frozen=True)
class Fused:
    """The source is `parts` equal pieces along its first axis, each read through `inner`.

    >>> Fused(3, LINEAR).source_shape([(4, 2)] * 3)
    (6, 4)
    """

    parts: int
    inner: Permute | Reshape = Reshape()

    def source_shape(self, targets: Sequence[Shape]) -> Shape:
        first, *rest = self.inner.source_shape(targets[:1])
        return (first * self.parts, *rest)

    def load(self, source: np.ndarray) -> list[np.ndarray]:
        return [self.inner.load(piece)[0] for piece in np.split(source, self.parts)]

    def save(self, targets: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([self.inner.save([target]) for target in targets])


SAME = Reshape()
# torch keeps a linear layer as [F, D] and a convolution as [D, C, h, w].
LINEAR = Permute((1, 0))
CONV = Permute((2, 3, 1, 0))
# A 1x1 convolution [F, D, 1, 1] is a linear layer.
POINTWISE = Chain(Reshape(after=2), LINEAR)
