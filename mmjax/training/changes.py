"""What of an experiment is no longer as it was when a checkpoint was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mmjax.training.experiment import Experiment
from mmjax.training.optimizer import Rule

# How often something is written or said, and what a checkpoint is refused for anyway.
_LEFT_OUT = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "log_samples",
    "compilation_cache",
    "seed",
    "batch_size",
)


def describe(experiment: Experiment) -> dict[str, str]:
    """Everything that decides how the stages train, by name.

    Args:
        experiment: the experiment.

    Returns:
        Such as {"stages.tune.steps": "10", "stages.tune.rules .*": "Constant(value=0.1, warmup=0)"}.
    """
    found: dict[str, str] = {}
    for stage in experiment.stages:
        start = f"stages.{stage.name}."
        for field in dataclasses.fields(experiment.train):
            if field.name not in _LEFT_OUT:
                found[start + field.name] = repr(getattr(experiment.settings(stage), field.name))
        for pair in stage.rules:
            rule = Rule(*pair)
            found[f"{start}rules {rule.pattern}"] = repr(rule.schedule)
        # Another object's repr may have its address in it.
        if dataclasses.is_dataclass(stage.loss):
            found[start + "loss"] = repr(stage.loss)
    return found


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two descriptions, one line each.

    >>> changes({"stages.a.steps": "1"}, {"stages.a.steps": "2"})
    ['stages.a.steps was 1, is 2']
    """
    names = {**now, **then}
    return [
        f"{name} was {then.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in names
        if then.get(name) != now.get(name)
    ]
