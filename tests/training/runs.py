"""What a run left, in a form that two runs can be compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmjax.checkpoints.training import ARRAYS, CheckpointStore

RECORDS = ("metrics.csv", "samples.csv")


def arrays_of(checkpoint: Path) -> dict[str, bytes]:
    """Every array of a checkpoint, as bytes, read without the trainer."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        shapes = reader.metadata(checkpoint / ARRAYS).item_metadata.tree
        numpy_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in shapes}
        tree = reader.restore(checkpoint / ARRAYS, args=ocp.args.PyTreeRestore(restore_args=numpy_args))
    return {name: np.asarray(x).tobytes() for name, x in tree.items()}


def left_by(workdir: Path, name: str = "toy") -> dict[str, Any]:
    """All that has to be equal between two runs: records, arrays and data state of the newest checkpoint."""
    store = CheckpointStore(workdir / "checkpoints" / name)
    step = store.newest(pytest.fail)
    assert step is not None
    state = {key: value for key, value in store.read_state(step).items() if key != "seconds"}
    records = {file: (workdir / "output" / name / file).read_bytes() for file in RECORDS}
    return {"step": step, "state": state, "arrays": arrays_of(store.path(step)), **records}
