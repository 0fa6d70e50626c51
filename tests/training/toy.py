"""A model, data and an experiment so small that a run takes a second; also an experiment file of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.nn import Dense, dropout
from mmjax.training import FROZEN, Constant, Cosine, Experiment, FromConfig, Stage, Train

SAMPLES, WIDTH, CLASSES = 40, 8, 3
FAULTS = ("truncated",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    hidden: int = 16
    drop: float = 0.1


class ToyModel(nn.Module):
    """Two dense layers with dropout between them, and a learned temperature."""

    config: ToyConfig

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        return {"x": np.zeros((batch_size, WIDTH), np.float32)}

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        hidden = jnp.tanh(Dense(self.config.hidden, ("embed", "mlp"), name="eyes")(x))
        if not deterministic:
            hidden = dropout(hidden, self.config.drop, self.make_rng("dropout"))
        return Dense(CLASSES, ("mlp", "embed"), name="head")(hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredError:
    """Two terms, both means over the batch."""

    size: float = 1e-3

    def __call__(
        self, model: nn.Module, params: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array
    ) -> dict[str, jax.Array]:
        out = model.apply({"params": params}, batch["x"], deterministic=False, rngs={"dropout": key})
        assert isinstance(out, jax.Array)
        return {"fit": jnp.mean((out - batch["y"]) ** 2), "size": self.size * jnp.mean(out**2)}


class Tally:
    """Counts like those of mmjax.data's iterators."""

    def __init__(self) -> None:
        self.seen = 0
        self.counts: dict[str, int] = {}

    def summary(self) -> str:
        return f"{sum(self.counts.values())} of {self.seen} samples broken"

    def to_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "counts": dict(self.counts)}


class ToyBatches(Iterator[dict[str, np.ndarray]]):
    """Endless epochs, each in its own order, cut into batches."""

    def __init__(self, data: ToyData, batch_size: int, seed: int) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.tally = Tally()
        self._batch = 0

    def __next__(self) -> dict[str, np.ndarray]:
        positions = np.arange(self._batch * self.batch_size, (self._batch + 1) * self.batch_size)
        ids = np.array([self._order(p // SAMPLES)[p % SAMPLES] for p in positions], np.int64)
        self._batch += 1
        self.tally.seen += self.batch_size
        faults = int(np.isin(ids, self.data.broken).sum())
        if faults:
            self.tally.counts["truncated"] = self.tally.counts.get("truncated", 0) + faults
        x, y = toy_arrays()
        x = x[ids] * (np.nan if self._batch == self.data.bad_batch else 1.0)
        return {"x": x.astype(np.float32), "y": y[ids], "ids": ids, "faults": np.array([faults], np.int32)}

    def check_faults(self) -> None:
        from mmjax.errors import DataError

        bad = sum(self.tally.counts.values())
        if bad > self.data.max_fault_share * self.tally.seen:
            raise DataError(f"{self.tally.summary()}; more than max_fault_share={self.data.max_fault_share}")

    def get_state(self) -> dict[str, Any]:
        return {"batch": self._batch, "tally": self.tally.to_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._batch = state["batch"]
        self.tally.seen, self.tally.counts = state["tally"]["seen"], dict(state["tally"]["counts"])

    def close(self) -> None:
        pass

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(SAMPLES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyData:
    """Args: bad_batch: number (from 1) of the batch that is nan; broken: ids that count as replaced."""

    bad_batch: int = 0
    broken: tuple[int, ...] = ()
    max_fault_share: float = 1.0

    def build(self, *, processor: Any, batch_size: int, seed: int, **_: Any) -> Any:
        return _Endless(self, batch_size, seed)


@dataclasses.dataclass(frozen=True)
class _Endless:
    data: ToyData
    batch_size: int
    seed: int

    def __iter__(self) -> ToyBatches:
        return ToyBatches(self.data, self.batch_size, self.seed)


def toy_arrays() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    x = generator.standard_normal((SAMPLES, WIDTH)).astype(np.float32)
    return x, np.sin(x[:, :CLASSES]).astype(np.float32)


def toy_model(hidden: int = 16, drop: float = 0.1) -> ToyModel:
    return ToyModel(ToyConfig(hidden=hidden, drop=drop))


def toy_params(model: ToyModel, seed: int = 0) -> dict[str, jax.Array]:
    """Flat parameters, none of them zero."""
    from mmjax.training.state import flatten

    shapes = flatten(model.init(jax.random.key(0), **model.example_batch())["params"])
    generator = np.random.default_rng(seed)
    return {path: jnp.asarray(generator.standard_normal(x.shape), x.dtype) for path, x in shapes.items()}


def toy_batch(size: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    x, y = toy_arrays()
    rows = np.random.default_rng(seed).choice(SAMPLES, size, replace=False)
    return {"x": jnp.asarray(x[rows]), "y": jnp.asarray(y[rows])}


def toy_experiment(**changes: Any) -> Experiment:
    """Two stages: the head alone, then everything with an average."""
    fields: dict[str, Any] = {
        "name": "toy",
        "model": FromConfig(config=ToyConfig(), model=ToyModel),
        "data": ToyData(),
        "stages": (
            Stage(
                name="align",
                loss=SquaredError(),
                rules=(("eyes/.*", FROZEN), ("head/.*", Cosine(peak=0.01, warmup=2))),
            ),
            Stage(
                name="tune",
                loss=SquaredError(),
                rules=(("head/.*", Constant(value=0.001)), (".*", Cosine(peak=0.01, warmup=0.25))),
                batch_size=16,
                ema_decay=0.9,
            ),
        ),
        "train": Train(
            steps=10,
            batch_size=8,
            weight_decay=0.1,
            checkpoint_every=3,
            keep_checkpoints=3,
            log_every=4,
            log_samples=True,
        ),
        "mesh": {"data": 1, "fsdp": -1},
        "export": None,
    }
    return Experiment(**{**fields, **changes})


def experiment() -> Experiment:
    return toy_experiment()
