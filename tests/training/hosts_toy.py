"""The toy experiment for several processes: each makes its own rows; also an experiment file of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mmjax.errors import DataError
from mmjax.training import Experiment
from mmjax.training.outcome import Outcome
from tests.training.toy import ToyBatches, ToyData, toy_experiment


class HostBatches(ToyBatches):
    """This process's rows of the toy's batches."""

    def __init__(self, data: HostData, batch_size: int, seed: int, part: int, parts: int) -> None:
        super().__init__(data, batch_size, seed)
        self._rows = slice(part * batch_size // parts, (part + 1) * batch_size // parts)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        if self._batch == self.data.fails_at and jax.process_index() == 1:
            raise DataError("the shard is gone")
        faults = batch.pop("faults")
        return {**{name: rows[self._rows] for name, rows in batch.items()}, "faults": faults}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostData(ToyData):
    """Args: fails_at: number (from 1) of the batch that process 1 cannot read."""

    fails_at: int = 0

    def build(
        self,
        *,
        processor: Any,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        **_: Any,
    ) -> Any:
        return _Endless(self, batch_size, seed, process_index, process_count)


@dataclasses.dataclass(frozen=True)
class _Endless:
    data: HostData
    batch_size: int
    seed: int
    part: int
    parts: int

    def __iter__(self) -> HostBatches:
        return HostBatches(self.data, self.batch_size, self.seed, self.part, self.parts)


def squares(outcome: Outcome) -> dict[str, float]:
    """Something that needs every parameter and runs on this process's own devices."""
    total = jax.jit(lambda tree: sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)))(outcome.params)
    return {"squares": float(total), "mesh_size": outcome.mesh.size}


def experiment() -> Experiment:
    return toy_experiment(data=HostData(), evaluate=squares, mesh={"data": 1, "fsdp": -1})
