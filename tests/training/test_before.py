"""Experiments that need others to have run before them: order, names, folders, what is skipped on resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mmjax.errors import ConfigError, TrainingError
from mmjax.training import Experiment, FromConfig, Outcome, apply_overrides, train
from mmjax.training.before import in_order
from mmjax.training.cli import load_experiment
from mmjax.training.interrupts import Interrupted
from mmjax.training.source import OpenedModel
from mmjax.training.state import flatten
from tests.training.runs import left_by
from tests.training.toy import ToyConfig, ToyModel, toy_experiment

WEIGHTS = "weights.npz"


def leave_weights(outcome: Outcome, folder: Path) -> None:
    folder.mkdir()
    np.savez(folder / WEIGHTS, **flatten(dict(outcome.params)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromWeights(FromConfig):
    """The toy with what an earlier experiment left."""

    path: str

    def open(self, data: Any, key: jax.Array, mesh: Mesh) -> OpenedModel:
        made = super().open(data, key, mesh)
        with np.load(Path(self.path) / WEIGHTS) as found:
            kept = {name: jax.device_put(found[name], made.shardings[name]) for name in made.shapes}
        return dataclasses.replace(made, params=lambda: kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """Writes down what it is called with."""

    folder: str

    def __call__(self, outcome: Outcome, say: Callable[[str], None]) -> None:
        Path(self.folder).mkdir(exist_ok=True)
        total = float(sum(np.abs(x).sum() for x in flatten(dict(outcome.params)).values()))
        (Path(self.folder) / "sum.txt").write_text(f"{outcome.name} {total}")
        say("prepared")


def row(**changes: Any) -> Experiment:
    inner = toy_experiment(name="first", export=leave_weights)
    return toy_experiment(
        model=FromWeights(config=ToyConfig(), model=ToyModel, path="{workdir}/models/{name}-first"),
        prepare=Prepared(folder="{workdir}/kept"),
        before=(inner,),
        **changes,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    train(row(), workdir=workdir)
    return workdir


def test_the_second_starts_from_what_the_first_left(whole: Path) -> None:
    with np.load(whole / "models" / "toy-first" / WEIGHTS) as found:
        total = float(sum(np.abs(found[name]).sum() for name in found))
    name, seen = (whole / "kept" / "sum.txt").read_text().split()
    assert name == "toy" and float(seen) == pytest.approx(total, rel=1e-6)
    result = json.loads((whole / "output/toy/result.json").read_text())
    assert result["before"]["toy-first"]["total_seconds"] > 0


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """A signal that arrives in one run of the row, after a step."""
    from mmjax.training.loop import Run

    whole = Run._stop_signal

    def signal_at(self: Run, at: int) -> int | None:
        return 15 if (self.experiment.name, at) == (name, step) else whole(self, at)

    monkeypatch.setattr(Run, "_stop_signal", signal_at)


@pytest.mark.parametrize(("name", "step"), [("toy-first", 12), ("toy", 4)])
def test_a_row_that_was_stopped_goes_on_to_the_same_bits(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, name, step)
        with pytest.raises(Interrupted, match=f"stopped after step {step}"):
            train(row(), workdir=tmp_path)
    with pytest.raises(TrainingError, match="--resume"):
        train(row(), workdir=tmp_path)
    first = tmp_path / "output" / "toy-first" / "result.json"
    before = first.stat().st_mtime_ns if first.exists() else None
    train(row(), workdir=tmp_path, resume=True)
    if before is not None:  # what has ended is not run again
        assert first.stat().st_mtime_ns == before
    for each in ("toy-first", "toy"):
        undisturbed, cut = left_by(whole, each), left_by(tmp_path, each)
        assert cut["arrays"] == undisturbed["arrays"]
        assert cut["samples.csv"] == undisturbed["samples.csv"]


def test_overwriting_begins_with_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models" / "toy-first"
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_text("of an earlier run")
    train(row(), workdir=tmp_path, overwrite=True)
    said = capsys.readouterr().out
    assert said.index("toy-first: ") < said.index("toy: ") < said.index("prepared")


def test_a_model_that_was_deleted_is_left_again(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "models" / "toy-first")
    train(row(), workdir=tmp_path, resume=True)
    left, before = ((root / "models/toy-first" / WEIGHTS).read_bytes() for root in (tmp_path, whole))
    assert left == before


def test_one_seed_is_all_seeds_and_fields_of_earlier_ones_are_set_by_name() -> None:
    changed = apply_overrides(row(), ["train.seed=3", "before.first.train.steps=2", "name=other"])
    first, last = in_order(changed, Path("w"))
    assert (first.name, first.train.seed, first.train.steps) == ("other-first", 3, 2)
    assert (last.name, last.train.seed, last.train.steps) == ("other", 3, 10)
    assert last.model.path == "w/models/other-first"  # type: ignore[union-attr]
    assert changed.model.path == "{workdir}/models/{name}-first"  # type: ignore[union-attr]
    assert first.mesh == last.mesh


def test_compiler_options_are_those_of_earlier_ones_that_have_none() -> None:
    wanted = ["train.compiler_options=a=1"]
    first, last = in_order(apply_overrides(row(), wanted), Path("w"))
    assert first.train.compiler_options == last.train.compiler_options == (("a", "1"),)
    own = apply_overrides(row(), [*wanted, "before.first.train.compiler_options=b=2"])
    assert [each.train.compiler_options[0][0] for each in in_order(own, Path("w"))] == ["b", "a"]  # type: ignore[index]


def test_the_quickstart_fits_together() -> None:
    file = Path(__file__).parents[2] / "experiments" / "quickstart.py"
    eyes, brain, whole = in_order(load_experiment(str(file), ["train.seed=2"], smoke=True), Path("w"))
    assert [each.name for each in (eyes, brain, whole)] == [
        "quickstart-smoke-eyes",
        "quickstart-smoke-brain",
        "quickstart-smoke",
    ]
    assert {each.train.seed for each in (eyes, brain, whole)} == {2}
    model, prepare = whole.model, whole.prepare
    assert (model.eyes, model.brain) == ("w/models/quickstart-smoke-eyes", "w/models/quickstart-smoke-brain")  # type: ignore
    assert prepare.folder == whole.data.features == whole.stages[0].data.features  # type: ignore[union-attr]
    assert hash(whole) == hash(dataclasses.replace(whole))


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="same name"):
        toy_experiment(before=(toy_experiment(name="a"), toy_experiment(name="a")))
