"""What a run says first and leaves last."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from mmjax.training.experiment import Experiment
from mmjax.training.outcome import Outcome
from mmjax.training.progress import LiveProgress, PlainProgress, SilentProgress, format_seconds
from mmjax.training.source import OpenedModel
from mmjax.training.stage_run import StageRun
from mmjax.training.state import TrainState, merge
from mmjax.training.together import add_faults, gather

if TYPE_CHECKING:
    from mmjax.training.loop import Run


_OF_EARLIER = ("metrics", "stages", "parameters", "total_seconds")


def introduce(
    progress: PlainProgress | LiveProgress | SilentProgress,
    experiment: Experiment,
    opened: OpenedModel,
    mesh: Mesh,
    stages: Sequence[StageRun],
) -> None:
    """Say what is about to run, and where."""
    sizes = {path: math.prod(leaf.shape) for path, leaf in opened.shapes.items()}
    total = sum(sizes.values())
    axes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    devices = f"{mesh.size} devices" if mesh.size > 1 else "1 device"
    if jax.process_count() > 1:
        devices += f" in {jax.process_count()} processes"
    progress.say(f"{experiment.name}: {total:,} parameters on {devices} ({kind}{axes and ', mesh ' + axes})")
    for run in stages:
        moving = sum(sizes[path] for path in run.trained)
        frozen = f"{total - moving:,} parameters frozen" if moving < total else "all parameters train"
        progress.say(
            f"stage {run.stage.name}: {run.settings.steps:,} steps of {run.settings.batch_size:,}, {frozen}"
        )


def finish(run: Run, state: TrainState) -> Outcome:
    """Evaluate, export, draw and write result.json; all of it again where it was interrupted.

    Of several processes the first does it, with the parameters gathered on its own devices; the others wait.
    """
    trained_seconds = time.monotonic() - run.began
    averaged = state.params if state.ema is None else state.ema
    params, mesh = merge(averaged, state.frozen), run.mesh
    if run.channel.count > 1:
        run.faults = add_faults(run.channel.agree(run.faults))
        own, local = gather(run.opened.model, params, mesh)
        params, mesh = (params, mesh) if own is None else (own, local)
    outcome = outcome_of(run, params, mesh)
    if run.channel.index == 0:
        outcome = _evaluate(run, outcome)
        _leave(run, outcome, trained_seconds)
    return outcome


def outcome_of(run: Run, params: Any, mesh: Mesh) -> Outcome:
    """The run as its experiment's own functions see it, with these parameters."""
    return Outcome(
        name=run.experiment.name,
        model=run.opened.model,
        params=params,
        processor=run.opened.processor,
        data=run.experiment.data,
        mesh=mesh,
        folder=run.folders.output,
    )


def _evaluate(run: Run, outcome: Outcome) -> Outcome:
    if run.experiment.evaluate is not None:
        outcome = dataclasses.replace(outcome, metrics=dict(run.experiment.evaluate(outcome)))
        for name, value in outcome.metrics.items():
            if isinstance(value, float | int):
                run.progress.say(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.4g}")
    return outcome


def _leave(run: Run, outcome: Outcome, trained_seconds: float) -> None:
    export, preview, folders = run.experiment.export, run.experiment.preview, run.folders
    written = [folders.output / "metrics.csv"]
    if export is not None:
        folders.export(lambda folder: export(outcome, folder))
        written.append(folders.model)
    if preview is not None:
        preview(outcome, folders.output / "preview.png")
        written.append(folders.output / "preview.png")
    folders.write_result(_result(run, outcome, trained_seconds))
    written.append(folders.output / "result.json")
    before = sum(result["total_seconds"] for result in run.earlier.values())
    run.progress.say(f"done in {format_seconds(time.monotonic() - run.began + before)}; wrote")
    for path in written:
        run.progress.say(f"  {path}")
    for name, value in outcome.metrics.items():
        if isinstance(value, str):
            run.progress.say(f"{name}:")
            for line in value.splitlines():
                run.progress.say(f"  {line}")


def _result(run: Run, outcome: Outcome, trained_seconds: float) -> dict[str, Any]:
    images = sum(stage.settings.steps * stage.settings.batch_size for stage in run.stages)
    return {
        "name": outcome.name,
        "metrics": outcome.metrics,
        "stages": [
            {"name": stage.stage.name, "steps": stage.settings.steps, "batch_size": stage.settings.batch_size}
            for stage in run.stages
        ],
        "parameters": sum(math.prod(leaf.shape) for leaf in run.opened.shapes.values()),
        "seed": run.experiment.train.seed,
        "training_seconds": round(trained_seconds, 2),
        "total_seconds": round(time.monotonic() - run.began, 2),
        "images_per_second": round(images / max(trained_seconds, 1e-9), 1),
        "devices": run.mesh.size,
        "device_kind": run.mesh.devices.flat[0].device_kind,
        "mesh": dict(run.mesh.shape),
        "processes": run.channel.count,
        "broken_samples": run.faults,
        "jax": jax.__version__,
        "before": {name: {k: result[k] for k in _OF_EARLIER} for name, result in run.earlier.items()},
    }
