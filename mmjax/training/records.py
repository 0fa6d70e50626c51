"""Tables that a run leaves as CSV, exact to the bit after any interruption."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FIRST = ("stage", "step")


class Table:
    """A CSV file whose rows carry a stage and a step, appended as a run goes.

    A row that has a column of a new name widens the whole file. Reopening at a step drops the rows
    after it (and the columns only they had), so the file goes on as if nothing had happened.

    Args:
        path: the file.
        until: keep the rows up to this step; 0 starts anew.
    """

    def __init__(self, path: Path, until: int) -> None:
        self.path = path
        header, rows = _read(path) if until and path.exists() else (list(FIRST), [])
        kept = [row for row in rows if row["step"].isdecimal() and int(row["step"]) <= until]
        self._header = [name for name in header if name in FIRST or any(row[name] for row in kept)]
        self._rewrite(kept)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; numbers are written so that float32 values survive the round trip."""
        texts = [{name: _text(value) for name, value in row.items()} for row in rows]
        new = list(dict.fromkeys(name for row in texts for name in row if name not in self._header))
        if new:
            _, old = _read(self.path)
            self._header += new
            self._rewrite(old)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._format(texts))

    def flush_to_disk(self) -> None:
        """Return when the rows are on the disk."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def _rewrite(self, rows: Iterable[Mapping[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".writing")
        beside.write_text(_line(self._header) + self._format(rows), encoding="utf-8", newline="")
        os.replace(beside, self.path)

    def _format(self, rows: Iterable[Mapping[str, str]]) -> str:
        return "".join(_line([row.get(name, "") for name in self._header]) for row in rows)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    header = lines[0] if lines and lines[0][: len(FIRST)] == list(FIRST) else list(FIRST)
    # A line that was cut off by a kill has another length; its step is run again.
    return header, [dict(zip(header, line, strict=True)) for line in lines[1:] if len(line) == len(header)]


def _line(values: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _text(value: Any) -> str:
    return format(value, ".9g") if isinstance(value, float) else str(value)


class Recorder:
    """What a run writes down as it goes: metrics.csv, samples.csv when asked, TensorBoard events.

    Args:
        folder: output/<name>.
        step: the run goes on from here; later rows are dropped.
        log_samples: whether to keep samples.csv.
        process: of several processes the first keeps the metrics, which are the same in all; each keeps the
            numbers of its own samples, process 1 in samples.1.csv and so on.
    """

    def __init__(self, folder: Path, step: int, *, log_samples: bool, process: int = 0) -> None:
        self._metrics = Table(folder / "metrics.csv", step) if process == 0 else None
        samples = folder / (f"samples.{process}.csv" if process else "samples.csv")
        self._samples = Table(samples, step) if log_samples else None
        self._events: Any = None
        self._folder, self._step = folder, step
        self._rows: list[dict[str, Any]] = []
        self._ids: list[dict[str, Any]] = []
        self._window: list[dict[str, Any]] = []

    def add(self, stage: str, step: int, metrics: Mapping[str, Any], ids: Any) -> None:
        """One settled step; `step` counts over all stages."""
        values = {"loss": metrics["loss"], **metrics["terms"], "grad_norm": metrics["grad_norm"]}
        row = {name: float(value) for name, value in {**values, **metrics["rates"]}.items()}
        if self._metrics is not None:
            self._rows.append({"stage": stage, "step": step, **row})
            self._window.append(row)
        if self._samples is not None and ids is not None:
            self._ids.append({"stage": stage, "step": step, "ids": " ".join(str(number) for number in ids)})

    def publish(self, step: int, rate: float) -> None:
        """Write the rows out, and the mean since the last time as one TensorBoard point."""
        self._write()
        if self._metrics is None:
            return
        names = self._window[0] if self._window else ()
        means = {name: sum(row[name] for row in self._window) / len(self._window) for name in names}
        for name, value in {**means, "images_per_second": rate}.items():
            self._curves().add_scalar(name, value, step)
        self._window.clear()

    def flush_to_disk(self) -> None:
        """Return when every row is on the disk, so that no checkpoint is ahead of the records."""
        self._write()
        for table in (self._metrics, self._samples):
            if table is not None:
                table.flush_to_disk()

    def close(self) -> None:
        """Close the event file."""
        if self._events is not None:
            self._events.close()

    def _curves(self) -> Any:
        """TensorBoard's writer, imported when there is something to write."""
        if self._events is None:
            from tensorboardX import SummaryWriter

            # What an earlier process wrote after this step is run again, and hidden.
            purge = self._step + 1 if self._step else None
            self._events = SummaryWriter(str(self._folder), purge_step=purge, write_to_disk=True)
        return self._events

    def _write(self) -> None:
        if self._metrics is not None and self._rows:
            self._metrics.append(self._rows)
        if self._samples is not None and self._ids:
            self._samples.append(self._ids)
        self._rows.clear()
        self._ids.clear()
