"""Tasks on text: what a stage of a language model minimises."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax import losses
from mmjax.errors import ConfigError, DataError
from mmjax.nn.kernels import as_array
from mmjax.parallel import BATCH_AXES
from mmjax.training.step import Batch, Terms, in_micro_batches
from mmjax.vision.anyres import NEWLINE

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "segment_ids")
IMAGE_INPUTS = ("pixel_values", "image_index", "image_weights", "image_features")
ROW_IMAGES = ("tiles", "tile_features")
IGNORED = -100


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy of every token given those before it, the mean over all labels of the whole batch.

    The batch has `input_ids` [B, T] and may have `attention_mask`, `position_ids`, `segment_ids` and
    `labels`, each [B, T]. Labels are the input ids with -100 where nothing is to be learned (see
    `mmjax.losses.next_token`); without them every token counts that the mask shows and that does not begin
    a segment. `label_weights` [B, T], where the batch has them, weigh the labels.

    A model that sees takes images in one of two forms. Each row has its own: `tiles` [B, M, ...], or what the
    model's eyes make of them, `tile_features` [B, M, P, Dv], and `image_index` [B, T, K] counts in the M * P
    features of its row, with -2 for the end of a row of features (as in `mmjax.data.InstructionBatches`). Or
    the whole batch has `pixel_values` (or `image_features`) and an `image_index`, as the model takes them.

    With `accumulate` above 1 the mean is still over all labels of the batch, however many a micro-batch has;
    each micro-batch runs forward a second time for that.

    Args:
        sequence_block, vocabulary_block: see `mmjax.losses.next_token`.
    """

    sequence_block: int | None = None
    vocabulary_block: int | None = None

    def __call__(
        self,
        model: nn.Module,
        params: Mapping[str, Any],
        batch: Batch,
        key: jax.Array,
        mesh: Mesh | None = None,
        micro_batches: int = 1,
    ) -> Terms:
        per_token, share = self._losses(model, params, batch, key, mesh, micro_batches)
        total = share.sum()
        return {"next_token": (per_token * share).sum() / jnp.where(total > 0, total, 1)}

    def sums(self, model: nn.Module, params: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of the labels' losses and of their weights, without dropout, for evaluation."""
        per_token, share = self._losses(model, params, batch, None, None, 1)
        return (per_token * share).sum(), share.sum()

    def _losses(
        self,
        model: nn.Module,
        params: Mapping[str, Any],
        batch: Batch,
        key: jax.Array | None,
        mesh: Mesh | None,
        micro_batches: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Each position's loss and weight, [B, T]; no dropout without a key."""
        if "input_ids" not in batch:
            raise ConfigError(f"NextToken: the batch has no 'input_ids'; it has {', '.join(sorted(batch))}")
        if micro_batches > 1 and "image_index" in batch and not _row_images(batch):
            raise ConfigError(
                "NextToken: image_index counts in the images of the whole batch, so it cannot be cut into "
                "micro-batches; give every row images of its own, as 'tiles', or set accumulate to 1"
            )
        variables = {"params": params}
        targets = _targets(batch)
        cap = getattr(getattr(model, "config", None), "logits_softcap", None)

        def run(part: Batch, part_key: jax.Array) -> jax.Array:
            inputs = _inputs(model, part)
            if key is not None:
                inputs |= {"deterministic": False, "rngs": {"dropout": part_key}}
            hidden: Any = model.apply(variables, **inputs, method="hidden")
            return losses.token_losses(
                hidden[0] if isinstance(hidden, tuple) else hidden,
                as_array(model.apply(variables, method="output_kernel")),
                part["targets"],
                softcap=cap,
                sequence_block=self.sequence_block,
                vocabulary_block=self.vocabulary_block,
                mesh=mesh,
                axis=BATCH_AXES,
            )

        unused = jax.random.key(0) if key is None else key
        per_token = in_micro_batches(run, {**batch, "targets": targets}, unused, micro_batches)
        share = (targets != IGNORED).astype(per_token.dtype)
        if "label_weights" in batch:
            share = share * _next(batch["label_weights"], 0).astype(per_token.dtype)
        return per_token, share


def mean_loss(model: nn.Module, params: Mapping[str, Any], batches: Iterable[Batch]) -> float:
    """Next-token loss in nats per label, the mean over all labels of some batches; exp of it is perplexity.

    Args:
        model: a causal language model.
        params: its parameters, nested.
        batches: as `NextToken` takes them; names that the model does not take are left out.

    Raises:
        DataError: no batch has a label.
    """
    known = (*TEXT_INPUTS, *IMAGE_INPUTS, *ROW_IMAGES, "labels", "label_weights")
    sums = jax.jit(lambda params, batch: NextToken().sums(model, params, batch))
    total = weight = 0.0
    for batch in batches:
        loss, share = sums(params, {name: batch[name] for name in known if name in batch})
        total, weight = total + float(loss), weight + float(share)
    if not weight:
        raise DataError("mean_loss: there is no label in the batches")
    return total / weight


def _row_images(batch: Batch) -> str | None:
    """The name under which rows have their own images."""
    return next((name for name in ROW_IMAGES if name in batch), None)


def _inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """What the model is called with."""
    inputs: dict[str, Any] = {name: batch[name] for name in (*TEXT_INPUTS, *IMAGE_INPUTS) if name in batch}
    name = _row_images(batch)
    if name is None:
        return inputs
    tiles, index = batch[name], batch["image_index"]
    rows, count = tiles.shape[:2]
    own = count * (tiles.shape[2] if name == "tile_features" else model.config.tile_rows)
    first = own * jnp.arange(rows, dtype=index.dtype)[:, None, None]
    ends = jnp.where(index == NEWLINE, rows * own, index)
    inputs["image_index"] = jnp.where(index >= 0, index + first, ends)
    flat = tiles.reshape(rows * count, *tiles.shape[2:])
    inputs["image_features" if name == "tile_features" else "pixel_values"] = flat
    return inputs


def _targets(batch: Batch) -> jax.Array:
    """int [B, T], what each position should predict."""
    if "labels" in batch:
        return _next(batch["labels"], IGNORED)
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = jnp.where(batch["attention_mask"] != 0, labels, IGNORED)
    targets = _next(labels, IGNORED)
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        targets = jnp.where(segments == _next(segments, -1), targets, IGNORED)
    return targets


def _next(x: jax.Array, last: int) -> jax.Array:
    """What position t + 1 has, at t."""
    return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], last)], axis=1)
