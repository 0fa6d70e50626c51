"""Marks inside typed text that looks like a control token, and the cuts that they become after rendering.

Most tokenizers look for their tokens in the text as it is. Some change a text first (lower case, Unicode's
compatible forms, a mark for spaces) and look in what comes out: what they find is asked of them (`Reader`).
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from mmjax.errors import DataError


class Reader(Protocol):
    """A tokenizer that changes a text before it looks for tokens."""

    def changed(self, text: str) -> str:
        """The text that it looks into."""
        ...

    def find(self, text: str, inside: bool) -> Sequence[tuple[str, int, int]]:
        """Tokens that it finds, each with its first character and one past its last.

        Args:
            text: all of it, or a piece.
            inside: whether something stands before the piece.
        """
        ...


def mark(text: str, tokens: tuple[str, ...], sign: str, reader: Reader | None = None) -> str:
    """The text with a sign inside everything that looks like a token, and where half of one begins or ends.

    Half a token at an end could meet its other half, from the next text or from the template. White space
    beyond it does not count, as templates strip it. Whether a sign matters is seen after rendering.

    Args:
        text: that somebody typed.
        tokens: that must not come from it.
        sign: a character that is not in the text.
        reader: how tokens are looked for, if not in the text as it is.

    Raises:
        DataError: one character of the text is a token, and cannot be cut.

    >>> mark("a <s> b", ("<s>",), "|")
    'a <|s> b'
    """
    places: set[int] = set()
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    begins, ends = _halves(tokens)
    if text.endswith(begins, start, end):
        places.add(end)
    if text.startswith(ends, start, end):
        places.add(start)
    for token in tokens:
        place = text.find(token)
        while place >= 0:
            if len(token) == 1:
                raise DataError(f"messages: {token!r} is a control token of one character and cannot be text")
            places.add(place + 1)
            place = text.find(token, place + 1)
    if reader is not None and start < end:
        places |= _changed_places(text, start, end, tokens, reader)
    for place in sorted(places, reverse=True):
        text = text[:place] + sign + text[place:]
    return text


def split(marked: str, sign: str, tokens: Collection[str], reader: Reader | None = None) -> list[str]:
    """The text without signs, cut at those that lie inside something that looks like a token.

    Args:
        marked: a text with signs.
        sign: as `mark` put it there.
        tokens: all that there are.
        reader: as in `mark`.

    >>> split("|<s>a <|s> b", "|", ("<s>",))
    ['<s>a <', 's> b']
    """
    parts = marked.split(sign)
    if len(parts) == 1:
        return parts
    text = "".join(parts)
    marks: list[int] = []
    for part in parts[:-1]:
        marks.append((marks[-1] if marks else 0) + len(part))
    inside: set[int] = set()
    for token in tokens:
        place = text.find(token)
        while place >= 0:
            inside.update(range(place + 1, place + len(token)))
            place = text.find(token, place + 1)
    cuts = {place for place in marks if place in inside}
    if reader is not None:

        def first_mark(token: str, begin: int, end: int) -> int | None:
            # A token without a mark inside was written by the template.
            place = bisect.bisect_right(marks, begin)
            return marks[place] if place < len(marks) and marks[place] < end else None

        cuts |= _cuts(text, sorted(cuts), tokens, reader, first_mark)
    ordered = [0, *sorted(cuts), len(text)]
    return [text[begin:end] for begin, end in zip(ordered, ordered[1:], strict=False)]


@functools.lru_cache(maxsize=32)
def _halves(tokens: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How tokens can begin, and how they can end, without being whole."""
    cuts = [(token[:half], token[half:]) for token in tokens for half in range(1, len(token))]
    begins, ends = zip(*cuts, strict=True) if cuts else ((), ())
    return tuple(dict.fromkeys(begins)), tuple(dict.fromkeys(ends))


def _changed_places(text: str, start: int, end: int, tokens: tuple[str, ...], reader: Reader) -> set[int]:
    """Where to mark the text from start to end for what is a token, or half of one, once it is changed."""
    begins, ends = _halves(tuple(reader.changed(token) for token in tokens))
    body = text[start:end]
    alone = reader.changed(body)
    # What is put before every text is not there in the middle of one.
    within = reader.changed("x" + body).removeprefix(reader.changed("x"))
    places = {end} if alone.endswith(begins) else set()
    if alone.startswith(ends) or within.startswith(ends):
        places.add(start)

    def first_inside(token: str, begin: int, end: int) -> int:
        # White space may belong to what is found, and may be stripped by the template.
        core = text[begin:end].strip()
        if len(core) < 2:
            raise DataError(f"messages: {core!r} is read as the control token {token!r} and cannot be text")
        return text.index(core, begin) + 1

    return places | _cuts(text, [], tokens, reader, first_inside)


def _cuts(
    text: str,
    made: Sequence[int],
    tokens: Collection[str],
    reader: Reader,
    choose: Callable[[str, int, int], int | None],
) -> set[int]:
    """More cuts, until the reader finds no token that can be cut in any piece.

    Args:
        made: cuts that are made already, in order.
        choose: where to cut a token that stands from one place to another; None: nowhere.
    """
    wanted, cuts = frozenset(tokens), set()
    pieces = list(itertools.pairwise([0, *made, len(text)]))
    while pieces:
        begin, end = pieces.pop()
        found = reader.find(text[begin:end], begin > 0)
        places = [choose(token, begin + a, begin + b) for token, a, b in found if token in wanted]
        new = [place for place in places if place is not None]
        if new:
            # Another token may come to light where a longer one, or one before it, was found.
            cuts.update(new)
            pieces += itertools.pairwise([begin, *new, end])
    return cuts
