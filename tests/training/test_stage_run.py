"""One program for all stages that differ in nothing that it is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from mmjax.errors import DataError
from mmjax.parallel import make_mesh
from mmjax.training import FROZEN, Constant, Cosine, Experiment, Stage
from mmjax.training.stage_run import StageRun
from tests.training.toy import SquaredError, ToyData, toy_batch, toy_experiment, toy_model, toy_params

FIRST = Stage(name="first", loss=SquaredError(), rules=((".*", Cosine(peak=0.01, warmup=2)),), steps=4)


def second(**changes: Any) -> Stage:
    """A stage with other data, length and rates."""
    changes = {"rules": ((".*", Constant(value=0.02)),), **changes}
    return dataclasses.replace(FIRST, name="second", steps=3, data=ToyData(), **changes)


def of(*stages: Stage) -> Experiment:
    return toy_experiment(stages=stages, mesh={"data": 1})


def runs(experiment: Experiment, alone: bool = False) -> list[StageRun]:
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    opened = experiment.model.open(experiment.data, jax.random.key(0), mesh)
    made: list[StageRun] = []
    for index in range(len(experiment.stages)):
        made.append(StageRun(experiment, index, opened, mesh, None if alone or not made else made[-1]))
    return made


def test_the_rates_are_those_of_each_stage() -> None:
    one, two = runs(of(FIRST, second()))
    assert two.step is one.step
    found = [[float(run.rates(count)[0]) for count in range(3)] for run in (one, two)]
    np.testing.assert_allclose(found, [[0.005, 0.01, 0.01], [0.02, 0.02, 0.02]], rtol=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        second(loss=SquaredError(size=0.5)),
        second(rules=(("eyes/.*", FROZEN), ("head/.*", Constant(value=0.02)))),
        second(rules=(("eyes/.*", Constant(value=0.01)), ("head/.*", Constant(value=0.02)))),
        second(weight_decay=0.0),
        second(ema_decay=0.5),
        second(accumulate=2),
    ],
    ids=["loss", "frozen", "grouped", "decay", "average", "micro-batches"],
)
def test_stages_of_other_parts_have_a_program_of_their_own(other: Stage) -> None:
    one, two = runs(of(FIRST, other))
    assert two.step is not one.step


def test_a_shared_program_is_compiled_once_and_learns_the_same() -> None:
    both = of(FIRST, second())
    shared, alone = runs(both), runs(both, alone=True)
    results = []
    for one, two in (shared, alone):
        params = toy_params(toy_model())
        for run in (one, two):
            state = run.fresh(params)
            for number in range(run.settings.steps):
                state, _ = run.step(state, run.place(toy_batch(8, number)), run.rates(state.step))
            params = {**state.params, **state.frozen}
        results.append(jax.device_get(params))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert [run.step._cache_size() for run in (*shared, *alone)] == [1, 1, 1, 1]
    assert alone[0].step is not alone[1].step


def test_integers_that_jax_would_cut_are_refused() -> None:
    (run,) = runs(of(FIRST))
    numbers = np.arange(8, dtype=np.int64)
    assert run.place({"labels": numbers})["labels"].tolist() == list(range(8))
    with pytest.raises(DataError, match="integers in the data do not fit int32; number them anew"):
        run.place({"labels": numbers << 32})
