"""Whole runs of the toy experiment: what they leave, how they stop, and that going on is exact."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.checkpoints.training import ARRAYS, CheckpointStore
from mmjax.errors import CheckpointError, ConfigError, DataError, TrainingError
from mmjax.training import FROZEN, Constant, Experiment, Outcome, Stage, apply_overrides, train
from mmjax.training import interrupts as interrupts_module
from mmjax.training import progress as progress_module
from mmjax.training.interrupts import Interrupted
from tests.training.runs import arrays_of, left_by
from tests.training.toy import SquaredError, ToyBatches, ToyData, toy_experiment


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped; steps 1-10 are stage align, 11-20 stage tune."""
    workdir = tmp_path_factory.mktemp("whole")
    train(toy_experiment(), workdir=workdir)
    return workdir


def stop_at(monkeypatch: pytest.MonkeyPatch, batch: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while the given batch (counted over the process's life) is fetched."""
    fetch, count = ToyBatches.__next__, 0

    def fetch_and_signal(self: ToyBatches) -> dict[str, np.ndarray]:
        nonlocal count
        count += 1
        if count == batch:
            os.kill(os.getpid(), number)
        return fetch(self)

    monkeypatch.setattr(ToyBatches, "__next__", fetch_and_signal)


def test_what_a_run_leaves(whole: Path) -> None:
    result = json.loads((whole / "output/toy/result.json").read_text())
    assert result["name"] == "toy"
    assert result["stages"] == [
        {"name": "align", "steps": 10, "batch_size": 8},
        {"name": "tune", "steps": 10, "batch_size": 16},
    ]
    left = left_by(whole)
    assert left["step"] == 20
    assert CheckpointStore(whole / "checkpoints/toy").steps() == [16, 19, 20]
    lines = left["metrics.csv"].decode().splitlines()
    assert lines[0].startswith("stage,step,loss,fit,size,grad_norm,learning_rate")
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["align" if step <= 10 else "tune", str(step)] for step in range(1, 21)
    ]
    assert any(path.name.startswith("events.out.tfevents") for path in (whole / "output/toy").iterdir())


@pytest.mark.usefixtures("optimised")
def test_frozen_parameters_are_bitwise_what_they_were(tmp_path: Path) -> None:
    experiment = toy_experiment(stages=toy_experiment().stages[:1])
    outcome = train(experiment, workdir=tmp_path)
    key = jax.random.fold_in(jax.random.key(0), 0)
    fresh = outcome.model.init(key, **outcome.model.example_batch())["params"]
    for name in ("kernel", "bias"):
        assert np.asarray(outcome.params["eyes"][name]).tobytes() == np.asarray(fresh["eyes"][name]).tobytes()
    assert (
        np.asarray(outcome.params["head"]["kernel"]).tobytes()
        != np.asarray(fresh["head"]["kernel"]).tobytes()
    )
    arrays = arrays_of(tmp_path / "checkpoints/toy/10")
    assert not any("eyes" in name and not name.startswith("frozen.") for name in arrays)


@pytest.mark.parametrize("batch", [2, 3, 9, 10, 11, 13, 20])
def test_stopped_and_resumed_is_bitwise_never_stopped(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, batch)
        with pytest.raises(Interrupted) as caught:
            train(toy_experiment(), workdir=tmp_path)
    assert caught.value.exit_code == 143
    assert f"stopped after step {batch}" in str(caught.value)
    assert CheckpointStore(tmp_path / "checkpoints/toy").steps()[-1] == batch
    train(toy_experiment(), workdir=tmp_path, resume=True)
    assert left_by(tmp_path) == left_by(whole)


@pytest.mark.parametrize("lost", [1, 2])
def test_going_on_from_an_older_checkpoint_is_exact_too(whole: Path, tmp_path: Path, lost: int) -> None:
    """As after a kill -9: the records are ahead of the newest checkpoint, or have lost their last line."""
    shutil.copytree(whole, tmp_path / "run")
    store = CheckpointStore(tmp_path / "run/checkpoints/toy")
    for step in store.steps()[-lost:]:
        shutil.rmtree(store.path(step))
    metrics = tmp_path / "run/output/toy/metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:-7])
    train(toy_experiment(), workdir=tmp_path / "run", resume=True)
    assert left_by(tmp_path / "run") == left_by(whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/toy/20"
    victim = max(
        (path for path in (newest / ARRAYS).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(bytes(content))
    train(toy_experiment(), workdir=tmp_path / "run", resume=True)
    said = capsys.readouterr()
    assert f"damaged checkpoint {newest}" in said.err
    assert victim.name in said.err
    assert f"resumed from {tmp_path / 'run/checkpoints/toy/19'}" in said.out
    assert left_by(tmp_path / "run") == left_by(whole)


def test_all_checkpoints_damaged_is_an_error(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for state in (tmp_path / "run/checkpoints/toy").glob("*/state.json"):
        state.unlink()
    with pytest.raises(CheckpointError, match="every checkpoint in"):
        train(toy_experiment(), workdir=tmp_path / "run", resume=True)


def test_a_finished_run_resumes_to_the_same(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    train(toy_experiment(), workdir=tmp_path / "run", resume=True)
    assert left_by(tmp_path / "run") == left_by(whole)


def test_resume_where_there_is_nothing_starts(whole: Path, tmp_path: Path) -> None:
    train(toy_experiment(), workdir=tmp_path, resume=True)
    assert left_by(tmp_path) == left_by(whole)


def test_resume_onto_another_mesh_goes_on_within_rounding(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/toy/20")
    other = toy_experiment(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    outcome = train(other, workdir=tmp_path / "run", resume=True)
    wanted = train(toy_experiment(), workdir=tmp_path / "again", resume=True)
    for found, value in zip(jax.tree.leaves(outcome.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(value), rtol=1e-5, atol=1e-6)


def test_an_existing_run_is_not_touched_without_a_flag(whole: Path) -> None:
    before = left_by(whole)
    with pytest.raises(TrainingError, match="--resume .* or --overwrite"):
        train(toy_experiment(), workdir=whole)
    with pytest.raises(TrainingError, match="contradict"):
        train(toy_experiment(), workdir=whole, resume=True, overwrite=True)
    assert left_by(whole) == before


def test_overwrite_deletes_this_run_only(whole: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for room in ("checkpoints", "output", "models"):
        (workdir / room / "other").mkdir(parents=True)
        (workdir / room / "other" / "file").write_text("kept")
    (workdir / "output/toy/mine").write_text("gone")
    train(toy_experiment(), workdir=workdir, overwrite=True)
    assert not (workdir / "output/toy/mine").exists()
    assert [(workdir / room / "other/file").read_text() for room in ("checkpoints", "output", "models")] == [
        "kept"
    ] * 3
    assert left_by(workdir) == left_by(whole)


def test_a_mistake_before_the_first_checkpoint_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        train(toy_experiment(mesh={"data": 3}), workdir=tmp_path)
    train(apply_overrides(toy_experiment(), ["train.steps=1"]), workdir=tmp_path)


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    inner: list[BaseException] = []

    def evaluate(outcome: Outcome) -> dict[str, float]:
        with pytest.raises(TrainingError, match="another process") as caught:
            train(toy_experiment(), workdir=tmp_path, resume=True)
        inner.append(caught.value)
        return {}

    train(apply_overrides(toy_experiment(evaluate=evaluate), ["train.steps=1"]), workdir=tmp_path)
    assert len(inner) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["stages.tune.batch_size=24"], "train.batch_size is 24 but the run to resume had 16"),
        (["train.seed=1"], "train.seed is 1 but the run to resume had 0"),
        (["model.config.hidden=8"], "does not fit the experiment"),
        (["stages.tune.name=other"], "of stage 'tune', which the experiment does not have"),
    ],
)
def test_resuming_with_settings_that_do_not_fit(
    whole: Path, tmp_path: Path, changes: list[str], words: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    experiment = apply_overrides(toy_experiment(), changes)
    with pytest.raises((TrainingError, CheckpointError), match=words):
        train(experiment, workdir=tmp_path / "run", resume=True)


def test_a_finished_run_can_be_made_longer(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    longer = apply_overrides(toy_experiment(), ["stages.tune.steps=15"])
    train(longer, workdir=tmp_path / "run", resume=True)
    assert left_by(tmp_path / "run")["step"] == 25


@pytest.mark.parametrize(("bad", "kept"), [(1, 0), (2, 1), (5, 4), (10, 9)])
def test_a_bad_step_stops_the_run_after_the_last_good_state_was_kept(
    whole: Path, tmp_path: Path, bad: int, kept: int
) -> None:
    poisoned = toy_experiment(data=ToyData(bad_batch=bad))
    with pytest.raises(TrainingError) as caught:
        train(poisoned, workdir=tmp_path)
    text = str(caught.value)
    assert f"stage 'align', step {bad}: the loss term 'fit' is not finite" in text
    assert str(tmp_path / f"checkpoints/toy/{kept}") in text
    assert CheckpointStore(tmp_path / "checkpoints/toy").newest(pytest.fail) == kept
    rows = (tmp_path / "output/toy/metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + kept
    # The cause removed, the run goes on as if it had never been there.
    train(toy_experiment(), workdir=tmp_path, resume=True)
    assert left_by(tmp_path) == left_by(whole)


@dataclasses.dataclass(frozen=True)
class BadGradient(SquaredError):
    """Finite terms whose gradient is not."""

    def __call__(self, model: Any, params: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
        terms = super().__call__(model, params, batch, key)
        return {**terms, "steep": jnp.sqrt(0.0 * jnp.sum(params["head"]["bias"]))}


def test_a_bad_gradient_is_named(tmp_path: Path) -> None:
    stage = Stage(name="only", loss=BadGradient(), rules=((".*", Constant(value=0.1)),))
    with pytest.raises(TrainingError, match="stage 'only', step 1: the gradient is not finite"):
        train(toy_experiment(stages=(stage,)), workdir=tmp_path)


def test_broken_samples_are_reported_and_stop_the_run_above_the_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = toy_experiment(data=ToyData(broken=(1, 2)))
    train(some, workdir=tmp_path / "some")
    assert "samples broken; each was replaced" in capsys.readouterr().out
    result = json.loads((tmp_path / "some/output/toy/result.json").read_text())
    assert result["broken_samples"]["align"]["counts"] == {"truncated": 4}
    many = toy_experiment(data=ToyData(broken=tuple(range(30)), max_fault_share=0.5))
    with pytest.raises(DataError, match="more than max_fault_share=0.5"):
        train(many, workdir=tmp_path / "many")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.batch_size=12", "stages.tune.batch_size=16"], "stage 'align': batch_size=12 .* 8 devices"),
        (["train.batch_size=16", "train.accumulate=4"], "make it a multiple of 32"),
        (["stages.align.accumulate=3"], "stage 'align': train.batch_size=8 cannot be cut"),
        (["mesh=data=3"], "does not fill the 8 devices"),
        (["mesh=rows=8"], "unknown axis 'rows'"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(
    tmp_path: Path, changes: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(apply_overrides(toy_experiment(), changes), workdir=tmp_path)
    assert not (tmp_path / "output").exists()


def test_patterns_are_checked_before_anything_runs(tmp_path: Path) -> None:
    one = Constant(value=0.1)
    for rules, words in [
        ((("eyes/.*", one),), "no pattern covers parameter 'head/bias'"),
        ((("nose/.*", FROZEN), (".*", one)), "'nose/.*' matches no parameter"),
        (((".*", FROZEN),), "every parameter is frozen"),
    ]:
        stages = (*toy_experiment().stages, Stage(name="third", loss=SquaredError(), rules=rules))
        with pytest.raises(ConfigError, match="stage 'third'.*") as caught:
            train(toy_experiment(stages=stages), workdir=tmp_path)
        assert words in str(caught.value)


def test_evaluate_preview_and_export_see_the_average(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def evaluate(outcome: Outcome) -> dict[str, Any]:
        seen["params"] = jax.tree.map(np.asarray, outcome.params)
        return {"score": np.float32(0.5), "table": np.arange(3)}

    def preview(outcome: Outcome, path: Path) -> None:
        seen["history"] = outcome.history()
        path.write_bytes(b"picture")

    def export(outcome: Outcome, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(outcome.name)

    experiment = toy_experiment(evaluate=evaluate, preview=preview, export=export)
    outcome = train(experiment, workdir=tmp_path)
    arrays = arrays_of(tmp_path / "checkpoints/toy/20")
    assert seen["params"]["head"]["kernel"].tobytes() == arrays["ema.head.kernel"]
    assert arrays["ema.head.kernel"] != arrays["params.head.kernel"]
    assert outcome.metrics["score"] == 0.5
    result = json.loads((tmp_path / "output/toy/result.json").read_text())
    assert result["metrics"] == {"score": 0.5, "table": [0, 1, 2]}
    assert (tmp_path / "output/toy/preview.png").read_bytes() == b"picture"
    assert (tmp_path / "models/toy/weights").read_text() == "toy"
    assert seen["history"]["step"].tolist() == list(range(1, 21))
    assert seen["history"]["stage"].tolist() == ["align"] * 10 + ["tune"] * 10
    assert np.isfinite(seen["history"]["loss"]).all()


def test_compiler_options_are_those_of_the_steps_program_and_of_no_other(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    options = {"xla_dump_to": str(dump), "xla_backend_optimization_level": "0"}
    settings = dataclasses.replace(toy_experiment().train, compiler_options=options)
    train(dataclasses.replace(toy_experiment(), train=settings), workdir=tmp_path / "run")
    assert {path.name.split(".")[1] for path in dump.iterdir()} == {"jit_nothing", "jit_step"}


def test_a_compiler_option_that_is_none_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    experiment = apply_overrides(toy_experiment(), ["train.compiler_options=xla_no_such_thing=1"])
    with pytest.raises(ConfigError, match=r"^train\.compiler_options: .*xla_no_such_thing"):
        train(experiment, workdir=tmp_path)


def test_the_compilation_cache_is_off_unless_asked_for(tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    train(apply_overrides(toy_experiment(), ["train.steps=1"]), workdir=tmp_path / "off")
    assert jax.config.jax_compilation_cache_dir == before
    cache = str(tmp_path / "cache")
    try:
        overrides = ["train.steps=1", f"train.compilation_cache={cache}"]
        train(apply_overrides(toy_experiment(), overrides), workdir=tmp_path / "on")
        assert jax.config.jax_compilation_cache_dir == cache
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def quit_codes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    codes: list[int] = []
    heard = threading.Event()

    def pretend(code: int) -> None:
        codes.append(code)
        heard.set()

    monkeypatch.setattr(interrupts_module.os, "_exit", pretend)
    yield codes
    assert heard.wait(10)


def test_a_signal_while_data_are_read_does_not_wait_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, build = [], ToyData.build

    def slow(self: ToyData, *, progress: Any, **options: Any) -> Any:
        for number in range(10):
            read.append(number)
            if len(read) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            progress(number + 1, 10)
        return build(self, **options)

    monkeypatch.setattr(ToyData, "build", slow)
    monkeypatch.setattr(progress_module, "READING_SECONDS", 0.0)
    with pytest.raises(Interrupted, match="--resume goes on"):
        train(toy_experiment(), workdir=tmp_path)
    assert read == [0, 1, 2, 3]
    assert "align: reading data  3/10\n" in capsys.readouterr().out
    train(toy_experiment(), workdir=tmp_path, resume=True)
    assert left_by(tmp_path)["step"] == 20


def test_a_second_signal_quits_at_once(quit_codes: list[int]) -> None:
    with interrupts_module.Interrupts() as interrupts, interrupts.polite():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        while not quit_codes:
            pass
    assert quit_codes[0] == 130


def test_a_signal_outside_the_steps_is_raised_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught, interrupts_module.Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_in_another_thread_works(tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    experiment: Experiment = apply_overrides(toy_experiment(), ["train.steps=1"])
    thread = threading.Thread(target=lambda: outcomes.append(train(experiment, workdir=tmp_path)))
    thread.start()
    thread.join()
    assert outcomes[0].name == "toy"
