"""`mmjax train EXPERIMENT.py`: from a file and flags to a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmjax.errors import ConfigError, MmjaxError

if TYPE_CHECKING:
    from mmjax.parallel.channel import Alone
    from mmjax.training.experiment import Experiment

USAGE = """usage: mmjax train EXPERIMENT.py [--resume | --overwrite] [--workdir DIR] [--smoke] [--debug]
                   [--coordinator HOST:PORT --process-id N --num-processes N] [--FIELD=VALUE ...]

Train what EXPERIMENT.py's function experiment() describes.

  --resume        go on from the newest whole checkpoint; the result is the same to the bit as that of
                  a run that was never stopped (from the start where there is no checkpoint)
  --overwrite     delete what an earlier run of this name left, and start again
  --workdir DIR   where checkpoints/, models/ and output/ go (default: here)
  --smoke         a quick try with the experiment's own small settings, under the name NAME-smoke
  --debug         show a traceback with an error
  --FIELD=VALUE   any field of the experiment: --train.steps=200, --stages.0.steps=10,
                  --stages.NAME.batch_size=32, --mesh=data=2,fsdp=4

Several processes (machines, or parts of one) train together. Under SLURM, Open MPI, Cloud TPU and GKE the
same command on each is enough; elsewhere each is told where process 0 listens, and who it is:
  --coordinator HOST:PORT   a free port of process 0's machine (or JAX_COORDINATOR_ADDRESS)
  --process-id N            from 0 (or JAX_PROCESS_ID); mpirun and SLURM give it
  --num-processes N         how many there are (or JAX_NUM_PROCESSES); mpirun and SLURM give it
  --heartbeat-timeout S     a process that is silent for S seconds counts as lost (default: 40)
  --start-timeout S         how long to wait for the others at the start (default: 300)
--workdir is a folder that all of them share, and batch_size counts the rows of all together.

Exit codes: 0 done, 1 an unexpected error, 2 an error that its message explains, 130 stopped by Ctrl-C,
143 by SIGTERM. The first Ctrl-C finishes the step and keeps a checkpoint, the second quits at once.
"""
_FLAGS = ("resume", "overwrite", "smoke", "debug")
_NUMBERS = ("process_id", "num_processes", "heartbeat_timeout", "start_timeout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed command line."""

    file: str
    workdir: str = "."
    resume: bool = False
    overwrite: bool = False
    smoke: bool = False
    debug: bool = False
    overrides: tuple[str, ...] = ()
    coordinator: str | None = None
    process_id: int | None = None
    num_processes: int | None = None
    heartbeat_timeout: int = 40
    start_timeout: int = 300


def main(argv: Sequence[str]) -> int:
    """Run `mmjax train` with the arguments after that word; returns the exit code."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    process = _Process()
    try:
        return _run(parse(argv), process)
    except BaseException as error:
        code = _report(error, process.index, debug="--debug" in argv)
        if process.index is not None:
            # What is left of the backend may wait at the interpreter's end for processes that are gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


class _Process:
    """Which of several processes this is, once that is known; None for one that is alone."""

    index: int | None = None


def _report(error: BaseException, process: int | None, *, debug: bool) -> int:
    """Print one line for an error; returns the exit code."""
    from mmjax.parallel.channel import prefix

    start = prefix(process or 0)
    if isinstance(error, KeyboardInterrupt):
        print(start + (str(error) or "stopped"), file=sys.stderr)
        return getattr(error, "exit_code", 130)
    if not isinstance(error, Exception):
        raise error
    if debug:
        traceback.print_exception(error)
    if isinstance(error, MmjaxError):
        print(f"{start}error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    # Not foreseen, so the kind matters; the traceback is one flag away.
    kind = type(error).__name__
    print(f"{start}error: {kind}: {error} (--debug shows where)", file=sys.stderr)
    return 1


def parse(argv: Sequence[str]) -> Command:
    """Read the arguments of `mmjax train`.

    Raises:
        ConfigError: no file, two files, or a flag without its value.

    >>> parse(["toy.py", "--resume", "--train.steps", "3"]).overrides
    ('train.steps=3',)
    """
    words, files, overrides = list(argv), [], []
    flags: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        name, found, value = word[2:].partition("=")
        if name in _FLAGS and not found:
            flags[name] = True
            continue
        if not found:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{word} needs a value: {word}=...")
            value = words.pop(0)
        field = name.replace("-", "_")
        if field in _NUMBERS:
            if not value.isdecimal() or (int(value) == 0 and field != "process_id"):
                raise ConfigError(f"--{name} {value!r} has to be a whole number")
            flags[field] = int(value)
        elif name in ("workdir", "coordinator"):
            flags[name] = value
        else:
            overrides.append(f"{name}={value}")
    if len(files) != 1:
        raise ConfigError(
            f"one experiment file is needed, got {' '.join(files) or 'none'}; see mmjax train --help"
        )
    return Command(file=files[0], overrides=tuple(overrides), **flags)


def load_experiment(file: str, overrides: Sequence[str] = (), *, smoke: bool = False) -> Experiment:
    """The experiment that a file describes, with overrides.

    Args:
        file: a Python file with a function `experiment()`.
        overrides: "path=value"; they go over what `smoke` sets.
        smoke: apply the experiment's own settings for a quick try.

    Raises:
        ConfigError: no such file, no such function, or what it returns is no Experiment.
    """
    from mmjax.training.experiment import Experiment
    from mmjax.training.overrides import apply_overrides

    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{file}: no such experiment file")
    name = f"mmjax_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: an experiment file ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Registered, so that dataclasses and pickles made in the file find their module.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except MmjaxError:
        raise
    except Exception as error:
        raise ConfigError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    make = getattr(module, "experiment", None)
    if not callable(make):
        raise ConfigError(f"{file}: there is no function experiment() in it")
    made = make()
    if not isinstance(made, Experiment):
        raise ConfigError(f"{file}: experiment() returned a {type(made).__name__} and not an Experiment")
    if smoke:
        made = apply_overrides(made, [f"name={made.name}-smoke", *made.smoke])
    return apply_overrides(made, overrides)


def _run(command: Command, process: _Process) -> int:
    from mmjax.parallel import keep_freed_memory, only_cpu

    # Before anything starts jax's devices, as the experiment's file may.
    if only_cpu():
        keep_freed_memory()
    from mmjax.parallel.channel import Alone
    from mmjax.parallel.distributed import find_launch
    from mmjax.parallel.rendezvous import connect

    launch = find_launch(
        coordinator=command.coordinator, num_processes=command.num_processes, process_id=command.process_id
    )
    channel = Alone()
    if launch is not None:
        import jax

        launch = dataclasses.replace(
            launch, start_timeout=command.start_timeout, heartbeat_timeout=command.heartbeat_timeout
        )
        process.index = launch.process_id or 0
        # Before the experiment's file, which may well look at jax's devices.
        launch.start()
        process.index = jax.process_index()
        hosts = (launch.coordinator.rpartition(":")[0].strip("[]"),) if launch.coordinator else ()
        channel = connect(command.heartbeat_timeout, hosts)
    _train(command, channel)
    if launch is not None:
        jax.distributed.shutdown()
    return 0


def _train(command: Command, channel: Alone) -> None:
    from mmjax.training.together import ending_together

    with ending_together(channel):
        experiment = load_experiment(command.file, command.overrides, smoke=command.smoke)
        from mmjax.training.loop import train

        train(
            experiment,
            workdir=command.workdir,
            resume=command.resume,
            overwrite=command.overwrite,
            channel=channel,
        )
