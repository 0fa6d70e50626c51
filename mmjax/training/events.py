"""TensorBoard event files, written directly: the format is small, its packages take seconds to import."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_CRC_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8


class EventWriter:
    """Appends scalars to a new event file in a folder.

    Args:
        folder: made if it is missing.
        step: the step the run starts from; TensorBoard drops what an earlier file has after it.

    Source: TensorFlow's tfrecord framing and event.proto.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}.mmjax"
        self._file = (folder / name).open("wb")
        self._write(_text(3, "brain.Event:2"))
        # SessionLog with status START tells TensorBoard that later steps are about to be run again.
        self._write(_varint(2, step + 1) + _bytes(7, _varint(1, 1)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve."""
        items = (_text(1, name) + _float(2, value) for name, value in values.items())
        self._write(_varint(2, step) + _bytes(5, b"".join(_bytes(1, item) for item in items)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        event = _double(1, time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CRC_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE = _crc_table()


def _checksum(data: bytes) -> bytes:
    """Masked CRC-32C, as tfrecord frames carry it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)


def _tag(field: int, kind: int) -> bytes:
    return bytes([field << 3 | kind])


def _number(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _varint(field: int, value: int) -> bytes:
    return _tag(field, 0) + _number(value)


def _double(field: int, value: float) -> bytes:
    return _tag(field, 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _tag(field, 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _number(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())
