"""What a run says while it goes: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

QUIET_SECONDS = 2.0
READING_SECONDS = 10.0


def make_progress(process: int = 0) -> PlainProgress | LiveProgress | SilentProgress:
    """The live kind on a terminal, the plain kind in a file or a pipe; of several processes one speaks."""
    if process:
        return SilentProgress()
    return LiveProgress() if sys.stdout.isatty() else PlainProgress()


class PlainProgress:
    """One line per report; a stage's first and last always, between them one every two seconds."""

    def __init__(self) -> None:
        self._stage = ""
        self._last = 0.0

    def say(self, text: str) -> None:
        """Print a line of its own."""
        print(text, flush=True)

    def report(
        self, stage: str, step: int, steps: int, loss: float, rate: float, seconds_left: float
    ) -> None:
        """Say where a stage is.

        Args:
            stage: its name.
            step: steps done.
            steps: steps in all.
            loss: mean since the last report.
            rate: images per second.
            seconds_left: to the end of the stage.
        """
        now = time.monotonic()
        if stage != self._stage or step >= steps or now - self._last >= QUIET_SECONDS:
            self._stage, self._last = stage, now
            figures = _figures(loss, rate, seconds_left)
            print(f"{stage}  {step:>{len(f'{steps:,}')},}/{steps:,}  {figures}", flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""


class SilentProgress:
    """Says nothing: another process of the run does."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def report(
        self, stage: str, step: int, steps: int, loss: float, rate: float, seconds_left: float
    ) -> None:
        """Say nothing; see `PlainProgress.report`."""

    def close(self) -> None:
        """Nothing to leave."""


class LiveProgress:
    """A bar that is redrawn in place."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._tasks: dict[str, Any] = {}
        self._bar.start()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def report(
        self, stage: str, step: int, steps: int, loss: float, rate: float, seconds_left: float
    ) -> None:
        """Redraw; see `PlainProgress.report`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=steps, figures="")
        self._bar.update(self._tasks[stage], completed=step, figures=_figures(loss, rate, seconds_left))

    def close(self) -> None:
        """Leave the bar as it stands; what is said from now on comes below it."""
        self._bar.stop()


class Reading:
    """A `mmjax.data.config.Progress` of work before the first step, said in a line every ten seconds.

    Args:
        say: prints a line.
        what: what is done, such as "reading data".

    >>> reading = Reading(print, "reading data")
    >>> reading(1, 8)  # said if it goes on
    """

    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self._say, self._what = say, what
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """So much is done; who does not know how much there is has `total` equal to `done`."""
        now = time.monotonic()
        if now - self._last >= READING_SECONDS:
            self._last = now
            self._say(f"{self._what}  {done:,}/{total:,}" if done < total else f"{self._what}  {done:,}")


class Meter:
    """Mean loss and speed between two readings; the first step, which compiles, has no speed.

    Args:
        batch_size: images per step.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._losses: list[float] = []
        self._mark: tuple[int, float] | None = None
        self._rate = 0.0

    def add(self, step: int, loss: float) -> None:
        """A step is done."""
        self._losses.append(loss)
        if self._mark is None:
            self._mark = (step, time.monotonic())

    def read(self, step: int, steps: int) -> tuple[float, float, float]:
        """Mean loss, images per second and seconds left (0 while unknown) since the last reading."""
        loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        now, (marked, since) = time.monotonic(), self._mark or (step, 0.0)
        if step > marked:
            self._rate = (step - marked) * self._batch_size / max(now - since, 1e-9)
            self._mark = (step, now)
        left = (steps - step) * self._batch_size / self._rate if self._rate else 0.0
        return loss, self._rate, left


def format_seconds(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> format_seconds(75.2), format_seconds(3723)
    ('1:15', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(loss: float, rate: float, seconds_left: float) -> str:
    speed = f"  {rate:,.0f} images/s  ETA {format_seconds(seconds_left)}" if rate else ""
    return f"loss {loss:.4f}{speed}"
