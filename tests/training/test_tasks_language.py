"""The next-token task on a stand-in decoder: the loss it says it is, in micro-batches, and on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.data import FaultTally, PackedBatches
from mmjax.data.packing import fit_into_rows
from mmjax.errors import ConfigError, DataError
from mmjax.language import DecoderConfig
from mmjax.losses import next_token
from mmjax.models import CausalLM
from mmjax.nn import Dense, Embedding, dropout
from mmjax.parallel import make_mesh
from mmjax.training import NextToken, create_state, mean_loss
from mmjax.training.state import flatten
from mmjax.training.step import make_train_step

WORDS, WIDTH = 13, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandInConfig:
    logits_softcap: float | None = None
    drop: float = 0.0


class StandIn(nn.Module):
    """Sees a token and the one before it: enough of a decoder for the task's calls."""

    config: StandInConfig = StandInConfig()

    def setup(self) -> None:
        self.embed_tokens = Embedding(WORDS, WIDTH, ("vocab", "embed"))
        self.mix = Dense(WIDTH, ("embed", "mlp"))

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros((batch_size, 4), np.int32)}

    def hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, None]:
        x = self.embed_tokens(input_ids)
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        x = jnp.tanh(self.mix(x + 0.5 * before))
        return dropout(x, self.config.drop, None if deterministic else self.make_rng("dropout")), None

    def output_kernel(self) -> jax.Array:
        return self.embed_tokens.table().T

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        return self.hidden(input_ids)[0] @ self.output_kernel()


def params_of(model: StandIn) -> dict[str, Any]:
    shapes = model.init(jax.random.key(0), **model.example_batch())["params"]
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(generator.standard_normal(x.shape), x.dtype), shapes)


def batch_of(rows: int = 8, length: int = 6) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(2)
    ids = generator.integers(0, WORDS, (rows, length)).astype(np.int32)
    labels = ids.copy()
    labels[: rows // 2, 1:4] = labels[1] = -100  # micro-batches have different numbers of labels
    return {"input_ids": ids, "labels": labels, "attention_mask": np.ones_like(ids)}


def expected_loss(model: StandIn, params: Any, batch: Any, **options: Any) -> Any:
    hidden = model.apply({"params": params}, batch["input_ids"], method="hidden")[0]
    kernel = model.apply({"params": params}, method="output_kernel")
    return next_token(hidden, kernel, batch["labels"], **options)


KEY = jax.random.key(3)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_it_is_the_loss_of_the_hidden_states(cap):
    model = StandIn(StandInConfig(logits_softcap=cap))
    params, batch = params_of(model), batch_of()
    terms = NextToken(sequence_block=4, vocabulary_block=5)(model, params, batch, KEY)
    assert list(terms) == ["next_token"]
    np.testing.assert_allclose(
        terms["next_token"], expected_loss(model, params, batch, softcap=cap), rtol=1e-6
    )


def test_labels_come_from_mask_and_segments_where_there_are_none():
    model, batch = StandIn(), batch_of()
    del batch["labels"]
    batch["attention_mask"][0, 4:] = 0
    batch["segment_ids"] = np.repeat(np.array([[1, 1, 1, 2, 2, 2]], np.int32), 8, 0)
    labels = np.where(batch["attention_mask"] != 0, batch["input_ids"], -100)
    labels[:, 3] = -100
    params = params_of(model)
    found = NextToken()(model, params, batch, KEY)["next_token"]
    np.testing.assert_allclose(found, expected_loss(model, params, {**batch, "labels": labels}), rtol=1e-6)


def test_weights_of_labels():
    model, batch = StandIn(), batch_of()
    weights = np.random.default_rng(0).uniform(0, 2, batch["labels"].shape).astype(np.float32)
    params = params_of(model)
    found = NextToken()(model, params, {**batch, "label_weights": weights}, KEY)["next_token"]
    np.testing.assert_allclose(found, expected_loss(model, params, batch, weights=weights), rtol=1e-6)


def step_of(batch: Any, *, accumulate: int = 1, mesh: Any = None, drop: float = 0.0) -> Any:
    """Loss and gradients of one step, read off plain gradient descent."""
    model = StandIn(StandInConfig(drop=drop))
    flat = flatten(params_of(model))
    optimizer = optax.sgd(1.0)
    state = create_state(flat, frozenset(flat), optimizer, KEY)
    step = jax.jit(make_train_step(model, NextToken(), optimizer, accumulate=accumulate, mesh=mesh))
    after, metrics = step(state, batch)
    return float(metrics["loss"]), {path: np.asarray(flat[path] - after.params[path]) for path in flat}


def test_micro_batches_with_different_numbers_of_labels_are_the_whole_batch():
    whole, in_parts = step_of(batch_of()), step_of(batch_of(), accumulate=4)
    np.testing.assert_allclose(in_parts[0], whole[0], rtol=1e-6)
    for path, gradient in whole[1].items():
        assert np.abs(in_parts[1][path] - gradient).max() <= 2e-6 * np.abs(gradient).max(), path


def test_rows_on_eight_devices_are_the_whole_batch():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batch = {name: jax.device_put(x, rows) for name, x in batch_of().items()}
    whole, spread = step_of(batch_of()), step_of(batch, mesh=mesh)
    np.testing.assert_allclose(spread[0], whole[0], rtol=1e-6)
    for path, gradient in whole[1].items():
        assert np.abs(spread[1][path] - gradient).max() <= 2e-6 * np.abs(gradient).max(), path


def test_mean_loss_is_over_all_labels_of_all_batches():
    model, batch = StandIn(StandInConfig(drop=0.5)), batch_of()
    params = params_of(model)
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 3), slice(3, 8))]
    found = mean_loss(model, params, [{**part, "ids": np.arange(3)} for part in parts])
    np.testing.assert_allclose(found, expected_loss(model, params, batch), rtol=1e-6)
    with pytest.raises(DataError, match="no label"):
        mean_loss(model, params, [{**batch, "labels": np.full((8, 6), -100)}])


def test_packed_rows_are_worth_what_their_documents_are():
    """On a real decoder, which keeps segments apart: packed rows against a row for each document."""
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24}
    config = DecoderConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = CausalLM(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_batch())["params"]
    generator = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * generator.standard_normal(x.shape), x.dtype), shapes)
    documents = [generator.integers(0, 20, size).astype(np.int32) for size in (5, 3, 9, 4)]
    packing: dict[str, Any] = {
        "documents": documents,
        "learned": None,
        "pad_id": 0,
        "batch_size": 1,
        "process_index": 0,
        "process_count": 1,
        "seed": 0,
        "tally": FaultTally(),
        "max_fault_share": 0.0,
        "identity": {},
    }
    packed = PackedBatches(rows=fit_into_rows([5, 3, 9, 4], 12), row_length=12, **packing)
    apart = PackedBatches(rows=[[(d, 0, len(x))] for d, x in enumerate(documents)], row_length=9, **packing)
    assert packed.samples == 2
    losses = [
        mean_loss(model, params, [each.batch(n) for n in range(each.samples)]) for each in (packed, apart)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-6)


def test_dropout_follows_the_key():
    assert step_of(batch_of(), drop=0.5)[0] != step_of(batch_of())[0]
    assert step_of(batch_of(), drop=0.5)[0] == step_of(batch_of(), drop=0.5)[0]


def test_a_batch_without_ids_is_refused():
    with pytest.raises(ConfigError, match="no 'input_ids'; it has pixel_values"):
        NextToken()(StandIn(), {}, {"pixel_values": np.zeros((1, 2))}, KEY)
