"""Token sequences laid into rows of one length, and batches of such rows."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmjax.data.faults import FaultTally
from mmjax.data.order import permuted
from mmjax.data.pipeline import Batch, BatchIterator, check_processes

IGNORED = -100
_LOOKED_AT = 64
Piece = tuple[int, int, int]  # document, first token, one past the last


def cut_into_rows(lengths: Sequence[int], row_length: int) -> list[list[Piece]]:
    """Documents one after another, cut wherever a row is full: every row but the last is full.

    Args:
        lengths: tokens of each document.
        row_length: tokens of a row.

    Returns:
        The pieces of each row, every token once.

    >>> cut_into_rows([3, 4], 5)
    [[(0, 0, 3), (1, 0, 2)], [(1, 2, 4)]]
    """
    rows: list[list[Piece]] = []
    room = 0
    for document, length in enumerate(lengths):
        begin = 0
        while begin < length:
            if not room:
                rows.append([])
                room = row_length
            end = min(length, begin + room)
            rows[-1].append((document, begin, end))
            room -= end - begin
            begin = end
    return rows


def fit_into_rows(
    lengths: Sequence[int],
    row_length: int,
    images: Sequence[int] | None = None,
    most_images: int = 0,
) -> list[list[Piece]]:
    """Whole documents side by side, the longest first, each into the fullest row that has room for it.

    Args:
        lengths: tokens of each document; of one that is longer than a row only the beginning is kept.
        row_length: tokens of a row.
        images: of each document, where rows have room for so many only; None: there are none.
        most_images: of a row; a document with more has a row of its own.

    >>> fit_into_rows([3, 4, 2, 9], 5)
    [[(3, 0, 5)], [(1, 0, 4)], [(0, 0, 3), (2, 0, 2)]]
    >>> fit_into_rows([3, 2, 1], 5, [1, 1, 0], 1)
    [[(0, 0, 3), (2, 0, 1)], [(1, 0, 2)]]
    """
    rows: list[list[Piece]] = []
    spare: list[int] = []
    free: list[tuple[int, int]] = []  # room and row, sorted
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        length = min(lengths[document], row_length)
        if not length:
            continue
        own = 0 if images is None else images[document]
        place = bisect.bisect_left(free, (length, -1))
        # Where many rows have no image to spare, a new one costs less than looking on.
        found = (n for n in range(place, min(place + _LOOKED_AT, len(free))) if spare[free[n][1]] >= own)
        place = next(found, len(free))
        if place < len(free):
            room, row = free.pop(place)
        else:
            room, row = row_length, len(rows)
            rows.append([])
            spare.append(most_images)
        rows[row].append((document, 0, length))
        spare[row] -= own
        if room > length:
            bisect.insort(free, (room - length, row))
    return rows


def example_row(row_length: int) -> Batch:
    """The arrays of a batch of one packed row, all zero.

    >>> sorted(example_row(3))
    ['attention_mask', 'input_ids', 'labels', 'position_ids', 'segment_ids']
    """
    names = ("input_ids", "attention_mask", "segment_ids", "position_ids", "labels")
    return {name: np.zeros((1, row_length), np.int32) for name in names}


@dataclass(frozen=True, kw_only=True)
class PackedBatches:
    """An endless sequence of batches of packed rows, in an order of its own for every epoch.

    As with `mmjax.data.Batches`, batch b holds rows b * batch_size ... of the endless sequence of epochs, of
    n processes the k-th makes the k-th part of every batch, and a state holds for any number of processes.

    Args:
        documents: int32 [tokens] each.
        learned: bool [tokens] each, which tokens are learned; None: all.
        rows: the pieces of each row.
        row_length: T.
        pad_id: fills what is left of a row.
        batch_size, process_index, process_count: see `mmjax.data.Batches`.
        seed: chooses the order.
        tally: what was broken in the data.
        max_fault_share: the share of it that was accepted.
        identity: what a saved state must agree on.
    """

    documents: Sequence[np.ndarray]
    learned: Sequence[np.ndarray] | None
    rows: Sequence[Sequence[Piece]]
    row_length: int
    pad_id: int
    batch_size: int
    process_index: int
    process_count: int
    seed: int
    tally: FaultTally
    max_fault_share: float
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_processes(self.batch_size, self.process_index, self.process_count)

    @property
    def samples(self) -> int:
        """Rows per epoch."""
        return len(self.rows)

    @property
    def steps_per_epoch(self) -> float:
        """Batches per epoch."""
        return self.samples / self.batch_size

    @property
    def local_batch_size(self) -> int:
        """Rows per batch in this process."""
        return self.batch_size // self.process_count

    def __iter__(self) -> PackedIterator:
        return PackedIterator(self)

    def batch(self, number: int) -> Batch:
        """One batch: a function of its number alone.

        Returns:
            int32 [B, T] each: `input_ids`; `attention_mask`, 0 where a row is filled up; `segment_ids`, from
            1 in every row, 0 where it is filled up; `position_ids`, from 0 in every segment; `labels`, the
            input ids with -100 where nothing is to be learned, as at the first token of a segment. And
            `ids` int64 [B], the rows' numbers.
        """
        first = number * self.batch_size + self.process_index * self.local_batch_size
        places = (divmod(first + k, self.samples) for k in range(self.local_batch_size))
        ids = [permuted(place, self.samples, self.seed, "rows", epoch) for epoch, place in places]
        shape = (self.local_batch_size, self.row_length)
        batch = {
            name: np.zeros(shape, np.int32) for name in ("attention_mask", "segment_ids", "position_ids")
        }
        batch |= {
            "input_ids": np.full(shape, self.pad_id, np.int32),
            "labels": np.full(shape, IGNORED, np.int32),
        }
        for k, row in enumerate(ids):
            place = 0
            for segment, (document, begin, end) in enumerate(self.rows[row], start=1):
                here = np.s_[k, place : place + end - begin]
                tokens = self.documents[document][begin:end]
                batch["input_ids"][here] = tokens
                batch["attention_mask"][here] = 1
                batch["segment_ids"][here] = segment
                batch["position_ids"][here] = np.arange(end - begin)
                learned = True if self.learned is None else self.learned[document][begin:end]
                batch["labels"][here] = np.where(learned, tokens, IGNORED)
                batch["labels"][k, place] = IGNORED
                place += end - begin
        return {**batch, "ids": np.array(ids, np.int64)}


class PackedIterator(BatchIterator):
    """Iterates over `PackedBatches`; places and states are those of `mmjax.data.BatchIterator`."""

    def __init__(self, dataset: PackedBatches) -> None:
        super().__init__(dataset)  # type: ignore[arg-type]
        self.packed = dataset
        tally = dataset.tally
        self.tally = replace(tally, counts=dict(tally.counts), examples=list(tally.examples))

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return self

    def __next__(self) -> Batch:
        batch = self.packed.batch(self._next_batch)
        self._next_batch += 1
        return batch
