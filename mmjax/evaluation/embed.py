"""Embeddings of many images or texts: one compiled program, fixed shapes, float32 on the host."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mmjax.errors import DataError
from mmjax.models.assemblies import ImageClassifier

Batch = Mapping[str, Any]

# Results kept on the device while the host prepares the next batch.
_IN_FLIGHT = 2
_METHODS = {"pixel_values": "encode_image", "input_ids": "encode_text"}


def takes(model: Any, name: str) -> bool:
    """Whether a model has inputs of this name: "pixel_values" or "input_ids".

    Args:
        model: a Linen module of `mmjax.models`, or one with `encode_image` or `encode_text`.
        name: the input.

    Example:
        >>> from flax import linen as nn
        >>> takes(nn.Dense(2), "pixel_values")
        False
    """
    if hasattr(model, _METHODS[name]):
        return True
    return hasattr(model, "example_batch") and name in model.example_batch()


def _without_head(model: Any) -> Any:
    """A classifier with its head taken off gives the features that the head would see."""
    if not isinstance(model, ImageClassifier):
        return model
    return model.clone(config=dataclasses.replace(model.config, num_labels=0, labels=()))


def _features(model: Any, params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
    """[B, E] of one batch: the shared space where the model has one, else the pooled tower."""
    images = "pixel_values" in inputs
    method = _METHODS["pixel_values" if images else "input_ids"]
    if hasattr(model, method):
        return model.apply({"params": params}, **inputs, method=method, normalize=False)
    out = model.apply({"params": params}, **inputs)
    for name in ("image_embeds" if images else "text_embeds", "pooler_output", "logits"):
        if name in out:
            return out[name]
    if "last_hidden_state" in out:  # a tower without pooling: its first token
        return out["last_hidden_state"][:, 0]
    raise DataError(f"{type(model).__name__} gives no embedding, only {', '.join(out.keys())}")


@partial(jax.jit, static_argnames=("model", "normalize"))
def _encode(model: Any, params: Any, inputs: dict[str, jax.Array], normalize: bool) -> jax.Array:
    """[B, E] float32 of one batch, each row of length 1 when asked."""
    embeds = _features(model, params, inputs).astype(jnp.float32)
    if not normalize:
        return embeds
    length = jnp.linalg.norm(embeds, axis=-1, keepdims=True)
    return embeds / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)


def _fixed_shapes(batches: Iterable[Any], names: tuple[str, ...]) -> Iterator[tuple[dict[str, NDArray], int]]:
    """Bring every batch to the first one's shapes: (inputs, how many rows are real)."""
    shapes: dict[str, tuple[int, ...]] | None = None
    for number, batch in enumerate(batches):
        given = batch if isinstance(batch, Mapping) else {names[0]: batch}
        if names[0] not in given:
            raise DataError(f"batch {number} has no {names[0]!r}, only {sorted(given)}")
        inputs = {name: np.asarray(given[name]) for name in names if given.get(name) is not None}
        rows = len(inputs[names[0]])
        if any(len(array) != rows for array in inputs.values()):
            raise DataError(f"batch {number}: unequal rows { {n: len(a) for n, a in inputs.items()} }")
        if shapes is None:
            if not rows:
                raise DataError("the first batch is empty: its size is the compiled one")
            shapes = {name: array.shape for name, array in inputs.items()}
        if not rows:
            continue
        wanted = {name: shape[1:] for name, shape in shapes.items()}
        found = {name: array.shape[1:] for name, array in inputs.items()}
        size = shapes[names[0]][0]
        if found != wanted or rows > size:
            raise DataError(
                f"batch {number} has {rows} rows of {found}, the first had {size} of {wanted}; every batch "
                "must fit the first one (texts: padding='max_length'), or the program would compile again"
            )
        # The last row again, not zeros: a row of zeros is no input that a model has to bear.
        extra = size - rows
        yield {n: np.concatenate([a, np.repeat(a[-1:], extra, axis=0)]) for n, a in inputs.items()}, rows


def _embed(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    names: tuple[str, ...],
    normalize: bool,
    sharding: jax.sharding.Sharding | None,
) -> NDArray[np.float32]:
    if not takes(model, names[0]):
        raise DataError(f"{type(model).__name__} takes no {names[0]}: choose a model that has this tower")
    model = _without_head(model)
    waiting: deque[tuple[jax.Array, int]] = deque()
    done: list[NDArray[np.float32]] = []
    for inputs, rows in _fixed_shapes(batches, names):
        if sharding is not None:
            inputs = jax.device_put(inputs, sharding)
        waiting.append((_encode(model, params, inputs, normalize=normalize), rows))
        if len(waiting) >= _IN_FLIGHT:
            result, count = waiting.popleft()
            done.append(np.asarray(result)[:count])
    done.extend(np.asarray(result)[:count] for result, count in waiting)
    if not done:
        raise DataError("nothing to embed: there is no batch")
    return np.concatenate(done)


def embed_images(
    model: Any,
    params: Any,
    batches: Iterable[Batch | NDArray],
    *,
    normalize: bool = True,
    sharding: jax.sharding.Sharding | None = None,
) -> NDArray[np.float32]:
    """Embed batches of images.

    A model of images and texts gives its shared space (`encode_image`), a tower alone its pooled output,
    a classifier the features before its head.

    The first batch sets the compiled shape; smaller ones are padded and cut again, so there is one
    compilation per model and shape, and calling again with another source reuses it.

    Args:
        model: a Linen module with `encode_image(pixel_values, normalize)`, or a model of `mmjax.models`.
        params: its parameters.
        batches: arrays [B, H, W, C], or mappings that hold them as "pixel_values"; none larger than
            the first.
        normalize: scale every embedding to length 1.
        sharding: where to put each batch, such as `mmjax.parallel.batch_sharding(mesh)`; B must divide by it.

    Returns:
        [N, E] float32 on the host.

    Raises:
        DataError: no batch, a batch that does not fit the first, or a model without images.

    Example:
        >>> from flax import linen as nn
        >>> class Mean(nn.Module):
        ...     def encode_image(self, pixel_values, normalize=False):
        ...         return pixel_values.mean((1, 2))
        >>> embed_images(Mean(), {}, [np.ones((2, 4, 4, 1)), np.ones((1, 4, 4, 1))]).tolist()
        [[1.0], [1.0], [1.0]]
    """
    return _embed(model, params, batches, ("pixel_values",), normalize, sharding)


def embed_texts(
    model: Any,
    params: Any,
    batches: Iterable[Batch | NDArray],
    *,
    normalize: bool = True,
    sharding: jax.sharding.Sharding | None = None,
) -> NDArray[np.float32]:
    """Embed batches of token ids, as `embed_images` does for images (`encode_text`).

    Args:
        model: a Linen module with `encode_text(input_ids, attention_mask, normalize)`, or a model of
            `mmjax.models`.
        params: its parameters.
        batches: arrays of ids [B, T], or mappings with "input_ids" and, if used, "attention_mask" [B, T];
            one T for all of them, none larger than the first.
        normalize: scale every embedding to length 1.
        sharding: where to put each batch; B must divide by it.

    Returns:
        [N, E] float32 on the host.

    Raises:
        DataError: no batch, a batch that does not fit the first, or a model without texts.

    Example:
        >>> from flax import linen as nn
        >>> class First(nn.Module):
        ...     def encode_text(self, input_ids, attention_mask=None, normalize=False):
        ...         return input_ids[:, :2]
        >>> embed_texts(First(), {}, [np.array([[3, 4, 0]])]).round(2).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    return _embed(model, params, batches, ("input_ids", "attention_mask"), normalize, sharding)
