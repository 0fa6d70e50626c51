"""Experiments as frozen data: what is trained, on what, in which stages, with which settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from mmjax.errors import ConfigError
from mmjax.training.optimizer import OptimizerName, Rule
from mmjax.training.outcome import Outcome, export_hub
from mmjax.training.schedules import Frozen, Schedule
from mmjax.training.source import FromConfig, FromFolder

MeshShape = Mapping[str, int] | tuple[tuple[str, int], ...]
CompilerOptions = Mapping[str, str] | tuple[tuple[str, Any], ...]


def _require(good: bool, name: str, wanted: str, value: Any) -> None:
    if not good:
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"{what} must be letters, digits, '.', '_' and '-', not a sign first; got {name!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Settings of a whole run; a stage may have its own for those that `Stage` also names.

    Args:
        steps: optimizer steps of a stage.
        batch_size: samples per step, over all devices and micro-batches.
        accumulate: micro-batches per step, run one after another; the step's result is the whole batch's,
            also where the loss compares its samples with each other (gradient caching).
        optimizer: "adamw", or "muon" (see `mmjax.training.make_optimizer`).
        seed: of the parameters, the order of samples and dropout.
        weight_decay: AdamW's, on arrays of two or more dimensions.
        b1, b2, eps: Adam's constants.
        clip_norm: largest global gradient norm; 0 does not clip.
        ema_decay: share of the parameters' moving average that stays each step; 0 keeps no
            average. With an average, it is what is evaluated and exported.
        log_every: steps between progress reports (metrics.csv has every step).
        checkpoint_every: steps between checkpoints; 0 keeps only those at the end of a stage and
            when the run is stopped.
        keep_checkpoints: how many of the newest are kept.
        log_samples: whether output/<name>/samples.csv lists each step's sample numbers.
        compilation_cache: folder in which JAX keeps compiled programs between runs; "" for none.
        compiler_options: XLA's, by name, for the programs of the steps (`jax.jit`'s `compiler_options`), such
            as {"xla_backend_optimization_level": 0}: compiled in less time, and slower.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    optimizer: OptimizerName = "adamw"
    seed: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    log_samples: bool = False
    compilation_cache: str = ""
    compiler_options: CompilerOptions = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        for name in ("weight_decay", "clip_norm", "checkpoint_every", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name}", "zero or more", getattr(self, name))
        for name in ("b1", "b2", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}", "in [0, 1)", getattr(self, name))
        _require(
            self.optimizer in get_args(OptimizerName), "train.optimizer", "adamw or muon", self.optimizer
        )
        _require(self.eps > 0, "train.eps", "above zero", self.eps)
        object.__setattr__(self, "compiler_options", tuple(sorted(dict(self.compiler_options).items())))
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"train.batch_size={self.batch_size} cannot be cut into train.accumulate={self.accumulate} "
                "equal parts"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: a loss, and which parameters follow which schedule.

    Args:
        name: unique in the experiment.
        loss: the task, called as (model, params, batch, key) -> named scalar terms.
        rules: ordered pairs (pattern, schedule or FROZEN). A pattern is a regular expression that
            has to match a parameter's whole path, such as "vision_model/.*"; the first match wins.
        data: the stage's data; None is the experiment's.
        steps, batch_size, accumulate, weight_decay, clip_norm, ema_decay: as in `Train`; None
            takes the run's value.

    >>> from mmjax.training.schedules import FROZEN, Cosine
    >>> stage = Stage(name="align", loss=max, rules=(("eyes/.*", FROZEN), (".*", Cosine(peak=1e-3))))
    >>> stage.rules[0]
    Rule(pattern='eyes/.*', schedule=FROZEN)
    """

    name: str
    loss: Callable[..., Any]
    rules: tuple[Rule | tuple[str, Schedule | Frozen], ...]
    data: Any = None
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        _check_name("stage name", self.name)
        rules = tuple(Rule(*rule) for rule in self.rules)
        for rule in rules:
            if not isinstance(rule.pattern, str) or not isinstance(rule.schedule, Frozen | Schedule):
                raise ConfigError(
                    f"stage {self.name!r}: a rule is (pattern, schedule or FROZEN), got {tuple(rule)!r}"
                )
        object.__setattr__(self, "rules", rules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a run needs, as data.

    Args:
        name: names the run's folders under checkpoints/, models/ and output/.
        model: where the model comes from: FromConfig (new parameters) or FromFolder.
        data: a data config with `build(processor=, batch_size=, seed=, split=, process_index=,
            process_count=)`.
        stages: trained one after another; each starts from the parameters the last one left, with
            a new optimizer.
        train: settings of the run.
        mesh: mesh axis to size, such as {"data": 2, "fsdp": 4}; empty puts all devices on data.
        evaluate: called once at the end with the Outcome; returns metrics for result.json.
        preview: called once at the end with the Outcome and the path of preview.png.
        export: called once at the end with the Outcome and the folder for the final weights; None
            exports nothing.
        smoke: overrides that `--smoke` applies for a quick try, such as ("train.steps=20",).
        before: experiments that are run first, whose models or data this one opens; see
            `mmjax.training.before.in_order` for what they share with it.
        prepare: called once before the first step with the Outcome that the run begins with and a function
            that takes a line to show; for what the stages' data needs of the model. It is called again when
            a run is resumed.
    """

    name: str
    model: FromConfig | FromFolder
    data: Any
    stages: tuple[Stage, ...]
    train: Train = Train()
    mesh: MeshShape = ()
    evaluate: Callable[[Outcome], Mapping[str, Any]] | None = None
    preview: Callable[[Outcome, Path], None] | None = None
    export: Callable[[Outcome, Path], None] | None = export_hub
    smoke: tuple[str, ...] = ("train.steps=2",)
    before: tuple[Experiment, ...] = ()
    prepare: Callable[[Outcome, Callable[[str], None]], None] | None = None

    def __post_init__(self) -> None:
        _check_name("experiment name", self.name)
        if not self.stages or not all(isinstance(stage, Stage) for stage in self.stages):
            raise ConfigError(f"experiment {self.name!r}: stages must be a tuple of one or more Stage")
        names = [stage.name for stage in self.stages]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"experiment {self.name!r}: two stages are named {repeated[0]!r}")
        earlier = [each.name for each in self.before]
        if len(set(earlier)) < len(earlier):
            raise ConfigError(f"experiment {self.name!r}: two experiments before it have the same name")
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "before", tuple(self.before))
        object.__setattr__(self, "mesh", tuple(dict(self.mesh).items()))

    def settings(self, stage: Stage) -> Train:
        """The run's settings with those that the stage has of its own.

        Raises:
            ConfigError: the combination is impossible.
        """
        names = [field.name for field in dataclasses.fields(Train) if hasattr(stage, field.name)]
        own = {name: getattr(stage, name) for name in names if getattr(stage, name) is not None}
        try:
            return dataclasses.replace(self.train, **own)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}: {error}") from None
