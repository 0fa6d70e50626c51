"""A run: its stages one after another, with checkpoints that it can be taken up from."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from mmjax.checkpoints.training import CheckpointStore
from mmjax.errors import TrainingError
from mmjax.parallel import make_mesh
from mmjax.parallel.channel import Alone
from mmjax.parallel.distributed import batch_part
from mmjax.parallel.rendezvous import connect
from mmjax.training.before import in_order, result_of
from mmjax.training.changes import changes, describe
from mmjax.training.experiment import Experiment
from mmjax.training.features import check_features
from mmjax.training.finish import finish, introduce, outcome_of
from mmjax.training.folders import RunFolders
from mmjax.training.interrupts import Interrupted, Interrupts
from mmjax.training.outcome import Outcome
from mmjax.training.progress import Meter, Reading, make_progress
from mmjax.training.records import Recorder
from mmjax.training.stage_run import Cursor, NotFiniteError, StageRun
from mmjax.training.state import TrainState, merge, state_to_arrays
from mmjax.training.step import GRADIENT, Metrics
from mmjax.training.together import claim, ending_together, newest_checkpoint


def train(
    experiment: Experiment,
    *,
    workdir: Path | str = ".",
    resume: bool = False,
    overwrite: bool = False,
    channel: Alone | None = None,
) -> Outcome:
    """Run an experiment, or what is left of it.

    Where `jax.distributed` has connected several processes, each calls this with the same arguments. Process
    0 writes the records, evaluates and exports. When one process ends, so do the others: where this cannot
    be an exception, because a collective waits for the one that is gone, the process prints why and exits.

    Args:
        experiment: what to run.
        workdir: folder that holds checkpoints/, models/ and output/.
        resume: go on from the newest checkpoint that is whole; from the start where there is none.
        overwrite: delete what an earlier run of this name left.
        channel: to the other processes, closed by the caller; None connects with those there are.

    Returns:
        The Outcome, with what `evaluate` found; in processes other than the first its parameters stay as
        they lie and its metrics are empty.

    Raises:
        ConfigError: the experiment does not fit together.
        TrainingError: the run cannot start or go on; the state before a bad step was kept first.
        CheckpointError: no checkpoint is whole, or the newest does not fit the experiment.
        Interrupted: SIGTERM or Ctrl-C, here or in another process; the state was kept first.
        PeerError: another process ended.
    """
    folders = RunFolders(Path(workdir), experiment.name)
    with contextlib.ExitStack() as stack:
        if channel is None:
            channel = connect()
            stack.enter_context(ending_together(channel))
        interrupts = stack.enter_context(Interrupts(channel.request_stop))
        stack.callback(folders.release)
        claim(folders, channel, interrupts, resume=resume, overwrite=overwrite)
        *earlier, last = in_order(experiment, Path(workdir))
        results: dict[str, Any] = {}
        for each in earlier:
            own = RunFolders(Path(workdir), each.name)
            with contextlib.ExitStack() as inner:
                inner.callback(own.release)
                claim(own, channel, interrupts, resume=resume, overwrite=overwrite)
                results[each.name] = _earlier(each, own, interrupts, channel)
        return Run(last, folders, interrupts, channel, results).go()


def _earlier(
    experiment: Experiment, folders: RunFolders, interrupts: Interrupts, channel: Alone
) -> dict[str, Any]:
    """The result of an experiment that another needs, which is run unless it has been; process 0 decides."""

    def left() -> dict[str, Any] | None:
        return channel.agree(result_of(folders) if channel.index == 0 else None)[0]

    result = left()
    exported = channel.agree(experiment.export is None or folders.model.is_dir())[0]
    if result is None or not exported:
        Run(experiment, folders, interrupts, channel).go()
        result = left()
    assert result is not None
    interrupts.check()
    return result


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        stage: index of the stage.
        cursor: the place in it.
        step: the same place, counted over all stages.
        checkpoint: the checkpoint it comes from; None at the very start.
        seconds: what was spent before.
        changes: settings that are others than when the checkpoint was written, which is allowed.
    """

    stage: int = 0
    cursor: Cursor = Cursor(0, None)
    step: int = 0
    checkpoint: int | None = None
    seconds: float = 0.0
    changes: tuple[str, ...] = ()


class Run:
    """One process's part of a run.

    Args:
        experiment: what to run.
        folders: claimed.
        interrupts: entered.
        channel: to the other processes.
        earlier: result.json of the experiments before this one, by name.
    """

    def __init__(
        self,
        experiment: Experiment,
        folders: RunFolders,
        interrupts: Interrupts,
        channel: Alone,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        self.began = time.monotonic()
        self.earlier = dict(earlier or {})
        self.channel = channel
        self.experiment, self.folders, self.interrupts = experiment, folders, interrupts
        if experiment.train.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", experiment.train.compilation_cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        self.store = CheckpointStore(folders.checkpoints, experiment.train.keep_checkpoints)
        self.mesh = make_mesh(dict(experiment.mesh) or None)
        self._part, self._parts = batch_part(self.mesh)
        key = jax.random.fold_in(jax.random.key(experiment.train.seed), 0)
        interrupts.check()
        self.opened = experiment.model.open(experiment.data, key, self.mesh)
        interrupts.check()
        self.stages: list[StageRun] = []
        for index in range(len(experiment.stages)):
            like = self.stages[-1] if self.stages else None
            self.stages.append(StageRun(experiment, index, self.opened, self.mesh, like))
        self.faults: dict[str, Any] = {}
        self._settings = describe(experiment)

    def go(self) -> Outcome:
        """Train what is left, then evaluate, export and draw."""
        start = self._find_start()
        self.interrupts.check()
        self.began -= start.seconds
        process = self.channel.index
        self.progress = make_progress(process)
        log_samples = self.experiment.train.log_samples
        self.recorder = Recorder(self.folders.output, start.step, log_samples=log_samples, process=process)
        try:
            introduce(self.progress, self.experiment, self.opened, self.mesh, self.stages[start.stage :])
            if start.checkpoint is not None:
                self.progress.say(f"resumed from {self.store.path(start.checkpoint)}")
                for line in start.changes:
                    self.progress.say(f"changed since that checkpoint: {line}")
            state = self._train(start, self._prepare())
            self.recorder.flush_to_disk()
            self.progress.close()
            with self.interrupts.raising():
                return finish(self, state)
        finally:
            self.progress.close()
            self.recorder.close()

    def _prepare(self) -> dict[str, jax.Array] | None:
        """Have the experiment make what its data needs; process 0 does, the others wait.

        Returns:
            The model's parameters, flat, where they had to be read for it.
        """
        if self.experiment.prepare is None:
            return None
        params = None
        if self.channel.index == 0:
            params = self.opened.params()
            with self.interrupts.raising():
                self.experiment.prepare(outcome_of(self, merge(params), self.mesh), self.progress.say)
        self.channel.agree(None)
        return params

    def _train(self, start: Start, params: Mapping[str, jax.Array] | None) -> TrainState:
        run = self.stages[start.stage]
        if start.checkpoint is None:
            state = run.fresh(self.opened.params() if params is None else params)
        else:
            params = None
            state = run.restore(self.store, start.checkpoint)
        self.interrupts.check()
        cursor, before = start.cursor, start.step - start.cursor.step
        for index in range(start.stage, len(self.stages)):
            if index > start.stage:
                run = self.stages[index]
                state = run.fresh({**state.params, **state.frozen})
                cursor = Cursor(0, None)
            if cursor.step < run.settings.steps:
                state = self._train_stage(run, state, cursor, before)
            before += run.settings.steps
        self._stop_if_asked_late(before)
        return state

    def _train_stage(self, run: StageRun, state: TrainState, cursor: Cursor, before: int) -> TrainState:
        """Train one stage to its end; `before` is the number of steps of the stages before it."""
        settings, meter = run.settings, Meter(run.settings.batch_size)

        def settled(place: Cursor, metrics: Metrics, ids: Any) -> None:
            meter.add(place.step, float(metrics["loss"]))
            self.recorder.add(run.stage.name, before + place.step, metrics, ids)
            if place.step % settings.log_every == 0 or place.step == settings.steps:
                loss, rate, left = meter.read(place.step, settings.steps)
                self.progress.report(run.stage.name, place.step, settings.steps, loss, rate, left)
                self.recorder.publish(before + place.step, rate)
                self._look_at_faults(run, batches)

        def pause(step: int) -> bool:
            every = settings.checkpoint_every
            go_on = self.channel.may_go_on(before + step) and self._stop_signal(before + step) is None
            return not go_on or bool(every and step % every == 0)

        data = run.stage.data if run.stage.data is not None else self.experiment.data
        opened, flat = self.opened, {**state.params, **state.frozen}
        check_features(data, opened.model, flat, opened.processor, run.trained)
        with self._batches(run, data, cursor) as batches:
            cursor = Cursor(cursor.step, batches.get_state())
            with self.interrupts.polite():
                while cursor.step < settings.steps:
                    try:
                        if self.channel.may_go_on(before + cursor.step):
                            state, cursor = run.steps(state, cursor, batches, settled, pause)
                    except NotFiniteError as error:
                        self._keep(run, error.state, error.cursor, before)
                        raise self._bad_step(run, error, before) from None
                    self._look_at_faults(run, batches)
                    self._keep(run, state, cursor, before)
                    self._stop_if_asked(before + cursor.step)
            self._stop_if_asked(before + cursor.step)
        return state

    @contextlib.contextmanager
    def _batches(self, run: StageRun, data: Any, cursor: Cursor) -> Iterator[Any]:
        reading = Reading(self.progress.say, f"{run.stage.name}: reading data")

        def progress(done: int, total: int) -> None:
            self.interrupts.check()
            reading(done, total)

        dataset = data.build(
            processor=self.opened.processor,
            batch_size=run.settings.batch_size,
            seed=run.settings.seed,
            split="train",
            process_index=self._part,
            process_count=self._parts,
            progress=progress,
        )
        batches = iter(dataset)
        try:
            if cursor.data is not None:
                batches.set_state(cursor.data)
            yield batches
        finally:
            batches.close()

    def _keep(self, run: StageRun, state: TrainState, cursor: Cursor, before: int) -> None:
        """Write a checkpoint, after the records that lead up to it."""
        self.recorder.flush_to_disk()
        meta = {
            "stage": run.stage.name,
            "stage_step": cursor.step,
            "data": cursor.data,
            "faults": self.faults,
            "seed": run.settings.seed,
            "batch_size": run.settings.batch_size,
            "settings": self._settings,
            "seconds": time.monotonic() - self.began,
        }
        self.store.save(before + cursor.step, state_to_arrays(state), meta)

    def _look_at_faults(self, run: StageRun, batches: Any) -> None:
        """Say what is broken in the data when it got more, and stop when it is too much."""
        known = self.faults.get(run.stage.name, {"counts": {}})["counts"]
        tally = batches.tally
        self.faults[run.stage.name] = tally.to_state()
        batches.check_faults()
        if tally.counts != known:
            self.progress.say(
                f"stage {run.stage.name}: {tally.summary()}; each was replaced by another sample"
            )

    def _stop_signal(self, step: int) -> int | None:
        """The signal that the run stops for after this step: at once where there is one process."""
        if self.channel.count == 1:
            return self.interrupts.requested
        halt = self.channel.halt
        return halt[1] if halt is not None and step >= halt[0] else None

    def _stop_if_asked(self, step: int) -> None:
        number = self._stop_signal(step)
        if number is not None:
            where = self.store.path(step)
            words = f"stopped after step {step}, kept in {where}; --resume goes on from there"
            raise Interrupted(number, words, agreed=True)

    def _stop_if_asked_late(self, step: int) -> None:
        """After the last step: a request that came too late to be settled before is one of all."""
        numbers = [number for number in self.channel.agree(self.interrupts.requested) if number is not None]
        if numbers:
            raise Interrupted(numbers[0], "stopped after the last step; --resume evaluates it", agreed=True)

    def _bad_step(self, run: StageRun, error: NotFiniteError, before: int) -> TrainingError:
        what = "the gradient" if error.term == GRADIENT else f"the loss term {error.term!r}"
        where = self.store.path(before + error.cursor.step)
        return TrainingError(
            f"stage {run.stage.name!r}, step {error.step}: {what} is not finite; the state before it is kept "
            f"in {where}. Look at that step's samples, or go on with --resume and a lower rate or clip_norm"
        )

    def _find_start(self) -> Start:
        """The newest whole checkpoint, or the beginning."""
        step = newest_checkpoint(
            self.store, self.channel, lambda line: print(line, file=sys.stderr, flush=True)
        )
        if step is None:
            return Start()
        meta = self.store.read_state(step)
        names = [stage.name for stage in self.experiment.stages]
        if meta["stage"] not in names:
            raise TrainingError(
                f"{self.store.path(step)} is of stage {meta['stage']!r}, which the experiment does not have"
            )
        index = names.index(meta["stage"])
        for name in ("seed", "batch_size"):
            now = getattr(self.stages[index].settings, name)
            if meta[name] != now:
                raise TrainingError(
                    f"train.{name} is {now} but the run to resume had {meta[name]}, so samples would come "
                    "in another order; set it back, or start again with --overwrite"
                )
        self.faults = dict(meta["faults"])
        different = changes(meta.get("settings", self._settings), self._settings)
        cursor = Cursor(meta["stage_step"], meta["data"])
        return Start(index, cursor, step, step, meta["seconds"], tuple(different))
