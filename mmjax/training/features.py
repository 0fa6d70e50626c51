"""Features of frozen eyes, computed once for all images of instruction data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mmjax.data.config import Progress, Split
from mmjax.data.faults import BadSample
from mmjax.data.features import write_features
from mmjax.training.state import flatten

if TYPE_CHECKING:
    from mmjax.data.instruction_source import Conversations
    from mmjax.data.instructions import InstructionData

EYES = "vision_tower"
Picture = tuple[str, tuple[int, int], np.ndarray]


def keep_features(
    folder: str | os.PathLike[str],
    model: Any,
    params: Mapping[str, Any],
    processor: Any,
    data: InstructionData,
    *,
    split: Split = "train",
    batch_size: int = 32,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
) -> Path:
    """Compute what a model's eyes see in the images of instruction data, and keep it.

    Training then reads features in place of images (`InstructionData.features`), as long as the eyes stay
    frozen: every image goes through them once, and not once an epoch. Images that are broken are left out.

    Args:
        folder: for the features; they take tiles * P * Dv numbers.
        model: has `vision_features`, as `Llava` has.
        params: its parameters, nested.
        processor: the model's.
        data: its images are kept, each once.
        split: whose images.
        batch_size: tiles that go through the eyes together.
        dtype: kept as "bfloat16", "float16" or "float32".
        progress: called with (conversations done, conversations).

    Returns:
        The folder.

    Raises:
        DataError: there is no image that can be read, or the folder cannot be written.
    """
    see = jax.jit(lambda params, pixels: model.apply({"params": params}, pixels, method="vision_features"))

    def features(pictures: list[Picture]) -> Iterator[Picture]:
        tiles = np.concatenate([tiles for _, _, tiles in pictures])
        tiles = tiles.reshape(-1, *tiles.shape[-3:])
        count = len(tiles)
        full = -(-count // batch_size) * batch_size
        tiles = np.concatenate([tiles, np.zeros((full - count, *tiles.shape[1:]), tiles.dtype)])
        seen = [see(params, tiles[n : n + batch_size]) for n in range(0, full, batch_size)]
        rows = np.concatenate([np.asarray(part, np.float32) for part in seen])
        for key, size, own in pictures:
            yield key, size, rows[: len(own)]
            rows = rows[len(own) :]

    def all_features() -> Iterator[Picture]:
        waiting: list[Picture] = []
        for picture in _pictures(data.conversations(processor, split), progress):
            waiting.append(picture)
            if sum(len(tiles) for _, _, tiles in waiting) >= batch_size:
                yield from features(waiting)
                waiting = []
        if waiting:
            yield from features(waiting)

    return write_features(folder, all_features(), dtype=dtype, identity=_digest(params))


def _pictures(source: Conversations, progress: Progress | None) -> Iterator[Picture]:
    """Every image once: its key, its size and its tiles."""
    done: set[str] = set()
    for number in range(len(source)):
        try:
            names = source.names(number)
            if not all(source.key(name, len(names)) in done for name in names):
                found = source.pictures(number)
                yield from (picture for picture in found if picture[0] not in done)
                done.update(key for key, _, _ in found)
        except BadSample:
            pass  # a run counts it under its cause
        if progress is not None:
            progress(number + 1, len(source))


def _digest(params: Mapping[str, Any]) -> str:
    state = hashlib.blake2b(digest_size=8)
    for path, leaf in sorted(flatten(dict(params)).items()):
        if path.startswith(EYES):
            state.update(path.encode())
            state.update(np.asarray(leaf).tobytes())
    return state.hexdigest()
