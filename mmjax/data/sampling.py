"""From a place in an epoch to a model-ready sample: reading, replacing what is broken, augmenting.

Everything here is a pure function of (seed, epoch, place): threads, restarts and the number of processes
cannot change what a place holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data.faults import BadSample, FaultTally, cause_of
from mmjax.data.order import Order, hash_bits, uniforms
from mmjax.data.sources import Record, Source
from mmjax.errors import ConfigError, DataError
from mmjax.vision.images import open_image

_REPLACEMENTS_TRIED = 100


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Seeded changes to training images.

    Args:
        crop_scale: smallest and largest share of the image's area that a random crop keeps; None: no crop.
        crop_ratio: smallest and largest width to height of that crop.
        flip: mirror left and right for half of the samples.

    Source: random resized crop as in Szegedy et al. 2015 (arXiv 1409.4842), section 6, with open_clip's
    default scale of (0.9, 1.0). Deviation: the box has fractional corners, as Pillow's
    resize takes them.
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False


def crop_box(
    width: int, height: int, augmentation: Augmentation, *key: int | str
) -> tuple[float, float, float, float]:
    """The box of a random resized crop.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        augmentation: gives the ranges of area and of width to height.
        *key: chooses the box.

    Returns:
        (left, upper, right, lower) in pixels, inside the image. Where ten draws of area and ratio do not fit,
        the largest centred box whose ratio is in range.

    >>> crop_box(8, 8, Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)), 0)
    (0.0, 0.0, 8.0, 8.0)
    """
    assert augmentation.crop_scale is not None
    low, high = augmentation.crop_scale
    ratios = augmentation.crop_ratio
    for attempt in range(10):
        area, ratio, x, y = uniforms(4, *key, attempt)
        pixels = width * height * (low + (high - low) * area)
        ratio = math.exp(math.log(ratios[0]) + (math.log(ratios[1]) - math.log(ratios[0])) * ratio)
        w, h = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
        if w <= width and h <= height:
            left, upper = x * (width - w), y * (height - h)
            return left, upper, min(left + w, float(width)), min(upper + h, float(height))
    ratio = min(max(width / height, ratios[0]), ratios[1])
    w, h = min(width, height * ratio), min(height, width / ratio)
    left, upper = (width - w) / 2, (height - h) / 2
    return left, upper, min(left + w, float(width)), min(upper + h, float(height))


def augment(
    image: Image.Image, augmentation: Augmentation, size: tuple[int, int], *key: int | str
) -> Image.Image:
    """An image with the seeded changes applied.

    Args:
        image: RGB.
        augmentation: which changes.
        size: (height, width) in pixels that a crop is resized to (bicubic).
        *key: chooses the changes.

    Returns:
        An RGB image; the same one when there is nothing to change.

    >>> augment(Image.new("RGB", (9, 7)), Augmentation(crop_scale=(0.5, 1.0)), (4, 6), 0).size
    (6, 4)
    """
    if augmentation.crop_scale is not None:
        box = crop_box(image.width, image.height, augmentation, *key, "crop")
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    if augmentation.flip and uniforms(1, *key, "flip")[0] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


@dataclass(frozen=True)
class Sample:
    """One model-ready sample and, where it stands in for a broken one, that one's cause and name."""

    id: int
    pixel_values: np.ndarray
    text: str | None
    label: int | None
    fault: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Reads samples of one source by place.

    Args:
        source: the raw records.
        to_pixels: RGB image -> float32 [H, W, C].
        pixel_size: (H, W) that `to_pixels` gives.
        seed: any integer.
        needs_text: a sample without caption is broken.
        augmentation: changes to images.
        first_id: added to the sample numbers (sources of a mixture are numbered one after the other).
    """

    source: Source
    to_pixels: Callable[[Image.Image], np.ndarray]
    pixel_size: tuple[int, int]
    seed: int
    needs_text: bool
    augmentation: Augmentation
    first_id: int = 0
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        sizes, window = tuple(self.source.shard_sizes), self.source.window
        object.__setattr__(self, "order", Order(sizes, window, self.seed))

    def at(self, position: int) -> Sample:
        """The sample at a position of the endless sequence of epochs.

        Args:
            position: 0 or more; position // len(source) is the epoch.

        Returns:
            The sample there or, where that one is broken, its replacement: the first good one among samples
            drawn from the whole epoch by a hash of (seed, epoch, place). A draw from afar seldom puts the
            same sample into a batch twice, which the neighbour in order nearly always would.

        Raises:
            DataError: when none of 100 replacements is good.
        """
        count = len(self.source)
        epoch, place = divmod(position, count)
        tally = FaultTally()
        fault: tuple[str, str] | None = None
        for attempt in range(_REPLACEMENTS_TRIED + 1):
            if attempt:
                place = hash_bits(self.seed, "replace", epoch, position % count, attempt) % count
            index = self.order.sample(epoch, place)
            try:
                return self._read(index, epoch, fault)
            except (DataError, OSError) as error:
                broken = (cause_of(error), str(getattr(error, "name", None) or f"sample {index}"))
            fault = fault or broken
            tally.add(1, [broken])
        raise DataError(f"no usable sample could be found: {tally.summary()}")

    def _read(self, index: int, epoch: int, fault: tuple[str, str] | None) -> Sample:
        record = self.source[index]
        text = None
        if self.needs_text:
            texts = usable_texts(record)
            text = texts[hash_bits(self.seed, "caption", epoch, index) % len(texts)]
        image = augment(decode(record), self.augmentation, self.pixel_size, self.seed, epoch, index)
        try:
            pixels = self.to_pixels(image)
        except DataError as error:
            raise BadSample(cause_of(error), record["name"]) from error
        if pixels.shape[:2] != self.pixel_size:
            got = f"{pixels.shape[:2]} of {record['name']}, {self.pixel_size} of a square"
            raise ConfigError(
                f"the image processor makes pictures of different sizes ({got}): "
                "a batch needs one, so set do_center_crop or a size with height and width"
            )
        return Sample(self.first_id + index, pixels, text, record["label"], fault)


def usable_texts(record: Record) -> tuple[str, ...]:
    """The captions of a record that hold more than white space.

    Raises:
        BadSample: "no_caption" when there is none, "bad_record" for bytes that were not UTF-8.

    >>> usable_texts(Record(image=b"", texts=(" ", "a cat"), label=None, name="1"))
    ('a cat',)
    """
    texts = tuple(text for text in record["texts"] if text.strip())
    if not texts:
        raise BadSample("no_caption", record["name"])
    if any("\ud800" <= c <= "\udfff" for text in texts if not text.isascii() for c in text):
        raise BadSample("bad_record", record["name"], "its caption is not UTF-8")
    return texts


def decode(record: Record) -> Image.Image:
    """The record's image as RGB, upright (EXIF orientation applied).

    Raises:
        BadSample: with the cause that the decoder gave.

    >>> decode(Record(image=np.zeros((3, 4), np.uint8), texts=(), label=None, name="1")).size
    (4, 3)
    """
    try:
        return open_image(record["image"], exif=True)
    except (DataError, OSError) as error:
        raise BadSample(cause_of(error), record["name"]) from error


def pixels_of(image_processor: Any) -> Callable[[Image.Image], np.ndarray]:
    """A function from one image to its pixel values.

    Args:
        image_processor: called with a list of images, returns {"pixel_values": [B, H, W, C]}.

    Returns:
        RGB image -> float32 [H, W, C].

    >>> halve = lambda images: {"pixel_values": [np.asarray(image) / 2 for image in images]}
    >>> pixels_of(halve)(Image.new("RGB", (4, 3))).shape
    (3, 4, 3)
    """

    def to_pixels(image: Image.Image) -> np.ndarray:
        return np.asarray(image_processor([image])["pixel_values"][0], np.float32)

    return to_pixels
