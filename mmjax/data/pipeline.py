"""Batches from samplers: order over sources and processes, grain's threads, the iterator and its state."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from mmjax.data.faults import FaultTally, fault_counts
from mmjax.data.sampling import Sample, Sampler
from mmjax.errors import ConfigError, DataError

Batch = dict[str, np.ndarray]
_STATE_FORMAT = 1
_LONGEST_TEXT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Batches:
    """An endless sequence of training batches; each `iter` of it is independent.

    Batch number b holds positions b * batch_size ... (b + 1) * batch_size - 1 of the endless sequence of
    epochs, so nothing is dropped: an epoch may end inside a batch. Of n processes the k-th
    makes the k-th part of the rows of every batch: put together they are the batches of a single process.

    Args:
        samplers: one per source.
        weights: how often each source is drawn, None for one source.
        tokenizer: called with texts and `max_length`; None: no text in the batches.
        max_length: tokens per text.
        labels: whether batches have labels.
        batch_size: rows over all processes.
        process_index: which process this is.
        process_count: number of processes.
        num_threads: threads that read and decode; 0: none. The batches do not depend on it.
        prefetch_batches: batches read ahead when there are threads.
        max_fault_share: largest share of broken samples a run should accept; `BatchIterator.check_faults`
            uses it.
        identity: what a saved state must agree on: words and numbers by name.
    """

    samplers: tuple[Sampler, ...]
    weights: tuple[float, ...] | None
    tokenizer: Any
    max_length: int | None
    labels: bool
    batch_size: int
    process_index: int
    process_count: int
    num_threads: int
    prefetch_batches: int
    max_fault_share: float
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_processes(self.batch_size, self.process_index, self.process_count)

    @property
    def samples(self) -> int:
        """Samples per epoch, over all sources (for a mixture: the sum of their sizes)."""
        return sum(len(sampler.source) for sampler in self.samplers)

    @property
    def steps_per_epoch(self) -> float:
        """Batches per epoch; not a whole number where an epoch ends inside a batch."""
        return self.samples / self.batch_size

    @property
    def local_batch_size(self) -> int:
        """Rows per batch in this process."""
        return self.batch_size // self.process_count

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def positions(self) -> grain.MapDataset:
        """The endless sequence of samples as a grain MapDataset of (source, position in it) pairs."""
        endless = [
            grain.MapDataset.range(sys.maxsize).map(lambda position, number=number: (number, position))
            for number in range(len(self.samplers))
        ]
        return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, self.weights)

    def pipeline(self, first_batch: int) -> grain.IterDataset:
        """The grain pipeline of this process's rows, from one batch on.

        Args:
            first_batch: number of the first batch, 0 or more.

        Returns:
            An IterDataset whose elements are (batch, broken): arrays and the (cause, name) of what was
            replaced.
        """
        positions, local = self.positions(), self.local_batch_size

        def load(row: int) -> Sample:
            batch, place = divmod(row, local)
            number, position = positions[batch * self.batch_size + self.process_index * local + place]
            return self.samplers[number].at(position)

        return read_ahead(self, load, self._collate, first_batch)

    def assemble(self, samples: Sequence[Sample]) -> Batch:
        """One batch from its samples.

        Args:
            samples: B of them.

        Returns:
            pixel_values float32 [B, H, W, C]; with a tokenizer what it gives, int32 [B, T] each; labels int32
            [B] where the source has them; faults int32 [len(FAULTS)], broken samples replaced in this batch
            by cause; ids int64 [B], sample numbers.
        """
        batch = {"pixel_values": np.stack([sample.pixel_values for sample in samples])}
        if self.tokenizer is not None:
            batch |= tokenize(self.tokenizer, [sample.text or "" for sample in samples], self.max_length)
        if self.labels:
            batch["labels"] = np.array([sample.label for sample in samples], np.int32)
        batch["faults"] = fault_counts(sample.fault[0] for sample in samples if sample.fault)
        batch["ids"] = np.array([sample.id for sample in samples], np.int64)
        return batch

    def _collate(self, samples: Sequence[Sample]) -> tuple[Batch, list[tuple[str, str]]]:
        return self.assemble(samples), [sample.fault for sample in samples if sample.fault]


def read_ahead(
    batches: Any,
    load: Callable[[int], Any],
    collate: Callable[[Sequence[Any]], Any],
    first_batch: int,
) -> grain.IterDataset:
    """A grain pipeline that loads rows in threads and makes batches of them in order.

    Args:
        batches: has batch_size, local_batch_size, num_threads and prefetch_batches.
        load: makes the n-th of this process's rows, in any thread.
        collate: makes a batch of its rows.
        first_batch: number of the first batch, 0 or more.
    """
    local, last = batches.local_batch_size, sys.maxsize // batches.batch_size
    rows = grain.MapDataset.range(first_batch * local, last * local).map(load)
    threads, ahead = batches.num_threads, batches.prefetch_batches
    # To hand over a row costs what drawing a small one does: a thread that is alone makes whole batches.
    several = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead * local, threads))
    options = several if threads > 1 else grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    made = rows.to_iter_dataset(options).batch(local, drop_remainder=True, batch_fn=collate)
    whole = ahead if threads == 1 else min(threads, 1)
    return grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=whole)


class _Reader:
    """Holds a running grain iterator, so that it can be stopped at exit without keeping its owner alive."""

    def __init__(self) -> None:
        self.rows: Any = None

    def close(self) -> None:
        rows, self.rows = self.rows, None
        if rows is not None:
            rows.close()


class BatchIterator(Iterator[Batch]):
    """Iterates over `Batches`; `get_state` and `set_state` save and restore its place exactly.

    The place counts batches over all processes, so a state holds in every process, for any number of threads
    and, with the same batch size, of processes. The counts of broken samples in it are this process's own.

    Args:
        dataset: the batches.
    """

    def __init__(self, dataset: Batches) -> None:
        self.dataset = dataset
        self.tally = FaultTally.for_source(dataset.samples)
        self._next_batch = 0
        self._reader = _Reader()
        weakref.finalize(self, self._reader.close)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._reader.rows is None:
            self._reader.rows = iter(self.dataset.pipeline(self._next_batch))
        try:
            batch, broken = next(self._reader.rows)
        except BaseException:  # reading ahead may have gone on: another attempt begins at this batch again
            self.close()
            raise
        self._next_batch += 1
        self.tally.add(self.dataset.local_batch_size, broken)
        return batch

    def check_faults(self) -> None:
        """Raise a one-line DataError when more than `max_fault_share` of the samples here were broken."""
        self.tally.check(self.dataset.max_fault_share)

    def get_state(self) -> dict[str, Any]:
        """The place before the next batch, as JSON-serialisable values."""
        return {
            "format": _STATE_FORMAT,
            "next_batch": self._next_batch,
            "data": dict(self.dataset.identity),
            "faults": self.tally.to_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a place that `get_state` gave: the next batches are bitwise the same.

        Raises:
            DataError: the state is damaged, or was saved for other data, another seed or another batch size.
        """
        try:
            known, place = dict(state["data"]), int(state["next_batch"])
            tally = FaultTally.for_source(self.dataset.samples)
            tally.load_state(state["faults"])
            if state["format"] != _STATE_FORMAT or place < 0:
                raise ValueError(f"format {state['format']}, next_batch {place}")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the saved state of the data iterator cannot be read: {error}") from error
        now = dict(self.dataset.identity)
        names = [name for name in {**now, **known} if known.get(name) != now.get(name)]
        if names:
            changes = "; ".join(f"{name} was {known.get(name)!r}, is {now.get(name)!r}" for name in names)
            raise DataError(f"the saved state of the data iterator belongs to other data: {changes}")
        self.close()
        self._next_batch, self.tally = place, tally

    def close(self) -> None:
        """Stop reading ahead. The iterator can still be used: it starts reading again where it was."""
        self._reader.close()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_processes(batch_size: int, process_index: int, process_count: int) -> None:
    """Refuse a batch that the processes cannot share out evenly.

    Args:
        batch_size: rows of all processes together.
        process_index: which process this is, from 0.
        process_count: number of processes.

    Raises:
        ConfigError: the numbers do not fit each other.

    >>> check_processes(8, 1, 2)
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ConfigError(
            f"batch_size={batch_size} counts the rows of all processes together: "
            f"it has to be a positive multiple of process_count={process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index={process_index} has to be in 0..{process_count - 1}")


def tokenize(tokenizer: Any, texts: list[str], max_length: int | None) -> Batch:
    """Texts as arrays of one fixed width.

    Args:
        tokenizer: takes texts and transformers' arguments.
        texts: B captions.
        max_length: tokens per text.

    Returns:
        What the tokenizer gives, int32 [B, max_length] each.

    >>> def letters(texts, *, max_length, **options):
    ...     return {"input_ids": [[ord(c) for c in text.ljust(max_length)] for text in texts]}
    >>> tokenize(letters, ["a", "b"], 2)["input_ids"].tolist()
    [[97, 32], [98, 32]]
    """
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=max_length)
    return {name: np.asarray(value, np.int32) for name, value in dict(encoded).items()}


def text_length(max_length: int | None, tokenizer: Any) -> int:
    """Tokens per text: the configured number, else the tokenizer's own.

    Raises:
        ConfigError: neither says.

    >>> text_length(12, None)
    12
    """
    length = max_length if max_length is not None else getattr(tokenizer, "model_max_length", None)
    if not length or length > _LONGEST_TEXT:
        raise ConfigError("the tokenizer names no longest text: set max_length of the data configuration")
    return int(length)
