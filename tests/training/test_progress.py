"""What is said on a terminal and in a pipe."""

from __future__ import annotations

import io

import pytest

from mmjax.training import progress as progress_module
from mmjax.training.progress import (
    LiveProgress,
    Meter,
    PlainProgress,
    Reading,
    format_seconds,
    make_progress,
)


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 3.0, 3.1, 3.2])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    progress = PlainProgress()
    for step, stage in [(10, "a"), (20, "a"), (30, "a"), (1000, "a"), (1, "b")]:
        progress.report(stage, step, 1000, 0.5, 1234.5 if step > 10 else 0.0, 61.0)
    progress.say("done")
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "a     10/1,000  loss 0.5000",
        "a     30/1,000  loss 0.5000  1,234 images/s  ETA 1:01",
        "a  1,000/1,000  loss 0.5000  1,234 images/s  ETA 1:01",
        "b      1/1,000  loss 0.5000",
        "done",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = make_progress()
    assert isinstance(progress, LiveProgress)
    progress.say("toy: [3, 4] parameters")
    progress.report("align", 5, 10, 0.25, 100.0, 5.0)
    progress.close()
    shown = screen.getvalue()
    assert "toy: [3, 4] parameters" in shown
    assert "5/10" in shown
    assert "loss 0.2500  100 images/s  ETA 0:05" in shown


def test_a_pipe_gets_lines() -> None:
    assert isinstance(make_progress(), PlainProgress)


def test_reading_is_said_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = iter([0.0, 9.0, 10.0, 19.0, 20.0, 31.0]), list[str]()
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    reading = Reading(said.append, "tune: reading data")
    for done, total in [(1, 9000), (2000, 9000), (3000, 9000), (4000, 4000), (9000, 9000)]:
        reading(done, total)
    assert said == [
        "tune: reading data  2,000/9,000",
        "tune: reading data  4,000",
        "tune: reading data  9,000",
    ]


def test_the_meter_leaves_out_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    meter = Meter(batch_size=8)
    meter.add(1, 4.0)
    assert meter.read(1, 11) == (4.0, 0.0, 0.0)
    for step in (2, 3):
        meter.add(step, float(step))
    now = 102.0
    assert meter.read(3, 11) == (2.5, 8.0, 8.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36000, "10:00:00")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
