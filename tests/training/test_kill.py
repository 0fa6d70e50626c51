"""Real processes, really killed: the run ends bitwise as one that was never stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.runs import left_by

KILLS = 20
PROGRAM = "import sys; from mmjax.training.cli import main; sys.exit(main(sys.argv[1:]))"
TOY = Path(__file__).with_name("toy.py")
# A checkpoint after every step: most of the time goes into writing them, so most kills meet one.
SETTINGS = ("--train.steps=20", "--train.checkpoint_every=1", "--train.log_every=1")


class Runner:
    """Starts the toy experiment in processes of one device that share a compilation cache."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self.environment["XLA_FLAGS"] = ""

    def start(self, workdir: Path, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, str(TOY), "--workdir", str(workdir), *flags]
        command += [*SETTINGS, f"--train.compilation_cache={self.cache}"]
        return subprocess.Popen(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finish(self, workdir: Path, *flags: str) -> str:
        process = self.start(workdir, *flags)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, ""), err
        return out


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    runner.finish(workdir)
    return workdir


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something happened, or the process ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and not happened() and time.monotonic() < end:
        time.sleep(0.001)


def entries(workdir: Path) -> list[str]:
    try:
        return os.listdir(workdir / "checkpoints" / "toy")
    except FileNotFoundError:
        return []


def newest(workdir: Path) -> int:
    return max([int(name) for name in entries(workdir) if name.isdecimal()], default=-1)


def writing(workdir: Path, after: int) -> bool:
    """Whether a checkpoint of a step above `after` is being written right now."""
    marks = [name.removeprefix(".writing-") for name in entries(workdir) if name.startswith(".writing-")]
    return any(int(step) > after for step in marks)


def moment(kind: str, process: subprocess.Popen[str], workdir: Path, step: int, share: float) -> None:
    """Wait for a moment to kill at: early (imports, restore), after a step, or while one is written."""
    if kind == "early":
        end = time.monotonic() + 3.0 * share
        wait_for(process, lambda: time.monotonic() > end)
    elif kind == "step":
        wait_for(process, lambda: newest(workdir) >= step)
        time.sleep(0.05 * share)
    else:
        wait_for(process, lambda: writing(workdir, step))
        time.sleep(0.1 * share)


def test_twenty_kills_change_nothing(runner: Runner, whole: Path, tmp_path: Path) -> None:
    chance = random.Random(7)
    workdir, runs = tmp_path / "0", 1
    kinds = {"early": 0, "step": 0, "writing": 0}
    while sum(kinds.values()) < KILLS or min(kinds.values()) == 0:
        assert runs < KILLS, f"too fast to be killed: {kinds}"
        process = runner.start(workdir, "--resume")
        kind = chance.choice(["early", "step", "writing", "writing"])
        moment(kind, process, workdir, newest(workdir) + chance.randint(1, 3), chance.random())
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kinds[kind] += 1
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), err
        assert err == ""
        if process.returncode == 0:
            # A fast machine gets to the end before its kills are used up: they go on with another run.
            assert left_by(workdir) == left_by(whole)
            workdir, runs = tmp_path / str(runs), runs + 1
    runner.finish(workdir, "--resume")
    assert left_by(workdir) == left_by(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_keeps_a_checkpoint(
    runner: Runner, whole: Path, tmp_path: Path, number: int, code: int
) -> None:
    process = runner.start(tmp_path)
    wait_for(process, lambda: newest(tmp_path) >= 23)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    step = newest(tmp_path)
    where = tmp_path / "checkpoints" / "toy" / str(step)
    assert err == f"stopped after step {step}, kept in {where}; --resume goes on from there\n"
    assert f"resumed from {where}" in runner.finish(tmp_path, "--resume")
    assert left_by(tmp_path) == left_by(whole)


def test_a_signal_while_it_starts_ends_it_in_one_line(runner: Runner, tmp_path: Path) -> None:
    process = runner.start(tmp_path)
    wait_for(process, lambda: (tmp_path / "checkpoints" / ".toy.lock").exists())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.count("\n") == 1
    assert err.startswith("stopped")
