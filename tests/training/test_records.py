"""Tables that are cut back exactly, and TensorBoard points."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from mmjax.training.outcome import read_metrics
from mmjax.training.records import Recorder, Table


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


def test_tensorboard_points_and_what_a_resumed_run_hides(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    recorder = Recorder(tmp_path, 6, log_samples=False)
    metrics = {"loss": 0.25, "terms": {"itc": 0.25}, "grad_norm": 2.0, "rates": {"learning_rate": 1e-3}}
    recorder.add("a", 7, metrics, None)
    recorder.publish(7, 100.0)
    recorder.close()
    [path] = tmp_path.glob("events.out.tfevents*")
    events = [Event.FromString(frame) for frame in frames(path.read_bytes())]
    assert any(e.session_log.status == SessionLog.START and e.step == 7 for e in events)
    points = {v.tag: v.simple_value for e in events for v in e.summary.value if e.step == 7}
    assert points.keys() == {"loss", "itc", "grad_norm", "learning_rate", "images_per_second"}
    np.testing.assert_allclose(points["learning_rate"], 1e-3, rtol=1e-6)


def frames(data: bytes) -> list[bytes]:
    """The records of a tfrecord file: length, checksum, body, checksum."""
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(data[12 : 12 + length])
        data = data[16 + length :]
    return found
