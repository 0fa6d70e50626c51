"""Tiles of a prompt's images, looked at a few at a time: those that fill an array up are left out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
# An accelerator is not filled by one tile; a CPU is.
_TOGETHER = 4


def look(model: Any, params: Any, inputs: dict[str, Array]) -> dict[str, Array]:
    """The arguments with what the eyes see, where images are cut into tiles; others stay as they are.

    Arrays have room for as many tiles as an image can have, so that images of any size are one program. Of
    those that no token is made of the features are zero and cost nothing.

    Args:
        inputs: arguments of the model; with pixel_values [I, N, H, W, C] also image_index.

    Returns:
        image_features [I, N, P, Dv] in place of such pixel_values.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim < 5 or pixels.shape[1] == 1:
        return inputs
    lead, rows = pixels.shape[:2], model.config.tile_rows
    count = lead[0] * lead[1]
    size = 1 if jax.default_backend() == "cpu" else _TOGETHER
    groups = -(-count // size)
    index = inputs["image_index"].reshape(-1)
    tile = jnp.where((index >= 0) & (index < count * rows), index // rows, groups * size)
    used = jnp.zeros((groups * size,), bool).at[tile].set(True, mode="drop")
    flat = pixels.reshape(count, *pixels.shape[2:])
    flat = jnp.pad(flat, [(0, groups * size - count), *[(0, 0)] * (flat.ndim - 1)])
    pieces = flat.reshape(groups, size, *flat.shape[1:]), used.reshape(groups, size)

    def see(some: Array) -> Array:
        return model.apply({"params": params}, some, method="vision_features")

    seen = jax.eval_shape(see, jax.ShapeDtypeStruct(pieces[0].shape[1:], flat.dtype))

    def one(_: None, piece: tuple[Array, Array]) -> tuple[None, Array]:
        some, here = piece
        return None, lax.cond(here.any(), see, lambda _: jnp.zeros(seen.shape, seen.dtype), some)

    _, features = lax.scan(one, None, pieces)
    features = features.reshape(-1, *seen.shape[1:])[:count].reshape(*lead, *seen.shape[1:])
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return {**rest, "image_features": features}


__all__ = ["look"]
