"""The key/value cache of a decoder: a pytree that is passed in and handed back."""

from __future__ import annotations

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from mmjax.errors import ConfigError

Array = jax.Array


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens so far, in slots; every row writes at the same cursor.

    Attributes:
        keys, values: one array [B, K, S, H] per layer.
        mask: bool [B, S], True where a slot holds a token and not padding.
        positions: int32 [B, S], how many tokens of its row come before a slot's token.
        cursor: int32 [], the next slot to be written.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    mask: Array
    positions: Array
    cursor: Array

    @property
    def length(self) -> int:
        """S, how many slots there are."""
        return self.mask.shape[1]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.mask.shape[0]


def init_cache(
    num_layers: int, batch_size: int, num_kv_heads: int, length: int, head_dim: int, dtype: Any = jnp.float32
) -> KVCache:
    """An empty cache.

    Args:
        num_layers, batch_size, num_kv_heads, length, head_dim: L, B, K, S, H.
        dtype: of keys and values.

    >>> init_cache(2, 1, 3, 8, 4).keys[0].shape
    (1, 3, 8, 4)
    """
    shape = (batch_size, num_kv_heads, length, head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        mask=jnp.zeros((batch_size, length), bool),
        positions=jnp.zeros((batch_size, length), jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
    )


def write_slots(slots: Array, new: Array, cursor: Array) -> Array:
    """The slots with new entries from the cursor on; in place where the caller donates them.

    Args:
        slots: [B, K, S, H] or [B, S].
        new: [B, K, T, H] or [B, T].
        cursor: int32 [].

    >>> write_slots(jnp.zeros((1, 3), jnp.int32), jnp.array([[7]]), jnp.int32(1)).tolist()
    [[0, 7, 0]]
    """
    chex.assert_equal_rank([slots, new])
    axis = slots.ndim // 2
    if new.shape[axis] > slots.shape[axis]:
        raise ConfigError(
            f"cache: {new.shape[axis]} tokens do not fit into {slots.shape[axis]} slots; make a longer cache"
        )
    start = [jnp.zeros((), cursor.dtype)] * slots.ndim
    start[axis] = cursor
    return lax.dynamic_update_slice(slots, new.astype(slots.dtype), start)


def first_slots(cache: KVCache, length: int) -> KVCache:
    """The cache as if it had only its first `length` slots.

    >>> first_slots(init_cache(2, 1, 3, 8, 4), 5).keys[0].shape
    (1, 3, 5, 4)
    """
    keys, values = (tuple(x[:, :, :length] for x in slots) for slots in (cache.keys, cache.values))
    return KVCache(keys, values, cache.mask[:, :length], cache.positions[:, :length], cache.cursor)


def fill_slots(cache: KVCache, first: KVCache) -> KVCache:
    """The cache with all that another holds in place of its first slots, and the other's cursor.

    >>> fill_slots(init_cache(2, 1, 3, 8, 4), init_cache(2, 1, 3, 5, 4)).length
    8
    """
    begin = jnp.zeros((), cache.cursor.dtype)
    return jax.tree.map(
        lambda whole, part: write_slots(whole, part, begin) if whole.ndim else part, cache, first
    )


def claim_slots(cache: KVCache, token_mask: Array) -> tuple[KVCache, Array]:
    """Mark the slots of new tokens; the cursor stays, since every layer still writes at it.

    Args:
        cache: the tokens so far.
        token_mask: bool [B, T], True for tokens, False for padding.

    Returns:
        The cache with mask and positions of the new tokens, and their positions int32 [B, T]. Padding has the
        position of the token before it, or -1.

    >>> cache, positions = claim_slots(init_cache(1, 1, 1, 4, 2), jnp.array([[False, True, True]]))
    >>> positions.tolist(), cache.mask.tolist()
    ([[-1, 0, 1]], [[False, True, True, False]])
    """
    chex.assert_rank(token_mask, 2)
    before = cache.mask.sum(axis=1, dtype=jnp.int32)[:, None]
    positions = before + jnp.cumsum(token_mask, axis=1, dtype=jnp.int32) - 1
    claimed = cache.replace(  # type: ignore[attr-defined]
        mask=write_slots(cache.mask, token_mask, cache.cursor),
        positions=write_slots(cache.positions, positions, cache.cursor),
    )
    return claimed, positions
