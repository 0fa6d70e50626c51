"""Conversations with images as rows of tokens, each row with its own images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.data.packing import IGNORED
from mmjax.data.pipeline import Batch
from mmjax.vision.anyres import NEWLINE, NOTHING, Layout


@dataclass(frozen=True, eq=False)
class Turns:
    """One conversation, ready to be laid into a row.

    Attributes:
        ids: int32 [T].
        learned: bool [T], which tokens are learned; none of an image, whoever shows it.
        index: int32 [T, K], the rows of features that make each token: tile n, feature p is n * P + p;
            NEWLINE is the end of a row of features, NOTHING in [..., 0] a token of text. None without images.
        weights: float32 [T, K], or None.
        tiles: [M, ...], the pixels of the conversation's tiles (or their features); None without images.
    """

    ids: np.ndarray
    learned: np.ndarray
    index: np.ndarray | None = None
    weights: np.ndarray | None = None
    tiles: np.ndarray | None = None

    def cut(self, length: int) -> Turns:
        """The first `length` tokens; the tiles stay."""
        index, weights = (None if x is None else x[:length] for x in (self.index, self.weights))
        return Turns(self.ids[:length], self.learned[:length], index, weights, self.tiles)


def expand(
    ids: np.ndarray, learned: np.ndarray, image_id: int, layouts: Sequence[Layout], tile_rows: int
) -> Turns:
    """A conversation with one id for each image, as one with an id for each token of an image.

    Args:
        ids: int [T].
        learned: [T], non-zero for tokens that are learned, if they are text.
        image_id: stands for an image.
        layouts: of the images, as many as there are image ids.
        tile_rows: P.

    Returns:
        The conversation, without tiles.

    >>> from mmjax.vision.anyres import plain_layout
    >>> turns = expand(np.array([5, 9, 6]), np.array([0, 0, 1]), 9, [plain_layout(2, newline=True)], 2)
    >>> turns.ids.tolist(), turns.index[:, 0].tolist()
    ([5, 9, 9, 9, 6], [-1, 0, 1, -2, -1])
    """
    ids, learned = np.asarray(ids, np.int32), np.asarray(learned) != 0
    if not layouts:
        return Turns(ids, learned)
    counts = np.ones(len(ids), np.int64)
    counts[ids == image_id] = [len(layout) for layout in layouts]
    ids, learned = np.repeat(ids, counts), np.repeat(learned, counts)
    index = np.full((len(ids), layouts[0].width), NOTHING, np.int32)
    weights = np.zeros(index.shape, np.float32)
    firsts = np.cumsum([0, *(layout.tiles * tile_rows for layout in layouts)])
    here = ids == image_id
    index[here] = np.concatenate(
        [np.where(x.index >= 0, x.index + first, x.index) for x, first in zip(layouts, firsts, strict=False)]
    )
    weights[here] = np.concatenate([layout.weights for layout in layouts])
    # An image in an answer is seen; the id that stands for its features is no word to learn.
    return Turns(ids, learned & ~here, index, weights if layouts[0].width > 1 else None)


def turns_of(sample: Mapping[str, Any], tile_rows: int, tiles: Sequence[int]) -> Turns:
    """What a processor's `encode` gives, without the tiles that only fill up.

    Args:
        sample: input_ids [T], assistant_masks [T] and, with images, pixel_values [I, H, W, C] or
            [I, N, H, W, C], image_index [T, K] into the I * N * P features and the newline after them, and
            perhaps image_weights [T, K].
        tile_rows: P.
        tiles: how many tiles each image has.

    Returns:
        The conversation; its tiles are [M, H, W, C], or [M, 1, H, W, C] where images are cut into tiles.

    >>> pixels, index = np.zeros((1, 3, 4, 4, 3)), np.array([[0], [3], [6], [-1]])
    >>> turns = turns_of({"input_ids": [9, 9, 9, 5], "assistant_masks": [0, 0, 0, 1],
    ...                   "pixel_values": pixels, "image_index": index}, 2, [2])
    >>> turns.tiles.shape, turns.index[:, 0].tolist()
    ((2, 1, 4, 4, 3), [0, 3, -2, -1])
    """
    ids = np.asarray(sample["input_ids"], np.int32)
    learned = np.asarray(sample["assistant_masks"]) != 0
    if sample.get("pixel_values") is None:
        return Turns(ids, learned)
    pixels, index = np.asarray(sample["pixel_values"]), np.asarray(sample["image_index"])
    learned &= index[:, 0] == NOTHING  # as in `expand`
    cut_up = pixels.ndim == 5
    most = pixels.shape[1] if cut_up else 1
    kept = (np.arange(most) < np.asarray(tiles)[:, None]).reshape(-1)
    real = (index >= 0) & (index < len(kept) * tile_rows)
    tile, feature = np.divmod(np.where(real, index, 0), tile_rows)
    moved = (np.cumsum(kept) - 1)[tile] * tile_rows + feature
    ends = np.where(index == len(kept) * tile_rows, NEWLINE, NOTHING)
    weights = sample.get("image_weights")
    pixels = pixels.reshape(len(kept), *pixels.shape[2 if cut_up else 1 :])[kept]
    return Turns(
        ids,
        learned,
        np.where(real, moved, ends).astype(np.int32),
        None if weights is None else np.asarray(weights, np.float32),
        pixels[:, None] if cut_up else pixels,
    )


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """What all rows of a batch have in common.

    Args:
        length: T.
        tiles: M, tiles of every row; 0: the batch has no images.
        tile: shape of one.
        tile_rows: P, features of one.
        width: K.
        weighted: whether features are weighted.
        pad_id: fills what is left of a row.
        name: what tiles are called in a batch: "tiles", or "tile_features" where they are features.
    """

    length: int
    tiles: int
    tile: tuple[int, ...]
    tile_rows: int
    width: int = 1
    weighted: bool = False
    pad_id: int = 0
    name: str = "tiles"


def fill_row(pieces: Sequence[Turns], shape: RowShape) -> Batch:
    """One row of a batch.

    Args:
        pieces: conversations that fit into it together.
        shape: what the row looks like.

    Returns:
        As in `PackedBatches.batch`, without the batch's axis: input_ids, attention_mask, segment_ids,
        position_ids, labels, int32 [T]. With images also image_index int32 [T, K], which counts in the row's
        own features; image_weights float32 [T, K] where features are weighted; tiles [M, ...].
    """
    row = {
        name: np.zeros(shape.length, np.int32) for name in ("attention_mask", "segment_ids", "position_ids")
    }
    row["input_ids"] = np.full(shape.length, shape.pad_id, np.int32)
    row["labels"] = np.full(shape.length, IGNORED, np.int32)
    if shape.tiles:
        row["image_index"] = np.full((shape.length, shape.width), NOTHING, np.int32)
        row[shape.name] = np.zeros((shape.tiles, *shape.tile), np.float32)
        if shape.weighted:
            row["image_weights"] = np.zeros((shape.length, shape.width), np.float32)
    place = tile = 0
    for segment, piece in enumerate(pieces, start=1):
        count = len(piece.ids)
        here = slice(place, place + count)
        row["input_ids"][here] = piece.ids
        row["attention_mask"][here] = 1
        row["segment_ids"][here] = segment
        row["position_ids"][here] = np.arange(count)
        row["labels"][here] = np.where(piece.learned, piece.ids, IGNORED)
        row["labels"][place : place + 1] = IGNORED
        place += count
        if piece.index is not None and piece.tiles is not None:
            shifted = piece.index + tile * shape.tile_rows
            row["image_index"][here] = np.where(piece.index >= 0, shifted, piece.index)
            if shape.weighted:
                row["image_weights"][here] = 1.0 if piece.weights is None else piece.weights
            row[shape.name][tile : tile + len(piece.tiles)] = piece.tiles
            tile += len(piece.tiles)
    return row


def grouped_order(
    order: np.ndarray, lengths: np.ndarray, tiles: np.ndarray, batch_size: int, window: int, rank: Any
) -> np.ndarray:
    """An order in which neighbours are about equally long, and batches come in no order of length.

    Args:
        order: int [samples], a shuffle.
        lengths, tiles: of each sample; those without tiles go apart from those with.
        batch_size: samples of a batch.
        window: batches whose samples are sorted among each other.
        rank: (batch in the window, batches in it, number of the window) -> its place there.

    Returns:
        The order, int [samples]; what does not fill a batch comes last.

    Source: the sampler of LLaVA's training, which groups by length and by having an image.

    >>> lengths, tiles = np.array([5, 1, 4, 2, 3]), np.zeros(5, int)
    >>> grouped_order(np.arange(5), lengths, tiles, 2, 2, lambda place, count, window: place)
    array([1, 3, 2, 0, 4])
    """
    made = []
    for number, first in enumerate(range(0, len(order), window * batch_size)):
        part = order[first : first + window * batch_size]
        part = part[np.lexsort((lengths[part], tiles[part] > 0))]
        whole = len(part) // batch_size
        batches = part[: whole * batch_size].reshape(whole, batch_size)
        made += [batches[rank(place, whole, number)] for place in range(whole)]
        made.append(part[whole * batch_size :])
    return np.concatenate(made)
