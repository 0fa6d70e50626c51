"""Tasks: what a stage minimises, as frozen settings that are called with a model and a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax import losses
from mmjax.errors import ConfigError
from mmjax.parallel import BATCH_AXES
from mmjax.training.state import FlatParams
from mmjax.training.step import Batch, Terms, in_micro_batches

SCALE = "logit_scale"
CONTRASTIVE_INPUTS = ("input_ids", "attention_mask", "pixel_values")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Symmetric InfoNCE between the images and the texts of a batch, over the whole batch.

    With `accumulate` above 1 the towers run over micro-batches, and every image is still compared with
    every text of the whole batch (gradient caching; open_clip's `--accum-freq`).

    Args:
        max_scale: the multiplier stays at or below this; `logit_scale` at or below its logarithm.
        groups: name of an integer array [B] of the batch, such as "labels"; images and texts of one group
            are all positives of each other. None: each image has its own text alone.
        block_size: see `mmjax.losses.infonce`.

    Source: Radford et al. 2021, "Learning Transferable Visual Models", sections 2.3 and 2.5.
    """

    max_scale: float = 100.0
    groups: str | None = None
    block_size: int | None = None

    def __call__(
        self,
        model: nn.Module,
        params: Mapping[str, Any],
        batch: Batch,
        key: jax.Array,
        mesh: Mesh | None = None,
        micro_batches: int = 1,
    ) -> Terms:
        embeds = _embed_pairs(model, params, batch, key, micro_batches)
        scale = jnp.exp(jnp.minimum(params[SCALE], math.log(self.max_scale)))
        options = _pairing(self, batch, mesh)
        return {"contrastive": losses.infonce(*embeds, scale, **options)}

    def project(self, params: FlatParams) -> FlatParams:
        """Clamp the parameter too, so that it cannot wander off where it has no gradient."""
        highest = math.log(self.max_scale)
        return {path: jnp.minimum(x, highest) if path == SCALE else x for path, x in params.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Pairwise sigmoid loss between the images and the texts of a batch, over the whole batch.

    Args:
        groups, block_size: as in `Contrastive`, and so is `accumulate`.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1.
    """

    groups: str | None = None
    block_size: int | None = None

    def __call__(
        self,
        model: nn.Module,
        params: Mapping[str, Any],
        batch: Batch,
        key: jax.Array,
        mesh: Mesh | None = None,
        micro_batches: int = 1,
    ) -> Terms:
        embeds = _embed_pairs(model, params, batch, key, micro_batches)
        scale, bias = jnp.exp(params[SCALE]), params["logit_bias"]
        options = _pairing(self, batch, mesh)
        return {"sigmoid": losses.sigmoid(*embeds, scale, bias, **options)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Cross-entropy of the model's `logits` against the batch's `labels`.

    Args:
        label_smoothing: share of the target spread evenly over all classes.
    """

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, params: Mapping[str, Any], batch: Batch, key: jax.Array) -> Terms:
        logits = _run(model, params, batch, key, ("pixel_values",))["logits"]
        smoothing = self.label_smoothing
        return {"cross_entropy": losses.cross_entropy(logits, batch["labels"], label_smoothing=smoothing)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedImage:
    """Absolute error of the pixels of hidden patches.

    Args:
        share: share of the patches that is hidden from the model; each image draws its own.

    Source: Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling", section 3.
    """

    share: float = 0.5

    def __call__(self, model: nn.Module, params: Mapping[str, Any], batch: Batch, key: jax.Array) -> Terms:
        pixels = batch["pixel_values"]
        tall, wide = np.broadcast_to(model.config.patch_size, 2)  # type: ignore[attr-defined]
        patches = (pixels.shape[1] // int(tall)) * (pixels.shape[2] // int(wide))
        mask_key, run_key = jax.random.split(key)
        hidden = _draw_mask(mask_key, pixels.shape[0], patches, self.share)
        inputs = {"pixel_values": pixels, "bool_masked_pos": hidden}
        out = _run(model, params, inputs, run_key, tuple(inputs))
        return {"reconstruction": losses.masked_l1(out["reconstruction"], pixels, hidden)}


def _embed_pairs(
    model: nn.Module, params: Mapping[str, Any], batch: Batch, key: jax.Array, micro_batches: int
) -> tuple[jax.Array, jax.Array]:
    """Image and text embeddings [B, E] of the whole batch."""

    def embed(part: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = _run(model, params, part, key, CONTRASTIVE_INPUTS)
        return out["image_embeds"], out["text_embeds"]

    inputs = {name: batch[name] for name in CONTRASTIVE_INPUTS if name in batch}
    return in_micro_batches(embed, inputs, key, micro_batches)


def _pairing(task: Contrastive | Sigmoid, batch: Batch, mesh: Mesh | None) -> dict[str, Any]:
    """The loss's keyword arguments.

    Raises:
        ConfigError: the batch does not have the task's groups.
    """
    if task.groups is not None and task.groups not in batch:
        has = ", ".join(sorted(batch))
        raise ConfigError(f"{type(task).__name__}.groups: the batch has no {task.groups!r}; it has {has}")
    groups = None if task.groups is None else batch[task.groups]
    return {"groups": groups, "block_size": task.block_size, "mesh": mesh, "axis": BATCH_AXES}


def _run(
    model: nn.Module, params: Mapping[str, Any], batch: Batch, key: jax.Array, names: tuple[str, ...]
) -> Any:
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    return model.apply({"params": params}, **inputs, deterministic=False, rngs={"dropout": key})


def _draw_mask(key: jax.Array, number: int, patches: int, share: float) -> jax.Array:
    """Boolean [number, patches]; every row has the same count of True, at least one."""
    order = jnp.argsort(jax.random.uniform(key, (number, patches)), axis=-1)
    return jnp.argsort(order, axis=-1) < max(1, round(share * patches))
