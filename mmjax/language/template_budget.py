"""What one rendering of a chat template may cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MAX_VALUE = 1 << 23
MAX_STEPS = 5_000_000
MAX_CHARACTERS = 1 << 28
_MAX_BITS = 4096


class OverBudget(Exception):
    """A template did more than a conversation can need."""


@dataclasses.dataclass
class Budget:
    """What one rendering may still do."""

    steps: int = MAX_STEPS
    characters: int = MAX_CHARACTERS

    def step(self, steps: int = 1, characters: int = 0) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0 or self.characters < 0:
            raise OverBudget("it takes too many steps or writes too much text")

    def made(self, value: Any) -> Any:
        """Charge a value that was made, with all it holds, and refuse one that is too large."""
        if type(value) is str and len(value) <= MAX_VALUE:  # most are
            self.step(1, len(value))
            return value
        size = length = 0
        waiting = [value]
        while waiting:
            part = waiting.pop()
            size += 1
            if isinstance(part, str):
                length += len(part)
            elif isinstance(part, Mapping):
                waiting += [*part.keys(), *part.values()]
            elif isinstance(part, list | tuple | set | frozenset):
                waiting += part
            elif isinstance(part, int) and part.bit_length() > _MAX_BITS:
                raise OverBudget("a number in it grows too large")
            if length > MAX_VALUE or size + len(waiting) > MAX_VALUE:
                raise OverBudget("a value in it grows too large")
        self.step(size, length)
        return value
