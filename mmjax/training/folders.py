"""The folders of a run, and who may write in them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from mmjax.errors import TrainingError

# How long a file system may take to show one machine what another wrote.
_SHARED_SECONDS = 15.0


class RunFolders:
    """Where one run keeps what it leaves.

    Args:
        workdir: holds checkpoints/, models/ and output/.
        name: the run's name.

    Attributes:
        checkpoints: checkpoints/<name>.
        model: models/<name>, the final weights.
        output: output/<name>, with result.json, metrics.csv and preview.png.
    """

    def __init__(self, workdir: Path, name: str) -> None:
        self.workdir = Path(workdir)
        self.name = name
        self.checkpoints = self.workdir / "checkpoints" / name
        self.model = self.workdir / "models" / name
        self.output = self.workdir / "output" / name
        self._lock: IO[str] | None = None

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Take the folders for this process, until `release` or the process's end.

        Raises:
            TrainingError: another process has them, or they hold a run and neither flag is given.
        """
        if resume and overwrite:
            raise TrainingError("--resume and --overwrite contradict each other: pass one of them")
        # Without these nothing was kept that a new start could lose: a typo in the first try is no run.
        signs = (self.checkpoints, self.model, self.output / "result.json")
        used = [path for path in signs if path.exists()]
        if used and not resume and not overwrite:
            raise TrainingError(
                f"{used[0]} already holds a run; pass --resume to go on with it or --overwrite to delete it"
            )
        try:
            self.checkpoints.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_path().open("w")
        except OSError as error:
            raise TrainingError(f"cannot write in {self.workdir}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise TrainingError(f"another process is training {self.name!r} in {self.workdir}") from None
        if overwrite:
            for folder in (self.checkpoints, self.model, self.output):
                shutil.rmtree(folder, ignore_errors=True)

    def mark(self) -> str:
        """Write a word of its own into the lock file, by which another process sees that it is the same."""
        assert self._lock is not None
        word = secrets.token_hex(8)
        self._lock.write(word)
        self._lock.flush()
        os.fsync(self._lock.fileno())
        return word

    def check_mark(self, word: str) -> None:
        """Look for what `mark` wrote, from another process of the run.

        Raises:
            TrainingError: this process sees another folder.
        """
        path = self._lock_path()
        end = time.monotonic() + _SHARED_SECONDS
        while time.monotonic() < end:
            # A network file system may show it a little later.
            with contextlib.suppress(OSError):
                if path.read_text("utf-8") == word:
                    return
            time.sleep(0.1)
        raise TrainingError(
            f"{path} of process 0 is not seen here: --workdir has to be a folder that all processes share"
        )

    def release(self) -> None:
        """Let another process have the folders."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _lock_path(self) -> Path:
        return self.checkpoints.parent / f".{self.name}.lock"

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write output/<name>/result.json, whole or not at all."""
        beside = self.output / "result.json.writing"
        text = json.dumps(result, indent=2, default=_plain)
        # A row of numbers is one line; a string cannot match, since none holds a line break.
        text = re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda row: " ".join(row[0].split()), text)
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self.output / "result.json")

    def export(self, write: Callable[[Path], None]) -> None:
        """Have `write` fill a folder that then becomes models/<name>, whole or not at all."""
        beside = self.model.with_name(f".{self.name}.writing")
        shutil.rmtree(beside, ignore_errors=True)
        beside.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        if beside.exists():
            if self.model.exists():
                shutil.rmtree(self.model)
            os.rename(beside, self.model)


def _plain(value: Any) -> Any:
    """numpy and jax scalars and arrays, for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"result.json cannot hold a {type(value).__name__}: {value!r}")
