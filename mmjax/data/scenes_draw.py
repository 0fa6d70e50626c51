"""How the things of a scene look: masks that are drawn once and pasted in a colour."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmjax.data.digits import DIGIT_NAMES, DigitsData
from mmjax.errors import ConfigError

Box = tuple[int, int, int, int]
Points = list[tuple[float, float]]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "orange": (240, 140, 25),
    "yellow": (245, 230, 50),
    "green": (45, 165, 55),
    "cyan": (70, 215, 225),
    "blue": (50, 80, 235),
    "purple": (165, 55, 205),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
WORDS = ("cat", "dog", "sun", "moon", "tree", "fish", "bird", "house", "lamp", "boat", "key", "milk")
_FINER = 8  # Shapes are drawn this much larger, and made smaller with soft edges.
# Shares of a cell's side: shapes leave room to move about, and a small one is clearly no large one.
_SIDES = {"small": 0.56, "large": 0.94}
_DIGIT_SIDE = 1.0


def mask_of(sort: str, name: str, size: str | None, scan: int | None, split: str, cell: int) -> Image.Image:
    """How much of its colour a thing leaves on each pixel.

    Args:
        sort: "shape", "digit" or "word".
        name: of the shape, or the word itself.
        size: "small" or "large", of a shape.
        scan: number of the digit's scan in its split.
        split: "train" or "test".
        cell: side of a cell in pixels; a word has two cells.

    Returns:
        An 8-bit grey image without empty rows or columns at its edges.

    >>> mask_of("shape", "square", "large", None, "train", 16).size
    (15, 15)
    """
    if sort == "shape":
        return _shape(name, max(3, round(_SIDES[size or "large"] * cell)))
    if sort == "digit":
        return _digit(split, scan or 0, round(_DIGIT_SIDE * cell))
    return _word(name, 2 * cell, cell)


@functools.cache
def scan_numbers(split: str) -> Mapping[str, tuple[int, ...]]:
    """The scans of each digit in a split, by the digit's name."""
    labels = [record["label"] for record in _scans(split)]
    return {name: tuple(np.flatnonzero(np.equal(labels, n)).tolist()) for n, name in enumerate(DIGIT_NAMES)}


@functools.cache
def _scans(split: str) -> Any:
    return DigitsData().source(split)  # type: ignore[arg-type]


@functools.cache
def _digit(split: str, scan: int, side: int) -> Image.Image:
    image = _scans(split)[scan]["image"].convert("L").resize((side, side), Image.Resampling.BICUBIC)
    return image.crop(image.getbbox())


@functools.cache
def _shape(name: str, side: int) -> Image.Image:
    fine = side * _FINER
    image = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(image)
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, fine - 1, fine - 1), fill=255)
        if name == "ring":
            draw.ellipse((fine * 0.27, fine * 0.27, fine * 0.73, fine * 0.73), fill=0)
    else:
        for part in _outlines(name):
            draw.polygon([(x * (fine - 1), y * (fine - 1)) for x, y in part], fill=255)
    image = image.resize((side, side), Image.Resampling.BOX)
    return image.crop(image.getbbox())


def _outlines(name: str) -> list[Points]:
    """Polygons that make up a shape within the unit square, y downwards."""
    if name == "star":
        angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
        radii = [0.54 if k % 2 == 0 else 0.22 for k in range(10)]
        star = [(0.5 + r * math.cos(a), 0.54 + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]
        return [star]
    if name == "heart":
        turns = [2 * math.pi * k / 60 for k in range(60)]
        across = [16 * math.sin(t) ** 3 for t in turns]
        up = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
        return [[(0.5 + x / 32, (12 - y) / 29) for x, y in zip(across, up, strict=True)]]
    return {
        "square": [[(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]],
        "triangle": [[(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]],
        "diamond": [[(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)]],
        "cross": [
            [(0.34, 0.0), (0.66, 0.0), (0.66, 1.0), (0.34, 1.0)],
            [(0.0, 0.34), (1.0, 0.34), (1.0, 0.66), (0.0, 0.66)],
        ],
    }[name]


@functools.cache
def _word(word: str, width: int, height: int) -> Image.Image:
    """A word in the largest size of the font that fits, the same size for all words."""
    left, top, right, bottom = _font(width, height).getbbox(word)
    image = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), word, fill=255, font=_font(width, height))
    return image.crop(image.getbbox())


@functools.cache
def _font(width: int, height: int) -> ImageFont.FreeTypeFont:
    """The size in which every word fits into a box.

    Raises:
        ConfigError: matplotlib, which carries the font, is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the scenes' words need matplotlib: pip install 'mmjax[experiments]'") from error
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    for points in range(height, 5, -1):
        font = ImageFont.truetype(str(path), points)
        boxes = [font.getbbox(word) for word in WORDS]
        if all(b[2] - b[0] <= width and b[3] - b[1] <= height for b in boxes):
            return font
    raise ConfigError(f"words do not fit into {width} x {height} pixels: take a larger image_size")
