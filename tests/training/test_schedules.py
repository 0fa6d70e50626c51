"""Schedules against hand-made values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmjax.errors import ConfigError
from mmjax.training.schedules import Constant, Cosine, Linear, Schedule


def values(schedule: Schedule, steps: int) -> np.ndarray:
    build = schedule.build(steps)
    return np.array([float(build(count)) for count in range(steps + 2)])


def test_constant_after_warmup() -> None:
    np.testing.assert_allclose(values(Constant(value=2.0, warmup=4), 6), [0.5, 1, 1.5, 2, 2, 2, 2, 2])


def test_linear_falls_to_its_end_and_stays() -> None:
    found = values(Linear(peak=1.0, warmup=2, end=0.2), 6)
    np.testing.assert_allclose(found, [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2], rtol=1e-6)


def test_cosine_falls_to_its_end_and_stays() -> None:
    found = values(Cosine(peak=1.0, warmup=2, end=0.1), 6)
    half = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75, 1, 1)]
    np.testing.assert_allclose(found, [0.5, 1.0, *half], rtol=1e-6)


def test_warmup_as_a_share_of_the_stage() -> None:
    for kind in (Cosine, Linear):
        np.testing.assert_array_equal(
            values(kind(peak=1.0, warmup=0.03), 100), values(kind(peak=1.0, warmup=3), 100)
        )
    np.testing.assert_array_equal(
        values(Constant(value=1.0, warmup=0.5), 10), values(Constant(value=1.0, warmup=5), 10)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Constant(value=-1.0), "Constant.value"),
        (lambda: Cosine(peak=float("nan")), "Cosine.peak"),
        (lambda: Linear(peak=1.0, end=-0.1), "Linear.end"),
        (lambda: Cosine(peak=1.0, warmup=-1), "Cosine.warmup"),
        (lambda: Cosine(peak=1.0, warmup=1.5), "Cosine.warmup"),
    ],
)
def test_impossible_rates_are_refused(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
