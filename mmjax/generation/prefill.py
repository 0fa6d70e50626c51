"""Prompts into a cache: long ones in pieces, so that little of what a program is padded to is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.generation.prompts import text_config
from mmjax.generation.tiles import look
from mmjax.nn.cache import fill_slots, first_slots
from mmjax.nn.rope import depends_on_length

Array = jax.Array
# Products of fewer rows read the weights too often for what they compute.
PIECE = 128


def read_prompt(
    model: Any, params: Any, cache: Any, inputs: dict[str, Array], length: Array, *, fresh: bool = False
) -> tuple[Array, Any]:
    """Put prompts into a cache.

    Programs are compiled for few lengths, so a prompt may be little more than half of its program's. The
    first half is read at once and the rest in pieces, of which only those run that hold tokens.

    Args:
        cache: with room for all of the inputs' columns.
        inputs: arguments of the model, the prompts padded on the left to `length`, then on the right.
        length: int32 [].
        fresh: whether the cache holds nothing yet; then a first half looks at no slots but its own.

    Returns:
        The logits after the prompts' last tokens, float32 [B, V], and the cache, whose cursor is after them.
    """
    inputs = look(model, params, inputs)
    mask = inputs["attention_mask"]
    cursor = cache.cursor
    if not in_pieces(model, mask.shape[1]):
        last = jnp.full(mask.shape[:1], length - 1, jnp.int32)
        out = model.apply({"params": params}, **inputs, cache=cache, logits_to_keep=last)
        return out.logits[:, 0], out.cache.replace(cursor=cursor + length)
    embeds = model.apply({"params": params}, **inputs, method="embed_inputs")

    def read(cache: Any, begin: Any, size: int) -> tuple[Array, Any]:
        """Columns from `begin` on: hidden states [B, D] of the prompts' last tokens, if they are there."""
        piece = {
            name: lax.dynamic_slice_in_dim(value, begin, size, axis=1)
            for name, value in (("inputs_embeds", embeds), ("attention_mask", mask))
        }
        at = jnp.full(mask.shape[:1], jnp.clip(length - 1 - begin, 0, size - 1), jnp.int32)
        hidden, cache = model.apply(
            {"params": params}, **piece, cache=cache, logits_to_keep=at, method="hidden"
        )
        return hidden[:, 0], cache

    def read_more(state: tuple[Array, Any], begin: Array) -> tuple[tuple[Array, Any], None]:
        return lax.cond(begin < length, lambda: read(state[1], begin, size), lambda: state), None

    half = mask.shape[1] // 2
    size = max(PIECE, half // 4)
    last, part = read(first_slots(cache, half) if fresh else cache, 0, half)
    state = last, fill_slots(cache, part) if fresh else part
    # A scan and no while_loop, which has no gradient.
    (last, cache), _ = lax.scan(read_more, state, jnp.arange(half, 2 * half, size, dtype=jnp.int32))
    logits = model.apply({"params": params}, last, method="logits")
    return logits, cache.replace(cursor=cursor + length)


def in_pieces(model: Any, columns: int) -> bool:
    """Whether prompts padded to so many columns are read in pieces.

    Halves and pieces have to fit, and every token's result to be the same whatever comes after it.
    """
    if columns < 4 * PIECE or columns % (2 * PIECE) or not hasattr(model, "embed_inputs"):
        return False
    return not depends_on_length(text_config(model).rope_scaling)


__all__ = ["in_pieces", "read_prompt"]
