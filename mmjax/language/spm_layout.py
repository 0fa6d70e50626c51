"""sentencepiece's model files, as far as a tokenizer needs them: fields of a protocol buffer, by number.

Read by hand since sentencepiece's own description of them asks for one version of protobuf, which other
packages may hold at another.

Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmjax.errors import CheckpointError

BYTE_PAIRS = 2
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


@dataclass(frozen=True)
class Piece:
    """A piece of text that a token stands for, with its score and what kind it is."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SpmModel:
    """A model.

    Attributes:
        pieces: by id.
        kind: 1 unigram, 2 byte pairs.
        byte_fallback: whether bytes of unknown characters are tokens.
        ids: of "unk", "bos", "eos" and "pad"; -1 for none.
        charsmap: compiled rules by which characters are replaced; empty for none.
        dummy_prefix, remove_spaces, escape_spaces: what happens to spaces.
    """

    pieces: tuple[Piece, ...]
    kind: int
    byte_fallback: bool
    ids: dict[str, int]
    charsmap: bytes
    dummy_prefix: bool
    remove_spaces: bool
    escape_spaces: bool


def read_spm(path: Path) -> SpmModel:
    """Read a model file.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    try:
        data = path.read_bytes()
        pieces, trained, normalized = [], {}, {}
        for number, value in _fields(data):
            if number == 1:
                found = dict(_fields(value))
                score = struct.unpack("<f", found[2])[0] if 2 in found else 0.0
                pieces.append(Piece(found[1].decode(), score, found.get(3, NORMAL)))
            elif number == 2:
                trained = dict(_fields(value))
            elif number == 3:
                normalized = dict(_fields(value))
        defaults = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
        made = SpmModel(
            pieces=tuple(pieces),
            kind=trained.get(3, 1),
            byte_fallback=bool(trained.get(35, 0)),
            ids={name: _signed(trained.get(number, value)) for name, (number, value) in defaults.items()},
            charsmap=bytes(normalized.get(2, b"")),
            dummy_prefix=bool(normalized.get(3, 1)),
            remove_spaces=bool(normalized.get(4, 1)),
            escape_spaces=bool(normalized.get(5, 1)),
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: not a sentencepiece model, or a damaged one") from error
    if not pieces:
        raise CheckpointError(f"{path}: not a sentencepiece model, or a damaged one: it has no pieces")
    if not 0 <= made.ids["unk"] < len(pieces):
        raise CheckpointError(f"{path}: damaged: its unknown piece {made.ids['unk']} is none of them")
    return made


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a message in their order: a number as an int, all else as bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place + size > len(data):
            raise ValueError("a field beyond the end")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of too many bytes")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


__all__ = ["BYTE_PAIRS", "CONTROL", "NORMAL", "USER_DEFINED", "Piece", "SpmModel", "read_spm"]
