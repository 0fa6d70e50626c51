"""Rows of ids to arrays: which length, which side, what is cut and what is filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmjax.errors import ConfigError, DataError

_NO_LIMIT = 10**20  # the number that transformers writes for "no limit" lies above


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the arguments of a tokenizer's call lay rows out.

    Args:
        strategy: "longest", "max_length", or "" for no padding.
        cut: whether longer rows are cut.
        length: most tokens, None for no limit.
        multiple: widths are multiples of it; None or 0 for any.
        side: of the padding, "left" or "right".
        pad_id: what fills.
        reserved: special tokens that a cut row still has to hold.
    """

    strategy: str
    cut: bool
    length: int | None
    multiple: int | None
    side: str
    pad_id: int | None
    reserved: int = 0

    def __post_init__(self) -> None:
        if self.strategy == "max_length" and self.length is None:
            raise DataError("padding='max_length' needs max_length: the tokenizer's folder names none")
        if self.strategy and self.pad_id is None:
            raise DataError("the tokenizer has no pad_token to pad with: name one in tokenizer_config.json")
        if self.limit is not None and self.limit < max(self.reserved, 1):
            raise DataError(f"max_length {self.limit} leaves no room for the {self.reserved} special tokens")
        if self.limit is not None and self.strategy and self.multiple and self.limit % self.multiple:
            raise DataError(
                f"max_length {self.length} is not a multiple of pad_to_multiple_of {self.multiple}"
            )

    @classmethod
    def of(
        cls,
        padding: bool | str,
        truncation: bool | None,
        max_length: int | None,
        own: int | None,
        **rest: Any,
    ) -> Layout:
        """The layout that transformers' arguments ask for; `own` is the tokenizer's longest text."""
        if padding not in (False, True, "longest", "max_length", "do_not_pad"):
            raise DataError(f"padding: expected True, False, 'longest' or 'max_length', got {padding!r}")
        if truncation not in (None, False, True):
            raise DataError(f"truncation: expected True or False, got {truncation!r}")
        strategy = {True: "longest", False: "", "do_not_pad": ""}.get(padding, str(padding))
        cut = bool(truncation) or (truncation is None and max_length is not None and not strategy)
        return cls(strategy=strategy, cut=cut, length=own if max_length is None else max_length, **rest)

    @property
    def limit(self) -> int | None:
        """Tokens that a row is cut to, None if none is cut."""
        return self.length if self.cut else None

    def arrays(self, rows: Sequence[Sequence[int]], fill: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows as one array, and where it holds them.

        Args:
            rows: B rows of ids.
            fill: what fills, the pad token by default.

        Returns:
            int32 [B, T] each: the ids, and 1 where they are a row's own.

        Raises:
            DataError: rows of different length without padding, or too long ones that are not cut.
        """
        lengths = [len(row) for row in rows]
        width = self._width(lengths)
        ids = np.full((len(rows), width), (self.pad_id or 0) if fill is None else fill, np.int32)
        mask = np.zeros((len(rows), width), np.int32)
        for number, row in enumerate(rows):
            begin = 0 if self.side == "right" else width - len(row)
            ids[number, begin : begin + len(row)] = row
            mask[number, begin : begin + len(row)] = 1
        return ids, mask

    def _width(self, lengths: list[int]) -> int:
        longest = max(lengths)
        if not self.strategy and min(lengths) != longest:
            raise DataError(
                f"the texts have from {min(lengths)} to {longest} tokens: pass padding=True for one array"
            )
        width = self.length if self.strategy == "max_length" and self.length is not None else longest
        if self.strategy and self.multiple:
            width = -(-width // self.multiple) * self.multiple
        if longest > width and min(lengths) != longest:
            raise DataError(f"a text has {longest} tokens, more than {width}: pass truncation=True")
        return max(width, longest)


def side_of(value: Any, name: str) -> str:
    """ "left" or "right"; None means "right".

    >>> side_of(None, "padding_side")
    'right'
    """
    if value not in (None, "left", "right"):
        raise ConfigError(f"{name}: expected 'left' or 'right', got {value!r}")
    return value or "right"


def max_length_of(value: Any) -> int | None:
    """A folder's model_max_length; None where it names no limit.

    >>> max_length_of(77), max_length_of(10**30)
    (77, None)
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
        raise ConfigError(
            f"tokenizer_config.json: model_max_length must be a number of tokens, got {value!r}"
        )
    return None if value > _NO_LIMIT else int(value)


def checked_texts(texts: Any) -> list[str]:
    """One text or several as a list of texts.

    Raises:
        DataError: nothing, or something that is no text.
    """
    if not isinstance(texts, Iterable):
        raise DataError(f"text is a {type(texts).__name__}: pass a string or a list of strings")
    rows = [texts] if isinstance(texts, str) else list(texts)
    if not rows:
        raise DataError("no texts given: pass at least one")
    for i, text in enumerate(rows):
        if not isinstance(text, str):
            raise DataError(f"text {i} is a {type(text).__name__}: pass a string or a list of strings")
        check_characters(text, f"text {i}")
    return rows


def check_characters(text: str, name: str) -> None:
    """Refuse a text with something that is no character, as bytes that are not UTF-8 become.

    Raises:
        DataError: it has half a surrogate pair.
    """
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{name} has half a surrogate pair, which is no character: decode it as UTF-8 first")
