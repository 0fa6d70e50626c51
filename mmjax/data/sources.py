"""What every source of samples looks like: random access to raw, still encoded records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict


class Record(TypedDict):
    """One raw sample: an image (encoded bytes, Pillow or array), captions, a class if any, and a name."""

    image: Any
    texts: tuple[str, ...]
    label: int | None
    name: str


class Source(Protocol):
    """Random access to the raw samples of one source.

    `source[i]` returns a `Record`, or raises `BadSample` (or OSError) when that sample cannot be had; reading
    is safe from several threads. `shard_sizes` are the numbers of samples that lie together, in order;
    `window` is the number of shards among which samples are shuffled; `identity` changes when the samples
    change.
    """

    @property
    def has_text(self) -> bool: ...

    @property
    def has_labels(self) -> bool: ...

    @property
    def shard_sizes(self) -> tuple[int, ...]: ...

    @property
    def window(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclass(frozen=True)
class ListSource:
    """Records held in memory.

    Args:
        records: the samples.
        identity: what tells these records from others, e.g. a digest.
        has_text: whether records have captions.
        has_labels: whether records have classes.
    """

    records: Sequence[Record]
    identity: str
    has_text: bool = True
    has_labels: bool = True
    window: int = 1

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """All records are one shard."""
        return (len(self.records),)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def digest(*parts: object) -> str:
    """A short digest of some values, used to notice that data changed.

    Args:
        *parts: values with a stable `repr`.

    Returns:
        16 hexadecimal digits.

    >>> digest("a", 1) == digest("a", 1), digest("a", 1) == digest("a", 2)
    (True, False)
    """
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(repr(part).encode("utf-8", "surrogatepass"))
        state.update(b"\0")
    return state.hexdigest()


def as_path(value: str | Path) -> Path:
    """A path given by the user, with `~` expanded.

    >>> as_path("a/b").name
    'b'
    """
    return Path(value).expanduser()
