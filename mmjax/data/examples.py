"""A split in its own order, each sample once: what evaluation reads."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from mmjax.data.faults import BadSample, cause_of, fault_counts
from mmjax.data.pipeline import Batch, text_length, tokenize
from mmjax.data.sampling import decode, pixels_of, usable_texts
from mmjax.data.sources import Source
from mmjax.errors import DataError


class Example(TypedDict):
    """One sample as evaluation sees it; `text` is the first of `texts`, None without captions."""

    image: Image.Image
    text: str | None
    texts: tuple[str, ...]
    label: int | None
    name: str


class Examples(Sequence[Example]):
    """The samples of sources, one source after the other, for random access.

    Args:
        sources: raw records.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self._ends = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """One example, or a list of them for a slice.

        Raises:
            BadSample: the sample is broken; `cause` says how.
            IndexError: there is no such sample.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        try:
            record = self.sources[number][index - (self._ends[number - 1] if number else 0)]
        except OSError as error:
            raise BadSample(cause_of(error), f"sample {index}") from error
        texts = usable_texts(record) if any(text.strip() for text in record["texts"]) else ()
        return Example(
            image=decode(record),
            text=texts[0] if texts else None,
            texts=texts,
            label=record["label"],
            name=record["name"],
        )

    @property
    def has_text(self) -> bool:
        """Whether the samples have captions."""
        return all(source.has_text for source in self.sources)

    @property
    def has_labels(self) -> bool:
        """Whether the samples have classes."""
        return all(source.has_labels for source in self.sources)


def batches(
    examples: Examples, processor: Any, batch_size: int, *, max_length: int | None = None
) -> Iterator[Batch]:
    """Ordered batches of one shape over all examples, the last one padded.

    Args:
        examples: from `config.examples(split)`.
        processor: has `image_processor` and, for captions, `tokenizer`.
        batch_size: rows per batch.
        max_length: tokens per caption; None: the tokenizer's own length.

    Yields:
        As in training: pixel_values [B, H, W, C], token arrays [B, T], labels [B], ids [B], faults
        [len(FAULTS)]; and valid bool [B], False for padding and for broken samples, whose rows hold zeros
        (labels and ids -1 in padding; broken samples keep their id and have label -1).

    >>> from types import SimpleNamespace
    >>> from mmjax.data.sources import ListSource, Record
    >>> pixels = lambda images: {"pixel_values": np.stack([np.asarray(i.resize((2, 2))) for i in images])}
    >>> processor = SimpleNamespace(image_processor=pixels, tokenizer=None)
    >>> source: Any = [Record(image=np.zeros((4, 4), np.uint8), texts=(), label=None, name="1")]
    >>> source = ListSource(source, "example", has_text=False, has_labels=False)
    >>> [batch["valid"].tolist() for batch in batches(Examples([source]), processor, 2)]
    [[True, False]]
    """
    to_pixels = pixels_of(processor.image_processor)
    blank = np.zeros_like(to_pixels(Image.new("RGB", (64, 64))))
    tokenizer = getattr(processor, "tokenizer", None) if examples.has_text else None
    length = None if tokenizer is None else text_length(max_length, tokenizer)
    for start in range(0, len(examples), batch_size):
        pixels = np.zeros((batch_size, *blank.shape), np.float32)
        valid, ids = np.zeros(batch_size, bool), np.full(batch_size, -1, np.int64)
        labels, texts, causes = np.full(batch_size, -1, np.int32), [""] * batch_size, []
        for row, index in enumerate(range(start, min(start + batch_size, len(examples)))):
            ids[row] = index
            try:
                example = examples[index]
                if tokenizer is not None and example["text"] is None:
                    raise BadSample("no_caption", example["name"])
                pixels[row] = to_pixels(example["image"])
            except DataError as error:
                causes.append(cause_of(error))
                continue
            valid[row], texts[row] = True, example["text"] or ""
            labels[row] = -1 if example["label"] is None else example["label"]
        batch = {"pixel_values": pixels, "valid": valid, "ids": ids, "faults": fault_counts(causes)}
        if examples.has_labels:
            batch["labels"] = labels
        if tokenizer is not None:
            batch |= tokenize(tokenizer, texts, length)
        yield batch
