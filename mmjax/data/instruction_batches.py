"""Batches of conversations with images: packed into rows, or grouped by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grain
import numpy as np

from mmjax.data.faults import BadSample, FaultTally, cause_of
from mmjax.data.instruction_layout import RowShape, Turns, fill_row, grouped_order
from mmjax.data.order import hash_bits, permuted
from mmjax.data.pipeline import Batch, BatchIterator, check_processes, read_ahead

_REPLACEMENTS_TRIED = 100
_WINDOW = 50  # batches whose conversations are sorted by length among each other
_LENGTHS = 16  # most lengths that grouped batches have


@dataclass(frozen=True, eq=False)
class PackedOrder:
    """Rows of several conversations each, the same in every epoch, in an order of its own.

    Args:
        rows: the conversations of each row.
        length: T.
        tiles: M.
        seed: chooses the order.
    """

    rows: Sequence[Sequence[int]]
    length: int
    tiles: int
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, position: int) -> tuple[int, Sequence[int]]:
        """The row at a position of the endless sequence of epochs: its number and its conversations."""
        epoch, place = divmod(position, len(self.rows))
        row = permuted(place, len(self.rows), self.seed, "rows", epoch)
        return row, self.rows[row]

    def shape(self, first: int, count: int) -> tuple[int, int]:
        """Tokens and tiles of the rows of a batch."""
        return self.length, self.tiles


@dataclass(frozen=True, eq=False)
class GroupedOrder:
    """Rows of one conversation each; those of a batch are about equally long.

    Args:
        lengths, tiles: of the conversations, int [samples].
        length: longest row.
        batch_size: rows of a batch.
        seed: chooses the order.
    """

    lengths: np.ndarray
    tiles: np.ndarray
    length: int
    batch_size: int
    seed: int
    _epochs: dict[int, np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, position: int) -> tuple[int, Sequence[int]]:
        """As in `PackedOrder`."""
        epoch, place = divmod(position, len(self))
        number = int(self._epoch(epoch)[place])
        return number, (number,)

    def shape(self, first: int, count: int) -> tuple[int, int]:
        """Tokens and tiles of the rows of a batch: few different numbers, each enough for all its rows."""
        numbers = np.zeros(0, np.int64)
        while len(numbers) < count:  # a batch may reach into the next epoch, and a small epoch into many
            epoch, place = divmod(first + len(numbers), len(self))
            numbers = np.append(numbers, self._epoch(epoch)[place : place + count - len(numbers)])
        step = max(8, -(-self.length // _LENGTHS))
        longest, most = int(self.lengths[numbers].max()), int(self.tiles[numbers].max())
        return min(-(-longest // step) * step, self.length), 1 << (most - 1).bit_length() if most else 0

    def _epoch(self, epoch: int) -> np.ndarray:
        found = self._epochs.get(epoch)
        if found is None:
            count = len(self)
            order = np.array([permuted(place, count, self.seed, "samples", epoch) for place in range(count)])
            found = grouped_order(
                order,
                self.lengths,
                self.tiles,
                self.batch_size,
                _WINDOW,
                lambda place, batches, window: permuted(place, batches, self.seed, "batches", epoch, window),
            )
            if len(self._epochs) >= 2:
                self._epochs.clear()
            self._epochs[epoch] = found
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class InstructionBatches:
    """An endless sequence of batches of conversations with images.

    Batches are numbered, shared among processes and gone back to as those of `mmjax.data.Batches`. A
    conversation whose images turn out to be broken is replaced by another that fits into its place.

    Args:
        read: gives a conversation by its number, or raises BadSample.
        lengths, tiles: of the conversations, int [samples].
        order: which conversations make which row, and how large rows are.
        shape: what all rows have in common but their length and number of tiles.
        batch_size, process_index, process_count, num_threads, prefetch_batches, max_fault_share, identity:
            see `mmjax.data.Batches`.
        seed: chooses replacements.
        tally: what was found broken before.
    """

    read: Callable[[int], Turns]
    lengths: np.ndarray
    tiles: np.ndarray
    order: PackedOrder | GroupedOrder
    shape: RowShape
    batch_size: int
    process_index: int
    process_count: int
    num_threads: int
    prefetch_batches: int
    max_fault_share: float
    seed: int
    tally: FaultTally
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_processes(self.batch_size, self.process_index, self.process_count)

    @property
    def samples(self) -> int:
        """Rows per epoch."""
        return len(self.order)

    @property
    def steps_per_epoch(self) -> float:
        """Batches per epoch."""
        return self.samples / self.batch_size

    @property
    def local_batch_size(self) -> int:
        """Rows per batch in this process."""
        return self.batch_size // self.process_count

    def __iter__(self) -> InstructionIterator:
        return InstructionIterator(self)

    def row(self, number: int, place: int) -> tuple[Batch, list[tuple[str, str]]]:
        """One row of a batch, and the (cause, name) of what was replaced in it.

        Args:
            number: of the batch.
            place: of the row in the whole batch.

        Returns:
            What `fill_row` gives, and `ids`, the number of the row (packed) or of the conversation.
        """
        first = number * self.batch_size
        length, tiles = self.order.shape(first, self.batch_size)
        row, wanted = self.order.at(first + place)
        pieces, broken = [], []
        for sample in wanted:
            piece, faults = self._piece(sample, first + place)
            broken += faults
            if piece is not None:
                pieces.append(piece)
        filled = fill_row(pieces, replace(self.shape, length=length, tiles=tiles))
        return {**filled, "ids": np.array(row, np.int64)}, broken

    def batch(self, number: int) -> Batch:
        """One batch: a function of its number alone.

        Returns:
            The rows of this process, one above the other; see `fill_row`.
        """
        first = self.process_index * self.local_batch_size
        places = range(first, first + self.local_batch_size)
        return _stacked([self.row(number, place) for place in places])[0]

    def pipeline(self, first_batch: int) -> grain.IterDataset:
        """The grain pipeline of this process's rows, from one batch on, as `Batches.pipeline`."""
        local = self.local_batch_size

        def load(number: int) -> tuple[Batch, list[tuple[str, str]]]:
            batch, place = divmod(number, local)
            return self.row(batch, self.process_index * local + place)

        return read_ahead(self, load, _stacked, first_batch)

    def _piece(self, sample: int, position: int) -> tuple[Turns | None, list[tuple[str, str]]]:
        """A conversation, or another in its place that is no longer and has no more tiles."""
        broken: list[tuple[str, str]] = []
        length, tiles = self.lengths[sample], self.tiles[sample]
        number = sample
        for attempt in range(_REPLACEMENTS_TRIED + 1):
            if attempt:
                number = hash_bits(self.seed, "replace", position, sample, attempt) % len(self.lengths)
                if self.lengths[number] > length or self.tiles[number] > tiles:
                    continue
            try:
                piece = self.read(number)
                if piece.tiles is not None and len(piece.tiles) > tiles:
                    raise BadSample("bad_record", f"conversation {number}", "its images have changed")
                return piece.cut(int(length)), broken
            except (BadSample, OSError) as error:
                if not broken:
                    broken.append((cause_of(error), str(getattr(error, "name", f"conversation {number}"))))
        return None, broken


def _stacked(rows: Sequence[tuple[Batch, list[tuple[str, str]]]]) -> tuple[Batch, list[tuple[str, str]]]:
    arrays = [row for row, _ in rows]
    batch = {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}
    return batch, [fault for _, broken in rows for fault in broken]


class InstructionIterator(BatchIterator):
    """Iterates over `InstructionBatches`; places and states are those of `mmjax.data.BatchIterator`."""

    def __init__(self, dataset: InstructionBatches) -> None:
        super().__init__(dataset)  # type: ignore[arg-type]
        tally = dataset.tally
        self.tally = replace(tally, counts=dict(tally.counts), examples=list(tally.examples))
