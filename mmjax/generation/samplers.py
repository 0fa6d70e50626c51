"""How the next token is chosen: frozen settings, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from mmjax.errors import ConfigError

# Logits are divided by some numbers: below this one, large logits become infinite in float32.
_LEAST = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a sampler a compiled program depends on; the numbers themselves are its inputs.

    Attributes:
        names: which of the numbers are given, by their names.
        random: whether tokens are drawn, rather than the likeliest taken.
    """

    names: tuple[str, ...] = ()
    random: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """The likeliest token.

    Attributes:
        repetition_penalty: what the logits of tokens in the text so far are divided (if positive) or
            multiplied by; None or 1: nothing (Keskar et al. 2019).

    >>> Greedy(repetition_penalty=1.2).plan()
    Plan(names=('repetition_penalty',), random=False)
    """

    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        _check(self, "repetition_penalty", 0.0, math.inf, "above 0")
        _check_divisor(self, "repetition_penalty")

    def plan(self) -> Plan:
        """What a program depends on."""
        return Plan(names=_given(self))

    def numbers(self) -> dict[str, np.ndarray]:
        """The numbers given."""
        return _numbers(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """A token drawn from the model's distribution, after it was changed in the order of the attributes.

    The order and the definitions are transformers'.

    Attributes:
        repetition_penalty: as in `Greedy`.
        temperature: the logits are divided by it.
        top_k: only so many of the likeliest tokens stay; None, or more than there are: all.
        top_p: only the likeliest tokens that together reach this probability stay (Holtzman et al. 2020).
        min_p: only tokens stay that have this share of the likeliest one's probability (Nguyen et al. 2024).

    >>> Sampling(temperature=0.7, top_k=50).plan().names
    ('temperature', 'top_k')
    """

    repetition_penalty: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        _check(self, "repetition_penalty", 0.0, math.inf, "above 0")
        _check(self, "temperature", 0.0, math.inf, "above 0 (for the likeliest token use Greedy)")
        _check_divisor(self, "repetition_penalty")
        _check_divisor(self, "temperature")
        _check(self, "top_p", 0.0, 1.0, "above 0 and at most 1")
        _check(self, "min_p", 0.0, 1.0, "above 0 and at most 1")
        _check_whole(self, "top_k")

    def plan(self) -> Plan:
        """What a program depends on."""
        return Plan(names=_given(self), random=True)

    def numbers(self) -> dict[str, np.ndarray]:
        """The numbers given."""
        return _numbers(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """The likeliest of several texts that are kept at a time, as transformers searches them.

    Attributes:
        num_beams: how many texts are kept.
        length_penalty: a text's log-probability is divided by its length to this power.
        early_stopping: True: stop at `num_beams` finished texts; False: when a running text is, at its length
            now, no better than the worst finished one; "never": when it could not become better either.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _check_whole(self, "num_beams")
        if not _is_number(self.length_penalty) or not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty: {self.length_penalty!r} is not a finite number")
        if self.early_stopping not in (True, False, "never"):
            raise ConfigError(f"early_stopping: {self.early_stopping!r} is not True, False or 'never'")

    def numbers(self) -> dict[str, np.ndarray]:
        """The number that a program does not depend on."""
        return {"length_penalty": np.asarray(self.length_penalty, np.float32)}


Sampler = Greedy | Sampling | BeamSearch


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _check(config: Any, name: str, above: float, most: float, what: str) -> None:
    value = getattr(config, name)
    if value is None and name != "temperature":
        return
    if not _is_number(value) or not above < value <= most or not math.isfinite(value):
        raise ConfigError(f"{name}: {value!r} is not a number {what}")


def _check_divisor(config: Any, name: str) -> None:
    """Refuse a number by which float32 logits become infinite, or no number at all."""
    value = getattr(config, name)
    if value is not None and not _LEAST <= value <= 1 / _LEAST:
        hint = "; for the likeliest token use Greedy" if name == "temperature" and value < 1 else ""
        raise ConfigError(f"{name}: {value!r} is outside what float32 can do, 1e-30 to 1e30{hint}")


def _check_whole(config: Any, name: str) -> None:
    value = getattr(config, name)
    if value is None and name == "top_k":
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ConfigError(f"{name}: {value!r} is not a whole number of at least 1")


def _given(config: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(config) if getattr(config, f.name) is not None)


def _numbers(config: Any) -> dict[str, np.ndarray]:
    # An int of Python would be another type of input than an array, and so another program.
    numbers = {name: getattr(config, name) for name in _given(config)}
    if "top_k" in numbers:
        # No vocabulary is larger, so this is all of it.
        numbers["top_k"] = min(numbers["top_k"], np.iinfo(np.int32).max)
    return {
        name: np.asarray(value, np.int32 if name == "top_k" else np.float32)
        for name, value in numbers.items()
    }


__all__ = ["BeamSearch", "Greedy", "Plan", "Sampler", "Sampling"]
