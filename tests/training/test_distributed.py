"""Several processes: real ones on this machine, some of them killed; and who is one of several at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmjax.checkpoints.training import CheckpointStore
from mmjax.errors import ConfigError
from mmjax.parallel.channel import Channel
from mmjax.parallel.distributed import Launch, find_launch
from mmjax.training.cli import main, parse
from tests.training.runs import arrays_of, left_by
from tests.training.test_kill import PROGRAM, newest, wait_for

HERE = Path(__file__).parent
TOY = HERE / "hosts_toy.py"
SETTINGS = ("--train.steps=12", "--train.checkpoint_every=2", "--train.log_every=1")
LOST = "error: process {} of this run ended or cannot be reached; start all processes again with --resume"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def start(command: list[str], devices: int = 1, **variables: str) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **variables}
    return subprocess.Popen(
        [sys.executable, "-W", "error", *command],
        env={**environment, "PYTHONPATH": str(HERE.parents[1])},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def communicate(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """Standard output and standard error of each, in bounded time; none is left behind."""
    try:
        return [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@dataclasses.dataclass
class Pair:
    """Runs the toy experiment in two processes of one device, which share a compilation cache."""

    cache: Path

    def start(self, workdir: Path, *flags: str) -> list[subprocess.Popen[str]]:
        where = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2", "--heartbeat-timeout=30"]
        settings = [*where, *SETTINGS, f"--train.compilation_cache={self.cache}", "--workdir", str(workdir)]
        program = ["-c", PROGRAM, str(TOY), *settings, *flags]
        return [start([*program, f"--process-id={index}"]) for index in range(2)]

    def end(self, processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
        """Exit code, standard output and standard error of each, in bounded time."""
        outputs = communicate(processes)
        return [(p.returncode, *texts) for p, texts in zip(processes, outputs, strict=True)]

    def interrupt(self, workdir: Path, step: int, index: int, number: int) -> list[tuple[int, str, str]]:
        """Go on until a step is kept, then send one process a signal."""
        processes = self.start(workdir, "--resume")
        wait_for(processes[0], lambda: newest(workdir) >= step)
        processes[index].send_signal(number)
        return self.end(processes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    for code, _, err in pair.end(pair.start(workdir)):
        assert (code, err) == (0, "")
    return workdir


def test_stopped_and_killed_processes_change_nothing(pair: Pair, whole: Path, tmp_path: Path) -> None:
    first, second = pair.interrupt(tmp_path, 2, 1, signal.SIGTERM)
    step = newest(tmp_path)
    words = (
        f"stopped after step {step}, kept in {tmp_path}/checkpoints/toy/{step}; --resume goes on from there"
    )
    assert first[::2] == (143, words + "\n")
    assert second[::2] == (143, f"process 1: {words}\n")

    first, second = pair.interrupt(tmp_path, step + 4, 1, signal.SIGKILL)
    assert (first[0], second[0]) == (1, -signal.SIGKILL), first
    assert first[2] == LOST.format(1) + "\n"

    # The coordinator is lost with process 0, of which XLA may have words of its own to say first.
    first, second = pair.interrupt(tmp_path, newest(tmp_path) + 4, 0, signal.SIGKILL)
    assert (first[0], second[0]) == (-signal.SIGKILL, 1), second
    assert second[2].splitlines()[-1] == "process 1: " + LOST.format(0)

    kept = newest(tmp_path)
    assert kept < 24
    for code, _, err in pair.end(pair.start(tmp_path, "--resume")):
        assert (code, err) == (0, "")
    assert left_by(tmp_path) == left_by(whole)


def test_one_process_with_other_devices_goes_on_with_what_two_left(whole: Path, tmp_path: Path) -> None:
    result = json.loads((whole / "output/toy/result.json").read_text())
    assert (result["processes"], result["devices"], result["metrics"]["mesh_size"]) == (2, 2, 1)
    # Each process read its own half of every batch.
    halves = [(whole / f"output/toy/samples{n}.csv").read_text().splitlines() for n in ("", ".1")]
    assert len(halves[0]) == len(halves[1]) == 25

    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for step in (22, 24):
        shutil.rmtree(tmp_path / f"checkpoints/toy/{step}")
    assert main([str(TOY), "--workdir", str(tmp_path), *SETTINGS, "--resume"]) == 0
    ours, theirs = (arrays_of(CheckpointStore(p / "checkpoints/toy").path(24)) for p in (tmp_path, whole))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.startswith("params"):
            a, b = (np.frombuffer(side[name], np.float32) for side in (ours, theirs))
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_an_error_in_one_process_ends_all(pair: Pair, tmp_path: Path) -> None:
    first, second = pair.end(pair.start(tmp_path, "--data.fails_at=5"))
    assert first[::2] == (2, "error: process 1 of this run ended: the shard is gone\n")
    assert second[::2] == (2, "process 1: error: the shard is gone\n")


def slurm_tasks() -> Iterator[dict[str, str]]:
    """What srun of SLURM 22.05 was seen to set; jax derives the port from the job's number."""
    job = next(n for n in range(os.getpid() % 2048, 4096) if is_free(65535 - 2**12 + 1 + n))
    step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    step |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    for number in ("0", "1"):
        yield {**step, "SLURM_PROCID": number, "SLURM_LOCALID": number}


def indexed_pods() -> Iterator[dict[str, str]]:
    """What Kubernetes sets in an indexed job, and a manifest that names the first pod."""
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    for number in ("0", "1"):
        yield {**job, "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": number}


def tpu_pods() -> Iterator[dict[str, str]]:
    """What GKE sets in the pods of a TPU slice, beside libtpu, which jax has to be told is there."""
    # Of several slices there is nothing: where a variable is not set, jax asks the metadata server.
    alone = {"MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": "", "MEGASCALE_COORDINATOR_ADDRESS": ""}
    for number in ("0", "1"):
        yield {**alone, "TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": number}


AS_ON_TPU = """
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
cloud_tpu_cluster.coordinator_port = "{port}"
"""


@pytest.mark.parametrize("launcher", [slurm_tasks, indexed_pods, tpu_pods])
def test_processes_of_a_launcher_find_each_other(launcher: Any, pair: Pair, tmp_path: Path) -> None:
    """By the variables of SLURM and of GKE's two kinds of jobs alone: no flag says who is who."""
    settings = ["--train.steps=1", f"--train.compilation_cache={pair.cache}", "--workdir", str(tmp_path)]
    before = AS_ON_TPU.format(port=free_port()) if launcher is tpu_pods else ""
    tasks = [start(["-c", before + PROGRAM, str(TOY), *settings], **names) for names in launcher()]
    assert [(code, err) for code, _, err in pair.end(tasks)] == [(0, ""), (0, "")]
    result = json.loads((tmp_path / "output/toy/result.json").read_text())
    assert (result["processes"], result["devices"]) == (2, 2)


def test_losses_of_two_processes_equal_dense() -> None:
    coordinator = f"127.0.0.1:{free_port()}"
    program = ["-m", "tests.training.hosts_losses", coordinator, "2"]
    processes = [start([*program, str(index)], devices=2) for index in range(2)]
    for out, err in communicate(processes):
        assert "exact" in out, err


def channels() -> list[Channel]:
    ends = socket.socketpair()
    return [Channel(index, 2, {1 - index: ends[index]}, 30.0) for index in range(2)]


def test_processes_agree_and_stop_after_the_farthest_step() -> None:
    pair = channels()
    heard: dict[int, object] = {}

    def work(index: int) -> None:
        values = [pair[index].agree(f"{index}-{round_}") for round_ in range(3)]
        step = 0
        while pair[index].may_go_on(step):
            step += 1
            time.sleep(0.001 * (1 + 4 * index))
            if (index, step) == (1, 5):
                pair[index].request_stop(signal.SIGTERM)
        heard[index] = values, step, pair[index].halt
        pair[index].close()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    values, step, halt = heard[0]  # type: ignore[misc]
    assert heard[0] == heard[1]
    assert values == [["0-0", "1-0"], ["0-1", "1-1"], ["0-2", "1-2"]]
    assert halt == (step, signal.SIGTERM)
    assert step >= 5


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({**SLURM, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
        ({**SLURM, "SLURM_NTASKS": "2"}, Launch()),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "2"}, Launch()),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Launch()),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_HOSTNAMES": "a"}, Launch()),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Launch()),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            Launch(coordinator="a:1", num_processes=3, process_id=2),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "PMI_SIZE": "3", "PMI_RANK": "2"},
            Launch(coordinator="a:1", num_processes=3, process_id=2),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JOB_COMPLETION_INDEX": "0"},
            Launch(coordinator="a:1", num_processes=3, process_id=0),
        ),
    ],
)
def test_who_is_one_of_several(environ: dict[str, str], wanted: Launch | None) -> None:
    assert find_launch(environ=environ) == wanted


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        ({"coordinator": "a:1"}, {}, "--coordinator without --num-processes and --process-id"),
        ({"process_id": 1}, {"JAX_NUM_PROCESSES": "2"}, "without --coordinator"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, {}, "'a' has to be HOST:PORT"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            {},
            "--process-id 2 has to be one of 0..1",
        ),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' has to be a whole number"),
        ({}, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "pass --coordinator HOST:PORT"),
    ],
)
def test_launches_that_cannot_be(flags: dict[str, object], environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_launch(environ=environ, **flags)  # type: ignore[arg-type]


def test_flags() -> None:
    command = parse(["e.py", "--coordinator", "a:1", "--process-id=1", "--num-processes=2"])
    assert (command.coordinator, command.process_id, command.num_processes) == ("a:1", 1, 2)
    with pytest.raises(ConfigError, match="--process-id 'x' has to be a whole number"):
        parse(["e.py", "--process-id=x"])
