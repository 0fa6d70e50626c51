"""Learning rates as frozen data, turned into optax schedules when the number of steps is known."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from mmjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """One rate, after a linear warm-up.

    Args:
        value: the rate.
        warmup: steps over which it rises from zero; a fraction below 1 is a share of the stage.

    >>> float(Constant(value=0.5).build(10)(3))
    0.5
    """

    value: float
    warmup: int | float = 0

    def __post_init__(self) -> None:
        _check(self, "value", self.value, self.warmup)

    def build(self, steps: int) -> optax.Schedule:
        """The schedule for a stage of `steps` steps: count of updates done -> rate."""
        warmup = _warmup_steps(self.warmup, steps)
        return lambda count: _ramp(count, warmup) * self.value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up to a peak, then half a cosine down to an end value.

    Args:
        peak: the highest rate.
        warmup: steps over which it rises from zero; a fraction below 1 is a share of the stage.
        end: the rate after the last step.

    Source: Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", eq. 5.

    >>> schedule = Cosine(peak=1.0, warmup=2).build(10)
    >>> [round(float(schedule(count)), 3) for count in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    peak: float
    warmup: int | float = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "peak", self.peak, self.warmup, self.end)

    def build(self, steps: int) -> optax.Schedule:
        """The schedule for a stage of `steps` steps: count of updates done -> rate."""
        warmup = _warmup_steps(self.warmup, steps)

        def schedule(count: jax.typing.ArrayLike) -> jax.Array:
            done = _share_done(count, warmup, steps)
            decayed = self.end + (self.peak - self.end) * 0.5 * (1.0 + jnp.cos(math.pi * done))
            return _ramp(count, warmup) * decayed

        return schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear warm-up to a peak, then a straight line down to an end value.

    Args:
        peak: the highest rate.
        warmup: steps over which it rises from zero; a fraction below 1 is a share of the stage.
        end: the rate after the last step.

    >>> schedule = Linear(peak=1.0).build(10)
    >>> [round(float(schedule(count)), 3) for count in (0, 5, 10)]
    [1.0, 0.5, 0.0]
    """

    peak: float
    warmup: int | float = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "peak", self.peak, self.warmup, self.end)

    def build(self, steps: int) -> optax.Schedule:
        """The schedule for a stage of `steps` steps: count of updates done -> rate."""
        warmup = _warmup_steps(self.warmup, steps)

        def schedule(count: jax.typing.ArrayLike) -> jax.Array:
            done = _share_done(count, warmup, steps)
            return _ramp(count, warmup) * (self.peak + (self.end - self.peak) * done)

        return schedule


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Marks parameters that a stage leaves as they are: no gradient, no optimizer state."""

    def __repr__(self) -> str:
        return "FROZEN"


FROZEN = Frozen()
Schedule = Constant | Cosine | Linear


def _check(schedule: Schedule, name: str, rate: float, warmup: float, end: float = 0.0) -> None:
    kind = type(schedule).__name__
    for field, value in ((name, rate), ("end", end), ("warmup", warmup)):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{kind}.{field} must be zero or more, got {value!r}")
    if isinstance(warmup, float) and warmup >= 1 and not warmup.is_integer():
        raise ConfigError(f"{kind}.warmup must be whole steps or a share below 1, got {warmup!r}")


def _warmup_steps(warmup: int | float, steps: int) -> int:
    return round(warmup * steps) if isinstance(warmup, float) and warmup < 1 else int(warmup)


def _ramp(count: jax.typing.ArrayLike, warmup: int) -> jax.Array:
    # The first update already moves: a rate of exactly zero would spend a step on nothing.
    return jnp.minimum((jnp.asarray(count, jnp.float32) + 1.0) / max(warmup, 1), 1.0)


def _share_done(count: jax.typing.ArrayLike, warmup: int, steps: int) -> jax.Array:
    return jnp.clip((jnp.asarray(count, jnp.float32) - warmup) / max(steps - warmup, 1), 0.0, 1.0)
