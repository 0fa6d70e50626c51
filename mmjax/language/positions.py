"""Where tokens stand, what they see of each other, and which of them are asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.errors import ConfigError
from mmjax.nn import KVCache, causal_mask, combine_masks, padding_mask

Array = jax.Array


def token_positions(token_mask: Array, segment_ids: Array | None = None) -> Array:
    """How many tokens of its row, or of its segment, come before each token.

    Args:
        token_mask: bool [B, T], False for padding.
        segment_ids: int [B, T]; the count starts again where the number changes.

    Returns:
        int32 [B, T]; padding has the position of the token before it, or -1.

    >>> token_positions(jnp.array([[False, True, True]])).tolist()
    [[-1, 0, 1]]
    >>> token_positions(jnp.ones((1, 4), bool), jnp.array([[1, 1, 2, 2]])).tolist()
    [[0, 1, 0, 1]]
    """
    counts = jnp.cumsum(token_mask, axis=1, dtype=jnp.int32)
    if segment_ids is None:
        return counts - 1
    starts = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)), mode="edge")[:, :-1]
    before = jnp.where(starts, counts - token_mask, 0)
    return counts - 1 - lax.cummax(before, axis=1)


def attention_masks(
    token_mask: Array | None, length: int, window: int | None, segment_ids: Array | None = None
) -> tuple[Array, Array]:
    """What tokens see of each other: what came before, in their own segment, and not padding.

    Args:
        token_mask: bool [B, T], or None for no padding.
        length: T.
        window: how many tokens back the second mask allows, the token itself included; None: all.
        segment_ids: int [B, T] or None.

    Returns:
        The masks of full and of sliding layers, bool [B or 1, 1, T, T].

    >>> full, sliding = attention_masks(None, 3, 2)
    >>> full[0, 0, 2].tolist(), sliding[0, 0, 2].tolist()
    ([True, True, True], [False, True, True])
    """
    same = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    padding = None if token_mask is None else padding_mask(token_mask)
    full = combine_masks(causal_mask(length), padding, same)
    assert full is not None
    if window is None:
        return full, full
    positions = jnp.arange(length)[None] if token_mask is None else token_positions(token_mask)
    return full, full & within(positions, positions, window)


def cache_masks(cache: KVCache, positions: Array, window: int | None) -> tuple[Array, Array]:
    """What new tokens see of the cache, in which they have their slots already.

    Args:
        cache: with the new tokens' slots claimed, the cursor at the first of them.
        positions: int [B, T], as `claim_slots` gives them.
        window: as in `attention_masks`.

    Returns:
        The masks of full and of sliding layers, bool [B, 1, T, S].
    """
    slots = jnp.arange(cache.length)
    earlier = slots[None, :] <= cache.cursor + jnp.arange(positions.shape[1])[:, None]
    full = earlier[None, None] & padding_mask(cache.mask)
    return full, full if window is None else full & within(positions, cache.positions, window)


def within(query: Array, key: Array, window: int) -> Array:
    """bool [B, 1, T, S]: whether a key's position [B, S] is less than `window` before the query's [B, T].

    >>> within(jnp.array([[5]]), jnp.array([[3, 4]]), 2)[0, 0].tolist()
    [[False, True]]
    """
    return (query[:, None, :, None] - key[:, None, None, :]) < window


def kept_positions(logits_to_keep: int | Array, rows: int, length: int) -> Array | None:
    """The positions whose logits are asked for.

    Args:
        logits_to_keep: 0 for all, n for the last n, or one position per row, int [B].
        rows, length: B and T.

    Returns:
        int [B, T'], or None for all.

    Raises:
        ConfigError: another number of positions than of rows.

    >>> kept_positions(2, 1, 5).tolist()
    [[3, 4]]
    """
    if isinstance(logits_to_keep, int):
        if not 0 < logits_to_keep < length:
            return None
        return jnp.broadcast_to(jnp.arange(length - logits_to_keep, length), (rows, logits_to_keep))
    positions = jnp.asarray(logits_to_keep)
    if positions.shape != (rows,):
        raise ConfigError(f"logits_to_keep: expected one position for each of {rows} rows")
    return positions[:, None]


def take_positions(x: Array, positions: Array | None, axis: int) -> Array:
    """Some of each row's positions.

    Args:
        x: [B or 1, ..., T, ...].
        positions: int [B, T'], or None for all.
        axis: T's.

    Returns:
        [B, ..., T', ...].

    >>> take_positions(jnp.array([[3, 1, 4], [1, 5, 9]]), jnp.array([[2], [0]]), 1).tolist()
    [[4], [1]]
    """
    if positions is None:
        return x
    others = [i for i in range(1, x.ndim) if i != axis]
    return jnp.take_along_axis(x, jnp.expand_dims(positions, others), axis)
