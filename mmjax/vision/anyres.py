"""AnyRes: which grid an image is cut into, and which features stand where in the text, as index arrays.

All of it is arithmetic on the host. What depends on an image's size ends up in arrays, so that one compiled
program serves images of every size.

Source: Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge" (grids, unpadding, row
ends); Li et al. 2024, "LLaVA-OneVision", section 3.2 and table 1 (interpolation, video frames).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mmjax.errors import ConfigError

#: In a `Layout`, the learned embedding that ends a row.
NEWLINE = -2
#: In a `Layout`, nothing: adds no row.
NOTHING = -1

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of one image, each a weighted sum of a few rows of features.

    Attributes:
        index: int32 [L, K], rows of the image's own features (tile n, patch p: n * P + p), NEWLINE, NOTHING.
        weights: float32 [L, K].
        tiles: how many tiles the image has.
    """

    index: np.ndarray
    weights: np.ndarray
    tiles: int

    def __len__(self) -> int:
        return len(self.index)

    @property
    def width(self) -> int:
        """K."""
        return self.index.shape[1]


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The resolution in which most of an image's pixels survive; of several, the one that wastes least.

    Args:
        size: (height, width) of the image in pixels.
        pinpoints: (height, width) of each resolution, at least one.

    >>> best_resolution((300, 700), [(336, 672), (672, 336), (672, 672)])
    (336, 672)
    """
    height, width = size
    best = pinpoints[0]
    most, least_wasted = 0, math.inf
    for rows, columns in pinpoints:
        scale = min(columns / width, rows / height)
        survives = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * columns - survives
        if survives > most or (survives == most and wasted < least_wasted):
            best, most, least_wasted = (rows, columns), survives, wasted
    return best


def fitted(size: Size, into: Size) -> Size:
    """(height, width) of an image scaled, sides in proportion, to fit into a resolution.

    >>> fitted((300, 700), (336, 672))
    (288, 672)
    """
    height, width = size
    by_width, by_height = into[1] / width, into[0] / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), into[0]), into[1]
    return into[0], min(math.ceil(width * by_height), into[1])


def unpadded(size: Size, grid: Size) -> tuple[slice, slice]:
    """Which rows and columns of a grid of features an image covers that was padded to the grid's shape.

    Args:
        size: (height, width) of the image in pixels.
        grid: rows and columns of the features.

    >>> unpadded((300, 700), (24, 48))
    (slice(2, 22, None), slice(0, 48, None))
    """
    height, width = size
    rows, columns = grid
    if width / height > columns / rows:
        # Rounded to seven digits first, so that 20.000000000000004 and 19.999999999999996 are both 20.
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


def bilinear(old: Size, new: Size) -> tuple[np.ndarray, np.ndarray]:
    """Which points of a grid, with which weights, make each point of a smaller or larger one.

    Centres of points are aligned (torch's `interpolate(mode="bilinear")`).

    Args:
        old, new: rows and columns.

    Returns:
        int32 and float32 [new rows, new columns, 4]; entries count the old grid row by row.

    >>> index, weights = bilinear((1, 4), (1, 2))
    >>> index[0, 1].tolist(), weights[0, 1].tolist()
    ([2, 3, 2, 3], [0.5, 0.5, 0.0, 0.0])
    """

    def along(have: int, want: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        places = np.maximum((np.arange(want) + 0.5) * (have / want) - 0.5, 0)
        first = np.minimum(places.astype(np.int64), have - 1)
        return first, np.minimum(first + 1, have - 1), places - first

    top, bottom, down = (x[:, None] for x in along(old[0], new[0]))
    left, right, across = (x[None, :] for x in along(old[1], new[1]))
    corners = [(top, left), (top, right), (bottom, left), (bottom, right)]
    index = np.stack([row * old[1] + column for row, column in corners], axis=-1)
    shares = [(1 - down, 1 - across), (1 - down, across), (down, 1 - across), (down, across)]
    weights = np.stack([row * column for row, column in shares], axis=-1)
    return index.astype(np.int32), weights.astype(np.float32)


def _single(rows: np.ndarray, tiles: int, width: int) -> Layout:
    """A layout in which each token is one row."""
    index = np.full((rows.size, width), NOTHING, np.int32)
    weights = np.zeros(index.shape, np.float32)
    index[:, 0], weights[:, 0] = rows.reshape(-1), 1
    return Layout(index, weights, tiles)


def _joined(parts: Sequence[Layout], tiles: int) -> Layout:
    return Layout(
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.weights for part in parts]),
        tiles,
    )


def plain_layout(patches: int, *, newline: bool = False, width: int = 1) -> Layout:
    """An image that is one tile: its features in order.

    Args:
        patches: P.
        newline: whether the end of a row follows them.
        width: K.

    >>> plain_layout(3, newline=True).index[:, 0].tolist()
    [0, 1, 2, -2]
    """
    rows = np.arange(patches)
    return _single(np.append(rows, NEWLINE) if newline else rows, 1, width)


def anyres_layout(
    size: Size,
    pinpoints: Sequence[Size],
    tile: Size,
    patches: Size,
    *,
    most_tiles: int | None = None,
    width: int = 1,
) -> Layout:
    """An image as a whole, then its tiles as one picture, without padding, an end after each row.

    Args:
        size: (height, width) of the image in pixels.
        pinpoints: the resolutions that there are, multiples of the tile.
        tile: (height, width) of a tile in pixels.
        patches: rows and columns of a tile's features.
        most_tiles: a picture with more features than so many tiles have (by more than a fifth) is scaled down
            to them; None: never. Needs a width of 4.
        width: K.

    >>> layout = anyres_layout((4, 8), [(4, 8)], (4, 4), (2, 2))
    >>> layout.tiles, layout.index[:, 0].tolist()
    (3, [0, 1, 2, 3, 4, 5, 8, 9, -2, 6, 7, 10, 11, -2])
    """
    best = best_resolution(size, pinpoints)
    if best[0] % tile[0] or best[1] % tile[1]:
        raise ConfigError(f"image_grid_pinpoints: {best} is not a multiple of the tile {tile}")
    count = (best[0] // tile[0], best[1] // tile[1])
    each = patches[0] * patches[1]
    numbers = each + np.arange(count[0] * count[1] * each).reshape(*count, *patches)
    picture = numbers.transpose(0, 2, 1, 3).reshape(count[0] * patches[0], count[1] * patches[1])
    picture = picture[unpadded(size, picture.shape)]
    rows, columns = picture.shape
    ratio = 1.0 if most_tiles is None else math.sqrt(rows * columns / (most_tiles * patches[0] ** 2))
    if ratio > 1.1:
        if width < 4:
            raise ConfigError("anyres_layout: features that are interpolated need a width of 4")
        new = int(rows // ratio), int(columns // ratio)
        index, weights = bilinear((rows, columns), new)
        part = Layout(picture.reshape(-1)[index].reshape(-1, 4), weights.reshape(-1, 4), 0)
    else:
        part = _single(picture.reshape(-1), 0, 4 if most_tiles else width)
        new = rows, columns
    ends, many = _single(np.full(new[0], NEWLINE), 0, part.width), part.width
    index, weights = (
        np.concatenate([body.reshape(*new, many), end[:, None]], axis=1).reshape(-1, many)
        for body, end in ((part.index, ends.index), (part.weights, ends.weights))
    )
    whole = Layout(index, weights, 0)
    base = plain_layout(each, width=whole.width)
    return _joined([base, whole], 1 + count[0] * count[1])


def pooled_layout(frames: int, patches: Size) -> Layout:
    """A video: each frame's features, scaled to half the rows and columns, and one end after the last.

    Args:
        frames: how many there are, a tile each.
        patches: rows and columns of a frame's features.

    >>> pooled_layout(2, (2, 2)).index.tolist()
    [[0, 1, 2, 3], [4, 5, 6, 7], [-2, -1, -1, -1]]
    """
    new = math.ceil(patches[0] / 2), math.ceil(patches[1] / 2)
    index, weights = (x.reshape(-1, 4) for x in bilinear(patches, new))
    each = patches[0] * patches[1]
    parts = [Layout((index + each * frame).astype(np.int32), weights, 0) for frame in range(frames)]
    return _joined([*parts, _single(np.array([NEWLINE]), 0, 4)], frames)


__all__ = [
    "NEWLINE",
    "NOTHING",
    "Layout",
    "anyres_layout",
    "best_resolution",
    "bilinear",
    "fitted",
    "plain_layout",
    "pooled_layout",
    "unpadded",
]
