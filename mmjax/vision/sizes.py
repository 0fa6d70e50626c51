"""Target sizes of images, in all the forms that preprocessor_config.json has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A target size in pixels: exact, by the shortest edge (with a bound for the longest), or to fit inside.

    Example:
        >>> Size(shortest_edge=224).to_dict()
        {'shortest_edge': 224}
    """

    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    max_height: int | None = None
    max_width: int | None = None

    def to_dict(self) -> dict[str, int]:
        """The given keys, as preprocessor_config.json has them."""
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in pairs if value is not None}

    def resolve(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a [height, width] image after resizing, rounded as the reference rounds.

        Example:
            >>> Size(shortest_edge=224).resolve(480, 641)
            (224, 299)
        """
        if self.height and self.width:
            return self.height, self.width
        if self.max_height and self.max_width:
            scale = min(self.max_height / height, self.max_width / width)
            return int(height * scale), int(width * scale)
        if not self.shortest_edge:
            raise ConfigError(f"size: cannot resize by {self.to_dict()}")
        if self.longest_edge:
            return _between_edges(height, width, self.shortest_edge, self.longest_edge)
        longest = int(self.shortest_edge * max(height, width) / min(height, width))
        return (longest, self.shortest_edge) if width <= height else (self.shortest_edge, longest)


def _between_edges(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Size whose shorter edge is `shortest`, or less where the longer would exceed `longest`."""
    exact: float = shortest
    if max(height, width) / min(height, width) * shortest > longest:
        exact = longest * float(min(height, width)) / max(height, width)
        shortest = round(exact)
    if min(height, width) == shortest:
        return height, width
    if width < height:
        return int(exact * height / width), shortest
    return shortest, int(exact * width / height)


def size_of(name: str, value: Any, square: bool) -> Size | None:
    """A size from a number, a pair or an object.

    Args:
        name: for messages.
        value: what a file or a caller says.
        square: whether a number means both edges, else the shortest.

    >>> size_of("size", 8, True)
    Size(height=8, width=8, shortest_edge=None, longest_edge=None, max_height=None, max_width=None)
    """
    if value is None or isinstance(value, Size):
        size = value
    elif isinstance(value, int) and not isinstance(value, bool):
        size = Size(height=value, width=value) if square else Size(shortest_edge=value)
    elif isinstance(value, list | tuple) and len(value) == 2:
        size = Size(height=value[0], width=value[1])
    elif isinstance(value, Mapping) and set(value) <= {field.name for field in dataclasses.fields(Size)}:
        size = Size(**value)
    else:
        keys = ", ".join(field.name for field in dataclasses.fields(Size))
        raise ConfigError(f"{name}: expected a number of pixels or an object of {keys}, got {value!r}")
    for key, pixels in size.to_dict().items() if size else ():
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1:
            raise ConfigError(f"{name}: {key} must be a whole number of pixels above 0, got {pixels!r}")
    return size


__all__ = ["Size", "size_of"]
