"""Samples to batches: padded texts, images one after another, and one table of features for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmjax.errors import DataError
from mmjax.vision.tables import FeatureTable
from mmjax.vision.tiles import stack_tiles

Sample = Mapping[str, np.ndarray]
# What padding has, where it is not 0.
FILL = {"labels": -100, "image_index": -1}


def table_of(batch: Sample, rows: int) -> FeatureTable:
    """The table that a sample's or a batch's image_index counts in.

    Args:
        batch: pixel_values [I, (N,) H, W, C] and pixel_values_videos [V, F, H, W, C], where it has any; or
            image_features [I, (N,) P, Dv] in place of the first.
        rows: P.

    >>> table_of({"pixel_values": np.zeros((2, 3, 4, 4, 3))}, 4).newline
    24
    """
    images = tiles = videos = frames = 0
    if "pixel_values" in batch or "image_features" in batch:
        shape = (
            batch["pixel_values"].shape[:-3]
            if "pixel_values" in batch
            else batch["image_features"].shape[:-2]
        )
        images, tiles = (*shape, 1)[:2]
    if "pixel_values_videos" in batch:
        videos, frames = batch["pixel_values_videos"].shape[:2]
    return FeatureTable(rows=rows, images=images, tiles=tiles or 1, videos=videos, frames=frames or 1)


def collate(
    samples: Sequence[Sample],
    *,
    rows: int,
    pad_id: int,
    length: int | None = None,
    images: int | None = None,
    tiles: int | None = None,
    side: str = "right",
) -> dict[str, np.ndarray]:
    """One batch of several samples.

    Args:
        samples: input_ids [T], image_index [T, K] and other arrays with one entry per token; pixel_values,
            image_sizes, image_features, pixel_values_videos.
        rows: P.
        pad_id: fills input_ids.
        length: T of the batch; None: the longest sample's.
        images, tiles: I and N of the batch, filled with zeros, so that shapes are few; None: what is needed.
        side: of the padding.

    Raises:
        DataError: no samples, or some that do not fit.

    >>> samples = [{"input_ids": np.array([5, 6])}, {"input_ids": np.array([7])}]
    >>> batch = collate(samples, rows=4, pad_id=0)
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
    """
    if not samples:
        raise DataError("collate: no samples")
    lengths = [len(sample["input_ids"]) for sample in samples]
    width = max(lengths) if length is None else length
    if max(lengths) > width:
        raise DataError(f"collate: a sample has {max(lengths)} tokens, more than length={width}")
    tables = [table_of(sample, rows) for sample in samples]
    counts = [table.images for table in tables]
    total = sum(counts) if images is None else images
    if sum(counts) > total:
        raise DataError(f"collate: the samples have {sum(counts)} images, more than images={total}")
    batch = _media(samples, total, tiles or 0)
    whole = table_of(batch, rows)
    first_image = first_video = 0
    moved = []
    for sample, table in zip(samples, tables, strict=True):
        if "image_index" in sample:
            numbers = first_image + np.arange(table.images), first_video + np.arange(table.videos)
            index = table.renumbered(np.asarray(sample["image_index"]), whole, *numbers)
            sample = {**sample, "image_index": index}
        moved.append({"attention_mask": np.ones(len(sample["input_ids"]), np.int32), **sample})
        first_image, first_video = first_image + table.images, first_video + table.videos
    per_token = {
        name: value.shape[1:]
        for sample in moved
        for name, value in sample.items()
        if name not in ("pixel_values", "image_features", "pixel_values_videos", "image_sizes")
    }
    for name in per_token:
        fill = pad_id if name == "input_ids" else FILL.get(name, 0)
        batch[name] = _padded([sample.get(name) for sample in moved], lengths, width, fill, side)
    return batch


def _padded(
    values: Sequence[np.ndarray | None], lengths: Sequence[int], width: int, fill: int, side: str
) -> np.ndarray:
    known = next(value for value in values if value is not None)
    result = np.full((len(values), width, *known.shape[1:]), fill, known.dtype)
    for row, (value, length) in enumerate(zip(values, lengths, strict=True)):
        begin = 0 if side == "right" else width - length
        if value is not None:
            result[row, begin : begin + length] = value
    return result


def _media(samples: Sequence[Sample], images: int, tiles: int) -> dict[str, np.ndarray]:
    """Pixels, features and sizes of all samples, padded with zeros."""
    batch: dict[str, np.ndarray] = {}
    for name, rank in (("pixel_values", 4), ("image_features", 3)):
        found = [sample[name] for sample in samples if name in sample and len(sample[name])]
        if not found:
            continue
        each = [image for value in found for image in value]
        # One image is tiles [N, ...] or, where images are not cut, what one tile is.
        whole = stack_tiles(each, tiles) if found[0].ndim > rank else np.stack(each)
        missing = images - len(whole)
        batch[name] = np.concatenate([whole, np.zeros((missing, *whole.shape[1:]), whole.dtype)])
    sizes = [sample["image_sizes"] for sample in samples if "image_sizes" in sample]
    if sizes:
        known = np.concatenate(sizes)
        batch["image_sizes"] = np.concatenate([known, np.ones((images - len(known), 2), known.dtype)])
    videos = [video for s in samples if "pixel_values_videos" in s for video in s["pixel_values_videos"]]
    if videos:
        batch["pixel_values_videos"] = stack_tiles(videos)
    return batch


__all__ = ["collate", "table_of"]
