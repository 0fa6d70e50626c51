"""Small scenes of which everything is known: shapes, handwritten digits and words, in colours and places.

A scene is a function of (seed, split, number) and is drawn when it is asked for, so there are as many as one
likes and nothing is stored. Some pairs of a colour and a name are held out: no training scene shows or
mentions them, and every test scene has at least one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmjax.data.config import Split, check_split
from mmjax.data.digits import DIGIT_NAMES
from mmjax.data.order import hash_bits
from mmjax.data.scenes_draw import COLORS, SHAPES, WORDS, Box, mask_of, scan_numbers
from mmjax.errors import ConfigError

Sort = Literal["shape", "digit", "word"]
Size = Literal["small", "large"]
SIZES: tuple[Size, ...] = ("small", "large")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
NAMES: dict[Sort, tuple[str, ...]] = {"shape": SHAPES, "digit": DIGIT_NAMES, "word": WORDS}
MOST_SHAPES = 4
GRID = 3
# Steps through the colours that are prime to their number, so that a held-out colour is met about as often.
_STRIDES: dict[Sort, tuple[int, int]] = {"shape": (3, 1), "digit": (5, 2), "word": (3, 4)}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing in a scene.

    Attributes:
        sort: what kind of thing it is.
        name: of the shape, the digit in words, or the word itself.
        color: its colour's name.
        size: of a shape; None for others.
        row, column, columns: its cells: row, first column and how many of the 3 x 3.
        box: left, top, right, bottom in pixels, the last two exclusive; nothing is drawn outside it.
        scan: number of the digit's scan in its split, else None.
        rgb: the colour as drawn, 0 to 255.
    """

    sort: Sort
    name: str
    color: str
    size: Size | None
    row: int
    column: int
    columns: int
    box: Box
    scan: int | None
    rgb: tuple[int, int, int]

    @property
    def place(self) -> str:
        """Where it stands, such as "top left"; a word, two cells wide, is left or right."""
        return PLACES[self.row][2 * self.column if self.columns == 2 else self.column]

    @property
    def held_out(self) -> bool:
        """Whether colour and name are met together in the test split only."""
        return is_held_out(self.sort, self.name, self.color)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A scene as data.

    Attributes:
        number, split, seed: what it was made from.
        image_size: height and width in pixels.
        background: its colour, 0 to 255.
        things: in reading order.
        counted: a shape of which there may be none, one or several.
    """

    number: int
    split: Split
    seed: int
    image_size: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]
    counted: str

    @property
    def shapes(self) -> tuple[Thing, ...]:
        """The shapes among the things."""
        return tuple(thing for thing in self.things if thing.sort == "shape")

    def only(self, sort: Sort) -> Thing | None:
        """The one thing of a sort, None if there is no such thing or if there are several."""
        found = [thing for thing in self.things if thing.sort == sort]
        return found[0] if len(found) == 1 else None

    def draw(self) -> Image.Image:
        """The picture, RGB."""
        size = self.image_size
        image = Image.new("RGB", (size, size), self.background)
        for thing in self.things:
            mask = mask_of(thing.sort, thing.name, thing.size, thing.scan, self.split, size // GRID)
            image.paste(thing.rgb, thing.box, mask)
        return image


class Dice:
    """Random choices for a key, the same on every machine.

    >>> Dice("a", 1).below(10) == Dice("a", 1).below(10)
    True
    """

    def __init__(self, *key: int | str) -> None:
        generator = np.random.Generator(np.random.Philox(hash_bits(*key)))
        self._next = iter(generator.random(256).tolist()).__next__

    def chance(self, share: float) -> bool:
        """True with a probability."""
        return self._next() < share

    def below(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(self._next() * count)

    def pick(self, options: Sequence[Any]) -> Any:
        """One of some options."""
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[Any]) -> list[Any]:
        """All of some options in a new order."""
        left = list(options)
        for last in range(len(left) - 1, 0, -1):
            other = self.below(last + 1)
            left[last], left[other] = left[other], left[last]
        return left


def is_held_out(sort: Sort, name: str, color: str) -> bool:
    """Whether a name and a colour are met together in the test split only: one colour of every name.

    >>> [color for color in COLORS if is_held_out("shape", "circle", color)]
    ['orange']
    """
    stride, first = _STRIDES[sort]
    return COLOR_NAMES.index(color) == (NAMES[sort].index(name) * stride + first) % len(COLOR_NAMES)


def make_scene(number: int, split: Split = "train", *, seed: int = 0, image_size: int = 48) -> Scene:
    """One scene.

    One to four shapes, of which up to three may be alike; in half of the scenes a handwritten digit, in half
    a word. Every thing has cells of a 3 x 3 grid for itself and a place within them that is drawn.

    Args:
        number: 0 or more.
        split: "train" never has a held-out pair of name and colour, "test" always has; no digit's scan is
            in both (see `DigitsData`).
        seed: gives other scenes.
        image_size: height and width in pixels, a multiple of 3 and at least 36.

    Raises:
        ConfigError: an image size that cannot be.

    >>> scene = make_scene(5)
    >>> scene.things[0].name, scene.things[0].place, scene.draw().size
    ('star', 'top left', (48, 48))
    """
    check_split(split)
    if image_size % GRID or image_size < 36:
        raise ConfigError(f"image_size={image_size} has to be a multiple of 3 and at least 36")
    dice = Dice(seed, "scene", split, number)
    wanted, counted = _names(dice)
    colors = _colors(wanted, split, dice)
    cells = _cells([sort for sort, _ in wanted], dice)
    things = [
        _thing(sort, name, color, cell, split, image_size // GRID, dice)
        for (sort, name), color, cell in zip(wanted, colors, cells, strict=True)
    ]
    return Scene(
        number=number,
        split=split,
        seed=seed,
        image_size=image_size,
        background=(dice.below(56), dice.below(56), dice.below(56)),
        things=tuple(sorted(things, key=lambda thing: (thing.row, thing.column))),
        counted=counted,
    )


def _names(dice: Dice) -> tuple[list[tuple[Sort, str]], str]:
    """What is in a scene, and which shape there is a number of."""
    shapes = 1 + dice.below(MOST_SHAPES)
    alike = dice.below(min(shapes, MOST_SHAPES - 1) + 1)
    first, *others = dice.shuffled(SHAPES)
    names: list[tuple[Sort, str]] = [("shape", first)] * alike
    names += [("shape", other) for other in others[: shapes - alike]]
    for sort in ("digit", "word"):
        if dice.chance(0.5):
            names.append((sort, dice.pick(NAMES[sort])))
    return names, first


def _colors(names: list[tuple[Sort, str]], split: Split, dice: Dice) -> list[str]:
    """A colour for each: in training never the held-out one, in testing at least once."""
    special = dice.below(len(names)) if split == "test" else -1
    colors = []
    for number, (sort, name) in enumerate(names):
        seen, unseen = _SEEN[sort, name]
        free = number != special and split == "test" and dice.chance(1 / len(COLOR_NAMES))
        colors.append(unseen if number == special or free else dice.pick(seen))
    return colors


def _cells(sorts: list[Sort], dice: Dice) -> list[tuple[int, int, int]]:
    """(row, first column, columns) for each, no cell twice."""
    free = {(row, column) for row in range(GRID) for column in range(GRID)}
    cells: list[tuple[int, int, int]] = []
    # The widest first, while two neighbouring cells are free.
    for sort in sorted(sorts, key=lambda sort: sort != "word"):
        if sort == "word":
            row, column, columns = dice.below(GRID), dice.below(GRID - 1), 2
        else:
            row, column = dice.pick(sorted(free))
            columns = 1
        free -= {(row, column + k) for k in range(columns)}
        cells.append((row, column, columns))
    return cells[1:] + cells[:1] if "word" in sorts else cells


def _thing(
    sort: Sort, name: str, color: str, cell: tuple[int, int, int], split: Split, pixels: int, dice: Dice
) -> Thing:
    """A thing somewhere within its cells."""
    size = dice.pick(SIZES) if sort == "shape" else None
    scan = dice.pick(scan_numbers(split)[name]) if sort == "digit" else None
    width, height = mask_of(sort, name, size, scan, split, pixels).size
    row, column, columns = cell
    left = column * pixels + _near_middle(columns * pixels - width, pixels // 4, dice)
    top = row * pixels + _near_middle(pixels - height, pixels // 4, dice)
    red, green, blue = (min(255, max(0, value + dice.below(31) - 15)) for value in COLORS[color])
    return Thing(
        sort=sort,
        name=name,
        color=color,
        size=size,
        row=row,
        column=column,
        columns=columns,
        box=(left, top, left + width, top + height),
        scan=scan,
        rgb=(red, green, blue),
    )


def _near_middle(room: int, most: int, dice: Dice) -> int:
    """Where in some room to begin: its middle, give or take half of `most`."""
    play = min(room, most)
    return (room - play) // 2 + dice.below(play + 1)


COLOR_NAMES = tuple(COLORS)
_SEEN = {
    (sort, name): (
        tuple(color for color in COLOR_NAMES if not is_held_out(sort, name, color)),
        next(color for color in COLOR_NAMES if is_held_out(sort, name, color)),
    )
    for sort, names in NAMES.items()
    for name in names
}
