"""Signals at the very moments when something has been opened and is not yet, or no longer, looked after."""

from __future__ import annotations

import fcntl
import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmjax.training import Outcome, apply_overrides, train
from mmjax.training import folders as folders_module
from mmjax.training.folders import RunFolders
from mmjax.training.interrupts import Interrupted, Interrupts
from mmjax.training.records import Recorder
from tests.training.toy import ToyBatches, toy_experiment


def signalling(do: Callable[..., Any], *, before: bool = False) -> Callable[..., Any]:
    """`do`, with a signal that this process gets right before or after it, at the first call only."""
    left = [signal.SIGTERM]

    def doing(*args: Any, **kwargs: Any) -> Any:
        if before and left:
            os.kill(os.getpid(), left.pop())
        done = do(*args, **kwargs)
        if left:
            os.kill(os.getpid(), left.pop())
        return done

    return doing


def short(workdir: Path) -> Outcome:
    return train(apply_overrides(toy_experiment(), ["train.steps=1"]), workdir=workdir)


class _Signalling(type(Path())):  # type: ignore[misc]
    """A path in whose `open` the signal comes, so that the file is not even returned."""

    def open(self, *args: Any, **kwargs: Any) -> Any:
        return signalling(super().open)(*args, **kwargs)


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every lock file that is opened; what is held here cannot be closed by being forgotten."""
    opened: list[Any] = []
    io_open = io.open

    def opening(file: Any, *args: Any, **kwargs: Any) -> Any:
        made = io_open(file, *args, **kwargs)
        if str(file).endswith(".lock"):
            opened.append(made)
        return made

    monkeypatch.setattr(io, "open", opening)
    return opened


@pytest.mark.parametrize("moment", ["opened", "locked", "claimed", "released"])
def test_a_signal_around_the_claim_leaves_no_lock(
    locks: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    lock_path = RunFolders._lock_path
    with monkeypatch.context() as patch:
        if moment == "opened":
            patch.setattr(RunFolders, "_lock_path", lambda self: _Signalling(lock_path(self)))
        elif moment == "locked":
            patch.setattr(fcntl, "flock", signalling(fcntl.flock))
        elif moment == "claimed":
            patch.setattr(RunFolders, "claim", signalling(RunFolders.claim))
        else:
            patch.setattr(RunFolders, "release", signalling(RunFolders.release, before=True))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            short(tmp_path)
    assert caught.value.exit_code == 143
    assert [lock.closed for lock in locks] == [True]
    assert signal.getsignal(signal.SIGTERM) is before
    # Also the same process can go on, while the traceback above still holds every frame.
    claimed = folders_module.RunFolders(tmp_path, "toy")
    claimed.claim(resume=True, overwrite=False)
    claimed.release()


@pytest.mark.parametrize("moment", ["records", "batches", "closing"])
def test_what_a_run_has_opened_is_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    opened, closed = [], []

    def follow(kind: type, **doing: bool) -> None:
        start, close = kind.__init__, kind.close  # type: ignore[misc, attr-defined]

        def starting(self: Any, *args: Any, **kwargs: Any) -> None:
            start(self, *args, **kwargs)
            opened.append(kind)

        def closing(self: Any) -> None:
            closed.append(kind)
            close(self)

        late, early = doing.get("opening"), doing.get("closing")
        monkeypatch.setattr(kind, "__init__", signalling(starting) if late else starting)
        monkeypatch.setattr(kind, "close", signalling(closing, before=True) if early else closing)

    follow(Recorder, opening=moment == "records")
    follow(ToyBatches, opening=moment == "batches", closing=moment == "closing")
    with pytest.raises(Interrupted):
        short(tmp_path)
    assert opened
    assert closed == opened[::-1]


@pytest.mark.parametrize("where", ["check", "raising", "polite", "end"])
def test_a_held_signal_is_raised_where_nothing_is_half_done(where: str) -> None:
    reached = []
    with pytest.raises(Interrupted) as caught, Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("held")
        if where == "check":
            interrupts.check()
        elif where != "end":
            with getattr(interrupts, where)():
                reached.append("inside")
        if where != "end":
            reached.append("after")
    assert (reached, caught.value.exit_code) == (["held"], 130)


def test_long_work_is_left_at_once() -> None:
    reached = []
    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.raising():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after")
    assert reached == []


def test_steps_are_asked_and_not_told_twice() -> None:
    told: list[int] = []
    with Interrupts(told.append) as interrupts:
        with interrupts.polite():
            os.kill(os.getpid(), signal.SIGTERM)
        with interrupts.raising():
            assert interrupts.requested == signal.SIGTERM
    assert told == [signal.SIGTERM]


def test_a_signal_inside_the_garbage_collector_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever such a callback raises is printed and forgotten."""
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    reached = []

    def callback(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and not reached:
            reached.append("collecting")
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted), Interrupts() as interrupts:
        with interrupts.raising():
            gc.callbacks.append(callback)
            gc.collect()
            gc.callbacks.remove(callback)
            reached.append("collected")
        reached.append("after")
    assert (reached, complaints) == (["collecting", "collected"], [])
