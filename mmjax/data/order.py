"""The order of samples, as a pure function of (seed, epoch, place).

Nothing is stored and nothing is drawn in sequence, so a pipeline resumes at any sample by knowing its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import grain
import numpy as np


def hash_bits(*key: int | str) -> int:
    """A well-mixed 64-bit number for a key.

    Args:
        *key: integers and words.

    Returns:
        An integer in [0, 2**64), the same on every machine and in every version.

    >>> hash_bits("order", 0, 1) == hash_bits("order", 0, 1), hash_bits(1, 2) == hash_bits(2, 1)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def uniforms(count: int, *key: int | str) -> list[float]:
    """Uniform numbers for a key.

    Args:
        count: how many, at most 8.
        *key: integers and words.

    Returns:
        `count` floats in [0, 1).

    >>> len(uniforms(3, 0, "crop", 5))
    3
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * count).digest()
    words = np.frombuffer(digest, "<u8") >> np.uint64(11)
    return (words.astype(np.float64) / float(1 << 53)).tolist()


def permuted(place: int, count: int, *key: int | str) -> int:
    """Where a permutation of `count` things, chosen by a key, sends one place.

    Args:
        place: in [0, count).
        count: at least 1, below 2**32.
        *key: integers and words that choose the permutation.

    Returns:
        An integer in [0, count); different places give different ones.

    >>> sorted(permuted(i, 5, "epoch", 3) for i in range(5))
    [0, 1, 2, 3, 4]
    """
    seed = hash_bits(*key) & 0xFFFFFFFF
    return int(grain.experimental.index_shuffle(place, max_index=count - 1, seed=seed, rounds=4))


@dataclass(frozen=True)
class _Epoch:
    """One epoch's permutation of shards: where shards and windows end, in places."""

    shards: np.ndarray
    ends: np.ndarray
    window_ends: np.ndarray


@dataclass(frozen=True)
class Order:
    """A window shuffle: each epoch permutes the shards, and the samples within windows of consecutive shards.

    Every epoch visits every sample exactly once. Reading stays local: while one window is visited only its
    shards are read. With one shard, or a window of at least all shards, it is a full shuffle.

    Args:
        sizes: number of samples per shard; sample numbers run through the shards in this order.
        window: shards per window, at least 1.
        seed: any integer.
    """

    sizes: tuple[int, ...]
    window: int
    seed: int
    _starts: np.ndarray = field(init=False, repr=False, compare=False)
    _cache: dict[int, _Epoch] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        object.__setattr__(self, "_starts", starts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, epoch: int, place: int) -> int:
        """The sample at one place of one epoch.

        Args:
            epoch: 0 or more.
            place: in [0, number of samples).

        Returns:
            A sample number in [0, number of samples).

        >>> order = Order(sizes=(3, 2, 4), window=2, seed=0)
        >>> sorted(order.sample(7, place) for place in range(9))
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
        """
        layout = self._layout(epoch)
        window = int(np.searchsorted(layout.window_ends, place, side="right"))
        start = int(layout.window_ends[window - 1]) if window else 0
        count = int(layout.window_ends[window]) - start
        place = start + permuted(place - start, count, self.seed, "window", epoch, window)
        slot = int(np.searchsorted(layout.ends, place, side="right"))
        shard = int(layout.shards[slot])
        return int(self._starts[shard]) + place - (int(layout.ends[slot]) - self.sizes[shard])

    def _layout(self, epoch: int) -> _Epoch:
        known = self._cache.get(epoch)
        if known is not None:
            return known
        layout = _epoch_layout(self.sizes, self.window, self.seed, epoch)
        if len(self._cache) >= 4:
            self._cache.clear()
        self._cache[epoch] = layout
        return layout


def _epoch_layout(sizes: Sequence[int], window: int, seed: int, epoch: int) -> _Epoch:
    count = len(sizes)
    shards = np.array([permuted(i, count, seed, "shards", epoch) for i in range(count)], np.int64)
    ends = np.cumsum(np.asarray(sizes, np.int64)[shards])
    last = np.minimum(np.arange(window, count + window, window), count) - 1
    return _Epoch(shards, ends, ends[last])
