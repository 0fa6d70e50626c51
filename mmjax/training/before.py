"""Experiments in a row: those that an experiment needs to have run before it, and the folders they leave."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmjax.training.experiment import Experiment
from mmjax.training.folders import RunFolders


def in_order(experiment: Experiment, workdir: Path) -> Iterator[Experiment]:
    """All experiments of a run, each after those that it needs; the last is the experiment itself.

    Each is named after the one that needs it, has that one's seed and compilation cache, and its mesh and
    compiler options where it names none. In texts of models and data, `{workdir}` becomes the run's folder
    and `{name}` the name of the experiment that needs the others.

    Args:
        experiment: what is run.
        workdir: holds checkpoints/, models/ and output/.

    >>> from mmjax.training import Constant, Experiment, FromFolder, Stage
    >>> stage = Stage(name="s", loss=max, rules=((".*", Constant(value=1.0)),))
    >>> eyes = Experiment(name="eyes", model=FromFolder(path="a"), data=None, stages=(stage,))
    >>> whole = dataclasses.replace(
    ...     eyes, name="whole", model=FromFolder(path="{workdir}/models/{name}-eyes"), before=(eyes,)
    ... )
    >>> [(each.name, each.model.path) for each in in_order(whole, Path("w"))]
    [('whole-eyes', 'a'), ('whole', 'w/models/whole-eyes')]
    """
    words = {"{workdir}": str(workdir), "{name}": experiment.name}
    for inner in experiment.before:
        train = dataclasses.replace(
            inner.train,
            seed=experiment.train.seed,
            compilation_cache=experiment.train.compilation_cache,
            compiler_options=inner.train.compiler_options or experiment.train.compiler_options,
        )
        named = dataclasses.replace(
            _filled(inner, words),
            name=f"{experiment.name}-{inner.name}",
            train=train,
            mesh=inner.mesh or experiment.mesh,
        )
        yield from in_order(named, workdir)
    yield _filled(experiment, words)


def result_of(folders: RunFolders) -> dict[str, Any] | None:
    """What a run left in result.json; None where it has not ended yet."""
    try:
        found = json.loads((folders.output / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _filled(experiment: Experiment, words: Mapping[str, str]) -> Experiment:
    stages = tuple(
        stage if stage.data is None else dataclasses.replace(stage, data=_fill(stage.data, words))
        for stage in experiment.stages
    )
    parts = {name: _fill(getattr(experiment, name), words) for name in ("model", "data", "prepare")}
    return dataclasses.replace(experiment, stages=stages, **parts)


def _fill(value: Any, words: Mapping[str, str]) -> Any:
    """The value with every text in it filled in; what has none in it stays the object that it is."""
    if isinstance(value, str):
        for word, text in words.items():
            value = value.replace(word, text)
        return value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        made = tuple(_fill(item, words) for item in value)
        return made if any(new is not old for new, old in zip(made, value, strict=True)) else value
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed = {}
    for field in dataclasses.fields(value):
        if field.init:
            old = getattr(value, field.name)
            new = _fill(old, words)
            if new is not old:
                changed[field.name] = new
    return dataclasses.replace(value, **changed) if changed else value
