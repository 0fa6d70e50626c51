"""Several processes as one run: they start from the same place, and none outlives another's end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mmjax.checkpoints.training import CheckpointStore
from mmjax.errors import CheckpointError, MmjaxError
from mmjax.parallel import make_mesh, param_shardings, replicated
from mmjax.parallel.channel import Alone, PeerError
from mmjax.parallel.distributed import local_mesh_shape
from mmjax.training.folders import RunFolders
from mmjax.training.interrupts import Interrupted, Interrupts
from mmjax.training.state import flatten, merge

# How long to wait for the word that another process is gone, before an error here counts as this one's own:
# a collective fails the moment its peer dies, and so may whatever was built on it.
_RUNTIME_SECONDS, _OTHER_SECONDS = 4.0, 0.5


@contextlib.contextmanager
def ending_together(channel: Alone) -> Iterator[None]:
    """Context that tells the other processes why this one ends, and prefers their reason to its results.

    Raises:
        PeerError: another process ended first.
    """
    try:
        yield
        channel.close()
    except PeerError:
        channel.farewell()
        raise
    except BaseException as error:
        if channel.count == 1:
            raise
        if isinstance(error, Interrupted) and error.agreed:
            channel.close()
            raise
        if isinstance(error, Exception):
            runtime = isinstance(error, jax.errors.JaxRuntimeError)
            verdict = channel.verdict(_RUNTIME_SECONDS if runtime else _OTHER_SECONDS)
            if verdict is not None:
                channel.farewell()
                raise verdict from None
        channel.tell(_words(error), _exit_code(error))
        raise


def claim(
    folders: RunFolders, channel: Alone, interrupts: Interrupts, *, resume: bool, overwrite: bool
) -> None:
    """Take the run's folders, which process 0 does for all.

    Args:
        folders: the caller releases them, also when this raises.
        channel: to the other processes.
        interrupts: entered; a signal waits while the folders are taken, not while others are waited for.
        resume: go on with a run that they hold.
        overwrite: delete it.

    Raises:
        TrainingError: they are taken, or hold a run, or are not the same folders in all processes.
    """
    word = None
    if channel.index == 0:
        folders.claim(resume=resume, overwrite=overwrite)
        word = folders.mark() if channel.count > 1 else None
    with interrupts.raising():
        word = channel.agree(word)[0]
        if channel.index:
            folders.check_mark(word)


def newest_checkpoint(store: CheckpointStore, channel: Alone, report: Any) -> int | None:
    """The newest whole checkpoint, as process 0 finds it; later damaged ones are set aside.

    Raises:
        CheckpointError: none is whole, or this process does not see it.
    """
    step = None
    if channel.index == 0:
        step = store.newest(report)
        if step is not None:
            store.set_aside(after=step)
    step = channel.agree(step)[0]
    if step is not None and not store.path(step).is_dir():
        raise CheckpointError(
            f"{store.path(step)} of process 0 is not seen here: --workdir has to be a folder that all share"
        )
    return step


def gather(model: Any, params: Mapping[str, Any], mesh: Mesh) -> tuple[dict[str, Any] | None, Mesh]:
    """Parameters of a mesh over several processes, on a mesh of process 0's own devices.

    Args:
        model: the module, which names the parameters' axes.
        params: nested; every process calls this.
        mesh: where they lie.

    Returns:
        Nested parameters and their mesh in process 0; None and the mesh in the others.
    """
    local = make_mesh(local_mesh_shape(mesh), jax.local_devices())
    flat, kept = flatten(params), {}
    shardings = dict.fromkeys(flat, replicated(local))
    if local.size > 1:
        from mmjax.nn import parameter_specs

        shardings = flatten(param_shardings(local, parameter_specs(model)))
    for path, leaf in flat.items():
        # One at a time: nothing but the largest is ever held twice.
        whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        if jax.process_index() == 0:
            kept[path] = jax.device_put(whole, shardings[path])
    return (merge(kept), local) if jax.process_index() == 0 else (None, local)


def add_faults(all_faults: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The broken samples of all processes: counts added up, a few names.

    >>> one = {"tune": {"seen": 4, "counts": {"truncated": 1}, "examples": [["truncated", "a"]]}}
    >>> add_faults([one, one])["tune"]["counts"]
    {'truncated': 2}
    """
    total: dict[str, Any] = {}
    for faults in all_faults:
        for stage, tally in faults.items():
            if stage not in total:
                total[stage] = {**tally, "counts": dict(tally["counts"])}
                continue
            into = total[stage]
            into["seen"] += tally["seen"]
            for cause, number in tally["counts"].items():
                into["counts"][cause] = into["counts"].get(cause, 0) + number
            if "examples" in tally:
                into["examples"] = [*into.get("examples", []), *tally["examples"]][:3]
    return total


def _words(error: BaseException) -> str:
    if isinstance(error, MmjaxError | Interrupted):
        return str(error)
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", 130)
    return 2 if isinstance(error, MmjaxError) else 1
