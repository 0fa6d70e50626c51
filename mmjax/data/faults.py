"""What can be wrong with a sample, how it is counted, and when a run has to stop.

A broken sample never crashes a pipeline: it is counted under one cause of `FAULTS` and replaced by another
sample of the same source (see `mmjax.data.sampling`). The share of replaced samples is what stops a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmjax.errors import DataError

FAULTS: tuple[str, ...] = (
    "truncated",  # the data ends too early: a cut image, a cut tar member
    "corrupt",  # an image whose data is damaged otherwise
    "empty",  # no bytes, or an image without pixels
    "not_an_image",  # no image format is recognised
    "too_large",  # more pixels or bytes than allowed: refused before decoding
    "unreadable",  # the file cannot be read, or is not a regular file
    "missing_file",  # the named file does not exist
    "unsafe_path",  # the name would leave the data folder
    "no_image",  # a caption without its image, a conversation with more places for images than images
    "no_caption",  # an image without its caption
    "bad_record",  # a row or a JSON member that cannot be understood
    "duplicate_key",  # a second sample under the same key
    "unplaced_image",  # a conversation with more images than places for them
)
"""Causes, in the order of the batch's `faults` counts."""

_HINTS = {
    "unsafe_path": "image names must be relative and stay inside the data folder (set root to it)",
    "missing_file": "image names are relative to the table's folder unless root says otherwise",
    "too_large": "the size claimed is above the safety limit",
    "unplaced_image": "each image needs one <image> in what is said",
}
_NAMES_KEPT = 3
_FLOOR = 1000


class BadSample(DataError):
    """One sample that cannot be used.

    Args:
        cause: one of `FAULTS`.
        name: the sample's name, for messages.
        detail: more of the cause.
    """

    def __init__(self, cause: str, name: str, detail: str = "") -> None:
        super().__init__(f"{printable(name)}: {cause}" + (f" ({detail})" if detail else ""))
        self.cause = cause
        self.name = name
        self.detail = detail


def cause_of(error: BaseException) -> str:
    """The cause under which an error is counted.

    Args:
        error: what was raised while a sample was read or decoded.

    Returns:
        The error's own `cause` where it is in `FAULTS`, "missing_file" for a file that is not there, else
        "unreadable".

    >>> cause_of(FileNotFoundError()), cause_of(BadSample("no_caption", "a.jpg"))
    ('missing_file', 'no_caption')
    """
    cause = getattr(error, "cause", None)
    if cause in FAULTS:
        return str(cause)
    return "missing_file" if isinstance(error, FileNotFoundError) else "unreadable"


def fault_counts(causes: Iterable[str]) -> np.ndarray:
    """Counts by cause.

    Args:
        causes: names from `FAULTS`, one per broken sample.

    Returns:
        int32 [len(FAULTS)].

    >>> fault_counts(["truncated", "no_caption", "truncated"]).tolist()
    [2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    """
    counts = np.zeros(len(FAULTS), np.int32)
    for cause in causes:
        counts[FAULTS.index(cause)] += 1
    return counts


def printable(name: str, limit: int = 80) -> str:
    """A name from data, made safe for one line of a terminal.

    Args:
        name: any text.
        limit: longest result, in characters.

    Returns:
        The name with unprintable characters escaped and its middle left out where it is long.

    >>> printable("a\\nb.jpg")
    'a\\\\nb.jpg'
    """
    escaped = (c if c.isprintable() else repr(c)[1:-1] for c in name)
    text = "".join(escaped)
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


@dataclass
class FaultTally:
    """Running counts of broken samples.

    Args:
        floor: while fewer samples than this were seen, shares are taken of this many, so that one early
            broken sample does not stop a run. See `for_source`.
        seen: samples asked for so far.
        counts: broken ones by cause.
        examples: the first few of them, as (cause, name).
    """

    floor: int = _FLOOR
    seen: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def for_source(cls, samples: int) -> FaultTally:
        """A tally whose floor is one epoch, at most 1000 samples."""
        return cls(floor=min(_FLOOR, max(samples, 1)))

    @property
    def bad(self) -> int:
        """Number of samples that were replaced."""
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """Replaced samples per sample seen."""
        return self.bad / self.seen if self.seen else 0.0

    def add(self, seen: int, broken: Iterable[tuple[str, str]] = ()) -> None:
        """Count `seen` more samples, of which `broken` (cause, name) were replaced."""
        self.seen += seen
        for cause, name in broken:
            self.counts[cause] = self.counts.get(cause, 0) + 1
            if len(self.examples) < _NAMES_KEPT:
                self.examples.append((cause, name))

    def summary(self) -> str:
        """Counts by cause and example names, in one line.

        >>> FaultTally(seen=8, counts={"truncated": 1}, examples=[("truncated", "a.jpg")]).summary()
        '1 of 8 samples (12.5%) broken: truncated 1; for example a.jpg (truncated)'
        """
        parts = ", ".join(f"{cause} {self.counts[cause]}" for cause in FAULTS if self.counts.get(cause))
        names = ", ".join(f"{printable(name)} ({cause})" for cause, name in self.examples)
        head = f"{self.bad} of {self.seen} samples ({100 * self.share:.1f}%) broken"
        return head + (f": {parts}" if parts else "") + (f"; for example {names}" if names else "")

    def check(self, max_fault_share: float) -> None:
        """Stop when too many samples are broken.

        Args:
            max_fault_share: largest allowed share of broken samples, 0 to 1.

        Raises:
            DataError: with the counts by cause, three names and what may help, in one line.
        """
        if self.bad <= max_fault_share * max(self.seen, self.floor):
            return
        hint = next((f"; {_HINTS[c]}" for c, _ in self.examples if c in _HINTS), "")
        raise DataError(f"{self.summary()}; that is more than max_fault_share={max_fault_share:g}{hint}")

    def to_state(self) -> dict[str, Any]:
        """The counts as JSON-serialisable values."""
        examples = [list(pair) for pair in self.examples]
        return {"seen": self.seen, "counts": dict(self.counts), "examples": examples}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over counts from `to_state`."""
        self.seen = int(state["seen"])
        self.counts = {str(cause): int(count) for cause, count in state["counts"].items()}
        self.examples = [(str(cause), str(name)) for cause, name in state["examples"]]


def check_faults(counts: Any, seen: int, max_fault_share: float, *, samples: int = _FLOOR) -> None:
    """Stop when summed batch counts show too many broken samples (an iterator's tally also has names).

    Args:
        counts: int [len(FAULTS)], sums of the batches' `faults`.
        seen: number of samples in those batches.
        max_fault_share: largest allowed share, 0 to 1.
        samples: the source's samples per epoch.

    Raises:
        DataError: counts by cause in one line.

    >>> check_faults([0] * len(FAULTS), 64, 0.05)
    """
    tally = FaultTally.for_source(samples)
    tally.seen = int(seen)
    tally.counts = {cause: int(count) for cause, count in zip(FAULTS, counts, strict=True) if int(count)}
    tally.check(max_fault_share)
