"""What a finished run hands to the experiment's own functions."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run.

    Attributes:
        name: the run's name.
        model: the Linen module.
        params: nested parameters; the moving average where the last stage kept one.
        processor: the model's processor, or None.
        data: the experiment's data config.
        mesh: the mesh the parameters lie on.
        folder: output/<name>, for further files.
        metrics: what `evaluate` returned (empty while it runs).
    """

    name: str
    model: Any
    params: Mapping[str, Any]
    processor: Any
    data: Any
    mesh: Mesh
    folder: Path
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def history(self) -> dict[str, np.ndarray]:
        """metrics.csv by column: "stage" as strings, "step" as int64, the rest float64 (nan where empty)."""
        return read_metrics(self.folder / "metrics.csv")


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Read a metrics.csv; see `Outcome.history`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0]) if rows else []
    columns: dict[str, np.ndarray] = {}
    for name in names:
        texts = [row[name] for row in rows]
        if name == "stage":
            columns[name] = np.array(texts)
        elif name == "step":
            columns[name] = np.array(texts, np.int64)
        else:
            columns[name] = np.array([float(text) if text else np.nan for text in texts])
    return columns


def export_hub(outcome: Outcome, folder: Path) -> None:
    """Write the final weights in hub format."""
    from mmjax.models.hub import save

    save(folder, outcome.model, outcome.params, outcome.processor)
