"""Reading every sample of a split once, in order: pixels in batches, and what was said about them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmjax.data.faults import FaultTally, cause_of
from mmjax.errors import DataError
from mmjax.evaluation.embed import embed_images, embed_texts
from mmjax.evaluation.retrieval import retrieval_metrics


@dataclass
class Reading:
    """What is known about the samples whose pixels were given out, in that order.

    Attributes:
        names: [N] names of the samples.
        texts: [N] captions of each.
        labels: [N] class numbers, None without classes.
        tally: how many were read, and what was wrong with those left out.
    """

    names: list[str] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    tally: FaultTally = field(default_factory=FaultTally)

    def class_labels(self) -> NDArray[np.int64]:
        """[N] int64.

        Raises:
            DataError: a sample has no class.
        """
        without = sum(label is None for label in self.labels)
        if without or not self.labels:
            raise DataError(f"{without} of {len(self.labels)} samples have no class")
        return np.array(self.labels, np.int64)

    def caption_groups(self) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
        """Captions for retrieval, each written once, and which images they belong to.

        Images that share a caption word for word cannot be told apart by it, so they and all their captions
        form one group.

        Returns:
            M captions, the group of each image [N], and the group of each caption [M].

        Raises:
            DataError: an image has no caption.

        Example:
            >>> Reading(names=["a", "b"], texts=[("one", "1"), ("one",)]).caption_groups()
            (['one', '1'], array([0, 0]), array([0, 0]))
        """
        if not all(self.texts) or not self.texts:
            raise DataError(
                f"{sum(not texts for texts in self.texts)} of {len(self.texts)} images have no caption"
            )
        leader: dict[str, int] = {}
        parents = list(range(len(self.texts)))

        def root(index: int) -> int:
            while parents[index] != index:
                parents[index] = parents[parents[index]]
                index = parents[index]
            return index

        for index, texts in enumerate(self.texts):
            for text in texts:
                first, own = sorted((root(leader.setdefault(text, index)), root(index)))
                parents[own] = first
        images = np.array([root(index) for index in range(len(parents))], np.int64)
        return list(leader), images, images[list(leader.values())]


def pixel_batches(
    examples: Sequence[Any],
    image_processor: Any,
    batch_size: int,
    reading: Reading,
    *,
    max_broken: float = 0.0,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[NDArray[np.float32]]:
    """Decode, process and batch images in order, on several threads.

    Broken samples are left out, not replaced: a measure is of real samples only, and says of how many.

    Args:
        examples: N samples by number: {"image", "texts", "label", "name"}, or BadSample raised.
        image_processor: called with [image]; gives {"pixel_values": [1, H, W, C]}.
        batch_size: rows of a batch; the last may have fewer.
        reading: filled with names, texts and labels of what was given out.
        max_broken: stop when a larger share of samples is broken.
        threads: how many decode at a time; None: as many as there are cores, at most 8.
        advance: told the number of samples done since the last call.

    Yields:
        [B, H, W, C] float32.

    Raises:
        DataError: too many broken samples, images of different sizes, or no usable sample at all.
    """

    def read(index: int) -> tuple[Any, Any, list[tuple[str, str]]]:
        name = f"sample {index}"
        try:
            example = examples[index]
            name = example["name"]
            return example, np.asarray(image_processor([example["image"]])["pixel_values"][0], np.float32), []
        except (DataError, OSError) as error:
            return None, None, [(cause_of(error), getattr(error, "name", None) or name)]

    reading.tally = FaultTally.for_source(len(examples))
    rows: list[NDArray[np.float32]] = []
    for example, pixels, broken in _ahead(read, len(examples), threads or min(8, os.cpu_count() or 1)):
        advance(1)
        reading.tally.add(1, broken)
        if broken:
            reading.tally.check(max_broken)
            continue
        if rows and pixels.shape != rows[0].shape:
            raise DataError(
                f"{example['name']}: pixels {pixels.shape} after processing, others {rows[0].shape}; a batch "
                "needs one size, so the image processor has to resize to a fixed height and width, or crop"
            )
        rows.append(pixels)
        reading.names.append(example["name"])
        reading.texts.append(tuple(example["texts"]))
        reading.labels.append(example["label"])
        if len(rows) == batch_size:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)
    if not reading.names:
        raise DataError(f"no usable sample: {reading.tally.summary()}")


def _ahead(read: Callable[[int], Any], count: int, threads: int) -> Iterator[Any]:
    """Results of read(0) ... read(count - 1) in order, a bounded number of them computed ahead."""
    with ThreadPoolExecutor(threads, thread_name_prefix="mmjax-read") as pool:
        waiting: deque[Future] = deque()
        try:
            for index in range(count):
                waiting.append(pool.submit(read, index))
                if len(waiting) >= 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def embed_examples(
    model: Any,
    params: Any,
    image_processor: Any,
    examples: Sequence[Any],
    *,
    batch_size: int = 32,
    normalize: bool = True,
    max_broken: float = 0.0,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[NDArray[np.float32], Reading]:
    """Embed the images of a split, each once, in order.

    Args:
        model: see `embed_images`.
        params: its parameters.
        image_processor: see `pixel_batches`.
        examples: N samples, such as `DigitsData().examples("test")`.
        batch_size: images per step.
        normalize: scale every embedding to length 1.
        max_broken: largest share of broken samples to leave out.
        advance: told the number of samples done since the last call.

    Returns:
        [N, E] float32, without the broken ones, and what is known about those samples.

    Raises:
        DataError: see `pixel_batches` and `embed_images`.
    """
    reading = Reading()
    size = max(1, min(batch_size, len(examples)))
    batches = pixel_batches(examples, image_processor, size, reading, max_broken=max_broken, advance=advance)
    return embed_images(model, params, batches, normalize=normalize), reading


def evaluate_retrieval(
    model: Any,
    params: Any,
    processor: Any,
    examples: Sequence[Any],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    max_broken: float = 0.0,
) -> dict[str, Any]:
    """Retrieval between the images of a split and their captions, in both directions.

    Args:
        model: of images and texts, with `encode_image` and `encode_text`.
        params: its parameters.
        processor: with an image processor and a tokenizer.
        examples: N samples with captions, see `pixel_batches`.
        max_length: tokens per caption; None: as the tokenizer has it.
        batch_size: images, and captions, per step.
        max_broken: largest share of broken samples to leave out.

    Returns:
        "test_images" and "test_captions", how many there were, and what `RetrievalMetrics.to_dict` gives.

    Raises:
        DataError: see `embed_examples`, `Reading.caption_groups` and `embed_texts`.
    """
    images, reading = embed_examples(
        model, params, processor.image_processor, examples, batch_size=batch_size, max_broken=max_broken
    )
    captions, image_groups, caption_groups = reading.caption_groups()
    ids = (
        processor.tokenizer(
            captions[start : start + batch_size],
            padding="max_length",
            truncation=True,
            max_length=max_length,
        )
        for start in range(0, len(captions), batch_size)
    )
    found = retrieval_metrics(images, embed_texts(model, params, ids), image_groups, caption_groups)
    return {"test_images": len(images), "test_captions": len(captions), **found.to_dict()}
