"""One stage of a run: its state on the mesh, its steps, and what is known for certain about them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from mmjax.checkpoints.training import CheckpointStore
from mmjax.errors import ConfigError, DataError
from mmjax.parallel import BATCH_AXES, batch_sharding, replicated
from mmjax.training.experiment import Experiment, Stage, Train
from mmjax.training.optimizer import Rule, label_parameters, make_optimizer, trained_rules
from mmjax.training.source import OpenedModel
from mmjax.training.state import (
    TrainState,
    create_state,
    named_leaves,
    state_from_arrays,
    state_shardings,
    state_to_arrays,
)
from mmjax.training.step import Batch, Metrics, make_train_step, term_name

# A step is looked at when the next one is already running: the device never waits for the host.
STEPS_IN_FLIGHT = 1
_OPTIMIZER = ("b1", "b2", "eps", "weight_decay", "clip_norm", "optimizer")


@dataclasses.dataclass(frozen=True)
class Cursor:
    """A place in a stage: steps done, and the data iterator's state after their batches."""

    step: int
    data: Any


class NotFiniteError(Exception):
    """A step's loss or gradient was not finite.

    Attributes:
        cursor: the place after the last good step.
        state: the state at that place.
        step: the bad step, counted from 1 in the stage.
        term: the name of the term, or "gradient".
    """

    def __init__(self, cursor: Cursor, state: TrainState, step: int, term: str) -> None:
        super().__init__(f"step {step}: {term} is not finite")
        self.cursor, self.state, self.step, self.term = cursor, state, step, term


class StageRun:
    """Everything that is fixed for one stage.

    Args:
        experiment: the experiment.
        index: which stage.
        opened: the model.
        mesh: where it lies.
        like: a stage before it, whose compiled step serves this one too where they differ in nothing but
            data, steps and rates.

    Attributes:
        step: the jitted train step, (state, batch, rates) -> (state, metrics).
        rates: jitted, from the number of updates done to the rates of the rules that train, by index.
        shapes, shardings: of the state.
        trained: paths of the parameters that train.
    """

    def __init__(
        self,
        experiment: Experiment,
        index: int,
        opened: OpenedModel,
        mesh: Mesh,
        like: StageRun | None = None,
    ) -> None:
        self.stage: Stage = experiment.stages[index]
        self.settings: Train = experiment.settings(self.stage)
        self.mesh = mesh
        self._options = dict(self.settings.compiler_options)
        _check_options(self._options)
        self._ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
        self._check_batch()
        all_rules = [Rule(*rule) for rule in self.stage.rules]
        labels = label_parameters(opened.shapes, all_rules, self.stage.name)
        rules = trained_rules(all_rules)
        self.trained = frozenset(path for path, label in labels.items() if label in rules)
        if not self.trained:
            raise ConfigError(f"stage {self.stage.name!r}: every parameter is frozen, nothing would train")
        self._labels = {path: labels[path] for path in self.trained}
        self._names = {
            index: "learning_rate" if len(rules) == 1 else f"learning_rate {all_rules[index].pattern}"
            for index in rules
        }
        self._schedules = {index: schedule.build(self.settings.steps) for index, schedule in rules.items()}
        self.rates = jax.jit(lambda count: {index: rate(count) for index, rate in self._schedules.items()})
        self._key = jax.random.fold_in(jax.random.key(self.settings.seed), index + 1)
        shapes = jax.eval_shape(self._create, opened.shapes, self._key)
        self.shapes: TrainState = shapes
        self.shardings = state_shardings(shapes, opened.shardings, mesh)
        same = like is not None and self._program() == like._program()
        self.step: Any = like.step if like is not None and same else self._jit(opened.model)

    def _program(self) -> dict[str, Any]:
        """All that the step is made of, but for the model and the mesh, which a run has one of."""
        names = ("accumulate", "ema_decay", "compiler_options", *_OPTIMIZER)
        settings = {name: getattr(self.settings, name) for name in names}
        return {"loss": self.stage.loss, "labels": self._labels, "names": self._names, **settings}

    def _jit(self, model: nn.Module) -> Any:
        """The rates are an input, so that stages of other lengths and rates need no other program."""

        def step(state: TrainState, batch: Batch, rates: dict[int, jax.Array]) -> tuple[TrainState, Metrics]:
            schedules = {index: optax.constant_schedule(rate) for index, rate in rates.items()}
            train_step = make_train_step(
                model,
                self.stage.loss,
                self._optimizer(schedules),
                accumulate=self.settings.accumulate,
                ema_decay=self.settings.ema_decay,
                rates={name: schedules[index] for index, name in self._names.items()},
                mesh=self.mesh if self._ways > 1 else None,
            )
            # Said to the layers, so that they keep their rows split.
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return train_step(state, batch)

        same = replicated(self.mesh)
        return jax.jit(
            step,
            in_shardings=(self.shardings, batch_sharding(self.mesh), same),
            out_shardings=(self.shardings, same),
            donate_argnums=0,
            compiler_options=self._options,
        )

    def _optimizer(self, schedules: Mapping[int, optax.Schedule]) -> optax.GradientTransformation:
        settings = {name: getattr(self.settings, name) for name in _OPTIMIZER}
        return make_optimizer(self._labels, schedules, **settings)

    def fresh(self, params: Mapping[str, jax.Array]) -> TrainState:
        """The stage's first state, from all parameters, flat, whose memory it takes over."""
        create = jax.jit(self._create, out_shardings=self.shardings, donate_argnums=0)
        return create(dict(params), self._key)

    def restore(self, store: CheckpointStore, step: int) -> TrainState:
        """The state that a checkpoint of this stage holds."""
        shapes = jax.eval_shape(state_to_arrays, self.shapes)
        arrays = store.read_arrays(step, shapes, named_leaves(self.shardings))
        return state_from_arrays(self.shapes, arrays)

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch, as arrays over the mesh.

        Raises:
            DataError: integers that jax cannot hold.
        """
        sharding, size = batch_sharding(self.mesh), self.settings.batch_size

        def spread(rows: np.ndarray) -> jax.Array:
            # jax would cut them without a word, and two groups could become one.
            kept = jax.dtypes.canonicalize_dtype(rows.dtype)
            if kept != rows.dtype and rows.dtype.kind in "iu" and (rows.astype(kept) != rows).any():
                raise DataError(
                    f"stage {self.stage.name!r}: integers in the data do not fit {kept}; "
                    "number them anew, or set jax_enable_x64"
                )
            return jax.make_array_from_process_local_data(sharding, rows, (size, *rows.shape[1:]))

        return {name: spread(np.asarray(rows)) for name, rows in batch.items()}

    def steps(
        self,
        state: TrainState,
        cursor: Cursor,
        batches: Iterator[dict[str, Any]],
        settled: Callable[[Cursor, Metrics, Any], None],
        pause: Callable[[int], bool],
    ) -> tuple[TrainState, Cursor]:
        """Step until the stage ends or `pause` says so.

        Args:
            state: where to start.
            cursor: the same place, for the data.
            batches: the data's iterator, at that place.
            settled: called in order with every step that turned out good: its cursor, its metrics
                on the host, and the batch's sample numbers (None where it has none).
            pause: asked after every step, with the steps done.

        Returns:
            The state and its place, all steps settled.

        Raises:
            NotFiniteError: a step was not good.
        """
        flying: collections.deque[tuple[Cursor, Metrics, Any]] = collections.deque()
        good = cursor

        def settle(left: int) -> None:
            nonlocal good
            while len(flying) > left:
                place, metrics, ids = flying.popleft()
                values = jax.device_get(metrics)
                if not np.isfinite([*values["terms"].values(), values["grad_norm"]]).all():
                    term = term_name(values, int(state.bad_term))
                    raise NotFiniteError(good, state, place.step, term)
                good = place
                settled(place, values, ids)

        while cursor.step < self.settings.steps:
            batch = dict(next(batches))
            batch.pop("faults", None)
            ids = batch.pop("ids", None)
            cursor = Cursor(cursor.step + 1, batches.get_state())  # type: ignore[attr-defined]
            state, metrics = self.step(state, self.place(batch), self.rates(state.step))
            flying.append((cursor, metrics, ids))
            settle(STEPS_IN_FLIGHT)
            if pause(cursor.step):
                break
        settle(0)
        return state, cursor

    def _create(self, params: Mapping[str, jax.Array], key: jax.Array) -> TrainState:
        optimizer = self._optimizer(self._schedules)
        return create_state(params, self.trained, optimizer, key, ema=self.settings.ema_decay > 0)

    def _check_batch(self) -> None:
        ways = self._ways
        size, parts = self.settings.batch_size, self.settings.accumulate
        if size // parts % ways:
            raise ConfigError(
                f"stage {self.stage.name!r}: batch_size={size} in {parts} micro-batch(es) cannot be split "
                f"over {ways} devices; make it a multiple of {parts * ways}"
            )


def _check_options(options: Mapping[str, Any]) -> None:
    """Compile next to nothing with them, since XLA says only then what it thinks of them."""
    if not options:
        return

    def nothing() -> int:
        return 0

    try:
        jax.jit(nothing, compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"train.compiler_options: {str(error).splitlines()[0]}") from None
