"""Tables that are cut back exactly, and event files that another reader understands."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from mmjax.training.events import EventWriter
from mmjax.training.outcome import read_metrics
from mmjax.training.records import Table


def rows(first: int, last: int, stage: str = "a", **more: float) -> list[dict[str, object]]:
    return [{"stage": stage, "step": step, "loss": step / 3, **more} for step in range(first, last + 1)]


def test_cutting_back_equals_never_having_gone_on(tmp_path: Path) -> None:
    ahead = Table(tmp_path / "ahead.csv", 0)
    ahead.append(rows(1, 5))
    ahead.append(rows(6, 9, "b", extra=0.5))
    back = Table(tmp_path / "ahead.csv", 3)
    straight = Table(tmp_path / "straight.csv", 0)
    straight.append(rows(1, 3))
    assert (tmp_path / "ahead.csv").read_bytes() == (tmp_path / "straight.csv").read_bytes()
    for table in (back, straight):
        table.append(rows(4, 5))
        table.append(rows(6, 9, "b", extra=0.5))
    assert (tmp_path / "ahead.csv").read_bytes() == (tmp_path / "straight.csv").read_bytes()


@pytest.mark.parametrize("cut", range(1, len("a,3,1\na,4,1.33333333\n") + 1))
def test_a_torn_end_is_dropped(tmp_path: Path, cut: int) -> None:
    """Steps 3 and 4 came after the checkpoint of step 2, which waited for its own rows."""
    path = tmp_path / "m.csv"
    Table(path, 0).append(rows(1, 4))
    path.write_bytes(path.read_bytes()[:-cut])
    Table(path, 2)
    straight = tmp_path / "straight.csv"
    Table(straight, 0).append(rows(1, 2))
    assert path.read_bytes() == straight.read_bytes()


def test_a_file_that_is_no_table_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("something else\n1\n")
    Table(path, 5).append(rows(6, 6))
    assert path.read_text() == "stage,step,loss\na,6,2\n"


def test_float32_values_survive_the_round_trip(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    Table(tmp_path / "m.csv", 0).append(
        [{"stage": "a, b", "step": step + 1, "loss": float(value)} for step, value in enumerate(values)]
    )
    found = read_metrics(tmp_path / "m.csv")
    np.testing.assert_array_equal(found["loss"].astype(np.float32), values)
    assert set(found["stage"]) == {"a, b"}
    np.testing.assert_array_equal(found["step"], np.arange(1, 201))


def test_columns_that_a_row_lacks_read_as_nan(tmp_path: Path) -> None:
    table = Table(tmp_path / "m.csv", 0)
    table.append(rows(1, 1))
    table.append(rows(2, 2, extra=0.5))
    np.testing.assert_array_equal(read_metrics(tmp_path / "m.csv")["extra"], [np.nan, 0.5])


def test_another_reader_understands_the_events(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path, 6)
    writer.scalars({"loss": 0.25, "learning_rate head/.*": 1e-3}, 7)
    writer.scalars({"loss": 0.125}, 300)
    writer.close()
    [path] = tmp_path.iterdir()
    events = [parse_event(frame) for frame in frames(path.read_bytes())]
    assert events[0] == {3: [b"brain.Event:2"]}
    assert events[1] == {2: [7], 7: [b"\x08\x01"]}
    assert [event[2] for event in events[2:]] == [[7], [300]]
    values = [parse(value) for value in parse(events[2][5][0])[1]]
    assert [value[1][0].decode() for value in values] == ["loss", "learning_rate head/.*"]
    np.testing.assert_allclose([value[2][0] for value in values], [0.25, 1e-3], rtol=1e-6)


def frames(data: bytes) -> list[bytes]:
    """Cut a tfrecord file, checking every checksum bit by bit."""
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked_crc(data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc(body)
        found.append(body)
        data = data[16 + length :]
    return found


def masked_crc(data: bytes) -> int:
    """CRC-32C by polynomial division, masked as tfrecord does."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_the_checksum_itself() -> None:
    """RFC 3720, section B.4: 32 bytes of zeros."""
    crc = 0x8A9136AA
    assert masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def parse_event(data: bytes) -> dict[int, list]:
    fields = parse(data)
    assert len(fields.pop(1)) == 1
    return fields


def parse(data: bytes) -> dict[int, list]:
    """A protobuf message as field number -> values."""
    fields: dict[int, list] = {}
    place = 0

    def varint() -> int:
        nonlocal place
        value, shift = 0, 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            value: object = varint()
        elif kind == 2:
            size = varint()
            value = data[place : place + size]
            place += size
        else:
            size, code = (8, "<d") if kind == 1 else (4, "<f")
            (value,) = struct.unpack(code, data[place : place + size])
            place += size
        fields.setdefault(tag >> 3, []).append(value)
    return fields
