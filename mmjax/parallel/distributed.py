"""Starting a run of several processes: who they are, and which rows of a batch are whose."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import socket
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mmjax.errors import ConfigError
from mmjax.parallel.channel import leave_abort_alone, prefix, speak_before_abort
from mmjax.parallel.mesh import batch_sharding

_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# Launchers that tell every process its number: (processes, number).
_RANKS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
)
# What jax reads under SLURM; a batch script that did not come through srun lacks some of them.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How the processes of a run find each other; what is None is left to jax's cluster detection.

    Args:
        coordinator: HOST:PORT of process 0, where it listens.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        start_timeout: seconds to wait for the others at the start.
        heartbeat_timeout: seconds of silence after which a process counts as lost.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout: int = 300
    heartbeat_timeout: int = 40

    def start(self) -> None:
        """Connect this process with the others; has to come before anything else that uses jax's devices.

        Raises:
            ConfigError: the others cannot be reached, or the cluster does not say who this process is.
        """
        import jax

        where = f" at {self.coordinator}" if self.coordinator else ""
        advice = "check --coordinator, --process-id and --num-processes of each process"
        start = prefix(self.process_id or 0)
        late = f"not all processes of this run connected{where} within {self.start_timeout} seconds"
        if self.coordinator and self.process_id:
            _wait_for(self.coordinator, self.start_timeout, f"{late}; {advice}")
        speak_before_abort(f"{start}error: {late}; {advice}")
        # It would take SIGTERM for itself, which `Interrupts` answers.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            with warnings.catch_warnings():
                # The look-up of clusters warns of a package that a job of numbered pods can do without.
                warnings.filterwarnings("ignore", "\\s*Kubernetes environment detected")
                jax.distributed.initialize(
                    self.coordinator,
                    self.num_processes,
                    self.process_id,
                    initialization_timeout=self.start_timeout,
                    # A lost process is noticed by `Channel` first, whose words are plainer.
                    heartbeat_timeout_seconds=2 * self.heartbeat_timeout + 20,
                    shutdown_timeout_seconds=2 * self.heartbeat_timeout,
                )
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"the processes of this run cannot be connected{where}: {reason}; {advice}"
            ) from error
        leave_abort_alone()


def find_launch(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Launch | None:
    """Whether this process is one of several, from flags first and the environment second.

    Args:
        coordinator: HOST:PORT, or None.
        num_processes: or None.
        process_id: or None.
        environ: environment variables: jax's own, then those of SLURM, Open MPI, MPICH, Cloud TPU and
            Kubernetes.

    Returns:
        None for a process that is alone, such as the only task of a SLURM job.

    Raises:
        ConfigError: what is given says that there are others, but not where or which.

    >>> find_launch(coordinator="10.0.0.1:1234", num_processes=2, process_id=0).process_id
    0
    >>> find_launch(environ={"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    """
    given: dict[str, Any] = {
        "coordinator": coordinator or environ.get(_VARIABLES["coordinator"]) or None,
        "num_processes": _number(num_processes, "num_processes", environ),
        "process_id": _number(process_id, "process_id", environ),
    }
    found = any(value is not None for value in given.values())
    if found and None in given.values():
        given = _with_ranks(given, environ)
    if given["num_processes"] == 1 and not given["process_id"]:
        return None
    if None not in given.values():
        return _checked(Launch(**given))
    if _detected(environ):
        return Launch(**given)
    if not found:
        _refuse_lonely_mpi(environ)
        return None
    missing = [_flag(name) for name, value in given.items() if value is None]
    present = [_flag(name) for name, value in given.items() if value is not None]
    raise ConfigError(
        f"{' and '.join(present)} without {' and '.join(missing)}: a run of several processes needs all "
        "three, as flags or as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    )


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process has to read: (index, number of parts).

    Processes whose devices hold the same rows (those that share one along the mesh axis "tensor") read the
    same part.

    Raises:
        ConfigError: the processes' rows overlap in part, or are not as many.

    >>> from mmjax.parallel import make_mesh
    >>> batch_part(make_mesh())
    (0, 1)
    """
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((mesh.size,))
    rows: dict[int, set[int]] = {}
    for device, (place,) in places.items():
        rows.setdefault(device.process_index, set()).update(range(*place.indices(mesh.size)))
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, parts)) != len(set().union(*parts)) or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"mesh: {dict(mesh.shape)} gives the {len(rows)} processes rows of the batch that overlap; make "
            "data * fsdp a multiple of the number of processes, or tensor a multiple of the devices of one"
        )
    import jax

    mine = tuple(sorted(rows[jax.process_index()]))
    return parts.index(mine), len(parts)


def local_mesh_shape(mesh: Mesh) -> dict[str, int]:
    """The shape for a mesh of this process's own devices: parameters are split where they were before."""
    return {"fsdp" if np.prod([mesh.shape["fsdp"], mesh.shape["tensor"]]) > 1 else "data": -1}


def _wait_for(coordinator: str, seconds: float, words: str) -> None:
    """Wait until process 0 listens: XLA would end its own wait with an abort."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 5.0):
            return
        time.sleep(0.2)
    raise ConfigError(words)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number(value: int | None, name: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(_VARIABLES[name], "")
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise ConfigError(f"{_VARIABLES[name]}={text!r} has to be a whole number")
    return int(text)


def _with_ranks(given: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Numbers that the launcher gave, where the flags name only the coordinator."""
    ranks = next(((environ[n], environ[k]) for n, k in _RANKS if n in environ and k in environ), None)
    if ranks is None:
        ranks = ("", environ.get("JOB_COMPLETION_INDEX", ""))
    numbers = [int(text) if text.isdecimal() else None for text in ranks]
    known = dict(zip(("num_processes", "process_id"), numbers, strict=True))
    return {name: known.get(name) if value is None else value for name, value in given.items()}


def _checked(launch: Launch) -> Launch:
    host, _, port = (launch.coordinator or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator {launch.coordinator!r} has to be HOST:PORT of process 0")
    count, index = launch.num_processes or 0, launch.process_id or 0
    if count < 1 or not 0 <= index < count:
        raise ConfigError(
            f"--process-id {index} has to be one of 0..{max(count - 1, 0)}, as --num-processes is {count}"
        )
    return launch


def _detected(environ: Mapping[str, str]) -> bool:
    """Whether the environment is one of several processes that jax finds the coordinator of."""

    def count(name: str) -> int:
        text = environ.get(name, "1")
        return int(text) if text.isdecimal() else 1

    if all(name in environ for name in _SLURM):
        # srun may start one task inside a job of several.
        step = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        return min(count("SLURM_NTASKS"), count(step)) > 1
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return count("OMPI_COMM_WORLD_SIZE") > 1
    # A slice of one host lists no other, and the slices may be several.
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if "," in hosts or (hosts and count("MEGASCALE_NUM_SLICES") > 1):
        return True
    in_indexed_job = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    return in_indexed_job and importlib.util.find_spec("kubernetes") is not None


def _refuse_lonely_mpi(environ: Mapping[str, str]) -> None:
    """Processes that a launcher started together would each train the whole run, in one folder."""
    for size, rank in _RANKS[:2]:
        if rank in environ and environ.get(size, "1").isdecimal() and int(environ.get(size, "1")) > 1:
            raise ConfigError(
                f"{size}={environ[size]} processes were started, but nothing says where process 0 listens: "
                "pass --coordinator HOST:PORT (a free port of its machine)"
            )
