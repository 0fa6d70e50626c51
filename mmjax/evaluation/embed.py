"""Embeddings of many images or texts: one compiled program, fixed shapes, float32 on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mmjax.errors import DataError

Batch = Mapping[str, Any]

# Results kept on the device while the host prepares the next batch.
_IN_FLIGHT = 2


@partial(jax.jit, static_argnames=("model", "method", "normalize"))
def _encode(model: Any, params: Any, inputs: dict[str, jax.Array], method: str, normalize: bool) -> jax.Array:
    """[B, E] float32 of one batch, each row of length 1 when asked."""
    embeds = model.apply({"params": params}, **inputs, method=method, normalize=False).astype(jnp.float32)
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
    method: str,
    normalize: bool,
    sharding: jax.sharding.Sharding | None,
) -> NDArray[np.float32]:
    if not hasattr(model, method):
        raise DataError(f"{type(model).__name__} has no {method}: choose a model that has this tower")
    waiting: deque[tuple[jax.Array, int]] = deque()
    done: list[NDArray[np.float32]] = []
    for inputs, rows in _fixed_shapes(batches, names):
        if sharding is not None:
            inputs = jax.device_put(inputs, sharding)
        waiting.append((_encode(model, params, inputs, method=method, normalize=normalize), rows))
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
    """Embed batches of images with the model's `encode_image`.

    The first batch sets the compiled shape; smaller ones are padded and cut again, so there is one
    compilation per model and shape, and calling again with another source reuses it.

    Args:
        model: a Linen module with `encode_image(pixel_values, normalize)`.
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
    return _embed(model, params, batches, ("pixel_values",), "encode_image", normalize, sharding)


def embed_texts(
    model: Any,
    params: Any,
    batches: Iterable[Batch | NDArray],
    *,
    normalize: bool = True,
    sharding: jax.sharding.Sharding | None = None,
) -> NDArray[np.float32]:
    """Embed batches of token ids with the model's `encode_text`.

    Args:
        model: a Linen module with `encode_text(input_ids, attention_mask, normalize)`.
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
    names = ("input_ids", "attention_mask")
    return _embed(model, params, batches, names, "encode_text", normalize, sharding)
