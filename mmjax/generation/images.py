"""Images of prompts on the host: laid out, rounded up to few shapes, and told apart in conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.errors import DataError
from mmjax.vision.tables import FeatureTable

# Arrays with one entry per image or video.
MEDIA = ("pixel_values", "image_features", "pixel_values_videos")
# What images are laid out by where there is no image_index.
SIZES = ("image_sizes", "batch_num_images")
PER_TOKEN = ("image_index", "image_weights")
NAMES = (*MEDIA, *SIZES, *PER_TOKEN)


def lay_out(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model with image_index for its images, and without what only that was made from.

    Texts alone come back without any of them, so that they are programs of texts.

    Args:
        model: one that sees has `lay_out`, which makes image_index from ids and sizes.
        inputs: arguments of the model.

    Raises:
        DataError: images for a model that does not see, or places for images and no images.
    """
    if not any(name in inputs for name in NAMES):
        _check_no_places(model, inputs)
        return inputs
    if not hasattr(model, "lay_out"):
        named = next(name for name in NAMES if name in inputs)
        raise DataError(f"{named}: a {type(model).__name__} reads text only; leave images out")
    if any(name in inputs for name in MEDIA) and "image_index" not in inputs:
        inputs = model.lay_out(inputs)
    rest = {name: value for name, value in inputs.items() if name not in SIZES}
    index = rest.get("image_index")
    if index is None or not (np.asarray(index)[..., 0] >= 0).any():
        return {name: value for name, value in rest.items() if name not in NAMES}
    if not any(name in rest for name in MEDIA):
        raise DataError("image_index: there are tokens of images, but no pixel_values; give the images too")
    return rest


def _check_no_places(model: Any, inputs: Mapping[str, Any]) -> None:
    """An image's token has an embedding, too, but no meaning."""
    ids = inputs.get("input_ids")
    if ids is None or not hasattr(model, "lay_out"):
        return
    for name, what in (("image_token_id", "pixel_values"), ("video_token_id", "pixel_values_videos")):
        number = getattr(model.config, name, None)
        count = 0 if number is None else int((np.asarray(ids) == number).sum())
        if count:
            raise DataError(f"input_ids: {count} tokens are places for images, but there are no {what}")


def table_of(inputs: Mapping[str, Any], rows: int) -> FeatureTable:
    """The table that image_index counts in.

    Args:
        inputs: pixel_values [I, (N,) H, W, C] or image_features [I, (N,) P, Dv]; pixel_values_videos
            [V, F, H, W, C].
        rows: P.

    >>> table_of({"pixel_values": np.zeros((2, 3, 4, 4, 3))}, 4).newline
    24
    """
    lead = (0, 1)
    for name, rank in (("pixel_values", 3), ("image_features", 2)):
        if name in inputs:
            lead = (*inputs[name].shape[:-rank], 1)[:2]
    films = inputs["pixel_values_videos"].shape[:2] if "pixel_values_videos" in inputs else (0, 1)
    return FeatureTable(rows=rows, images=lead[0], tiles=lead[1], videos=films[0], frames=films[1])


def rounded(inputs: dict[str, Any], rows: int, tiles: int = 1) -> dict[str, Any]:
    """The arguments with images, tiles, videos and frames rounded up, so that there are few shapes.

    Images, videos and frames become a power of two; images that are cut get as many tiles as one can have.

    Args:
        inputs: arguments of a model, with image_index where there are images.
        rows: P.
        tiles: the most that an image can have.

    >>> pixels, index = np.ones((3, 4, 2, 2, 3)), np.array([[[0], [12]]])
    >>> more = rounded({"pixel_values": pixels, "image_index": index}, 1, tiles=5)
    >>> more["pixel_values"].shape, more["image_index"][0, :, 0].tolist()
    ((4, 5, 2, 2, 3), [0, 20])
    """
    if "image_index" not in inputs:
        return inputs
    old = table_of(inputs, rows)
    new = FeatureTable(
        rows=rows,
        images=_power(old.images),
        tiles=old.tiles if old.tiles < 2 else max(old.tiles, tiles),
        videos=_power(old.videos),
        frames=_power(old.frames),
    )
    result = dict(inputs)
    for name in MEDIA:
        if name in inputs:
            value = np.asarray(inputs[name])
            wanted = (new.videos, new.frames) if name == "pixel_values_videos" else (new.images, new.tiles)
            rank = 2 if name == "image_features" else 3
            pads = [(0, most - have) for have, most in zip(value.shape[:-rank], wanted, strict=False)]
            result[name] = np.pad(value, [*pads, *[(0, 0)] * rank])
    numbers = np.arange(old.images), np.arange(old.videos)
    result["image_index"] = old.renumbered(np.asarray(inputs["image_index"]), new, *numbers)
    return result


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 0 else 0


def used_only(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The arguments with only those images and videos that a token is made of.

    >>> pixels, index = np.arange(3.0).reshape(3, 1, 1, 1), np.array([[[2], [-1]]])
    >>> fewer = used_only({"pixel_values": pixels, "image_index": index}, 1)
    >>> fewer["pixel_values"].ravel().tolist(), fewer["image_index"][0, :, 0].tolist()
    ([2.0], [0, -1])
    """
    old = table_of(inputs, rows)
    index = np.asarray(inputs["image_index"])
    result, numbers, counts = dict(inputs), [], []
    owners = zip(old.owners(index), (old.images, old.videos), (MEDIA[:2], MEDIA[2:]), strict=True)
    for of, count, names in owners:
        kept = np.unique(of[of >= 0])
        number = np.zeros(count, np.int64)
        number[kept] = np.arange(len(kept))
        numbers.append(number)
        counts.append(len(kept))
        for name in names:
            if name in inputs and len(kept):
                result[name] = np.asarray(inputs[name])[kept]
            elif name in inputs:
                del result[name]
    new = FeatureTable(rows=rows, images=counts[0], tiles=old.tiles, videos=counts[1], frames=old.frames)
    result["image_index"] = old.renumbered(index, new, *numbers)
    return result


def token_keys(inputs: Mapping[str, Any], rows: int, length: int) -> list[Any]:
    """What tells the first tokens of a batch's only row apart: ids of text, and what images show.

    Args:
        inputs: input_ids [1, T] and, with images, what belongs to them.
        rows: P.
        length: how many tokens.
    """
    ids = np.asarray(inputs["input_ids"])[0, :length].tolist()
    if "image_index" not in inputs:
        return ids
    table = table_of(inputs, rows)
    index = np.asarray(inputs["image_index"])[0, :length]
    weights = np.asarray(inputs["image_weights"])[0, :length] if "image_weights" in inputs else index * 0
    images, videos = table.owners(index[:, 0])
    shown = [_digest(pixels) for name in MEDIA[:2] if name in inputs for pixels in np.asarray(inputs[name])]
    films = [_digest(pixels) for pixels in np.asarray(inputs.get("pixel_values_videos", ()))]
    keys: list[Any] = []
    for number, image, video, rows_of, shares in zip(ids, images, videos, index, weights, strict=True):
        if rows_of[0] < 0:
            keys.append(number)
            continue
        first, what = 0, "end of a row"
        if image >= 0:
            first, what = image * table.tiles * table.rows, shown[image]
        elif video >= 0:
            first, what = table.first_video + video * table.frames * table.rows, films[video]
        relative = () if what == "end of a row" else tuple((rows_of - first)[rows_of >= 0].tolist())
        keys.append((what, relative, tuple(shares.tolist())))
    return keys


def _digest(pixels: np.ndarray) -> str:
    """Of an image, however many tiles of zeros it is padded with."""
    if pixels.ndim > 3:
        real = np.flatnonzero(pixels.reshape(len(pixels), -1).any(axis=1))
        pixels = pixels[: real[-1] + 1 if real.size else 1]
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).hexdigest()


__all__ = ["lay_out", "rounded", "table_of", "token_keys", "used_only"]
