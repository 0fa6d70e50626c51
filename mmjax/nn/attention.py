"""Scaled dot-product attention and the masks it takes, as pure functions."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mmjax.nn.functional import dropout
from mmjax.nn.functional import softcap as capped
from mmjax.nn.products import batched_product, by_rows

Array = jax.Array
# Weights over more keys, in bfloat16 over any number, are made again in the backward pass: where layers are a
# loop, that takes less memory and less time than to write and read them. (Of float32 layers one by one, XLA
# on CPUs makes the same of both.)
MOST_KEPT = 256


def split_heads(x: Array, num_heads: int) -> Array:
    """[B, T, N*H] to [B, N, T, H]: heads come first, so that the products are plain batched matmuls.

    >>> split_heads(jnp.zeros((2, 5, 12)), 3).shape
    (2, 3, 5, 4)
    """
    *batch, length, width = x.shape
    return jnp.moveaxis(x.reshape(*batch, length, num_heads, width // num_heads), -2, -3)


def merge_heads(x: Array) -> Array:
    """[B, N, T, H] to [B, T, N*H], the inverse of `split_heads`.

    >>> merge_heads(jnp.zeros((2, 3, 5, 4))).shape
    (2, 5, 12)
    """
    x = jnp.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


def attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Array, Array]:
    """softmax(scale * query key^T) value, with the softmax in at least float32.

    A row whose mask is all False attends to everything equally, as in transformers.

    Args:
        query: [B, N, T, H].
        key: [B, K, S, H]; N is a multiple of K (grouped queries).
        value: [B, K, S, H].
        mask: bool, broadcastable to [B, N, T, S]; True where attention is allowed.
        scale: None means H ** -0.5.
        softcap: bounds the logits before the mask (Gemma 2); None means no bound.
        dropout_rate, dropout_key: dropout on the weights; no key, no dropout.

    Returns:
        The output [B, N, T, H] and the weights before dropout [B, N, T, S], both in query's dtype.

    Deviation: in bfloat16 there is a reverse gradient only, no `jax.jvp`.

    Source: Vaswani et al. 2017, equation 1; grouped queries: Ainslie et al. 2023.

    >>> out, weights = attention(*[jnp.ones((1, 2, 3, 4))] * 3)
    >>> out.shape, weights.shape
    ((1, 2, 3, 4), (1, 2, 3, 3))
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plain = softcap is None and (dropout_key is None or dropout_rate == 0.0)
    if plain and query.dtype == jnp.bfloat16:
        weights = jax.nn.softmax(_logits(query, key, mask, scale), axis=-1)
        return _narrow_attend(query, key, value, mask, scale), weights.astype(query.dtype)
    attend = functools.partial(_attend, scale=scale, softcap=softcap, dropout_rate=dropout_rate)
    kept = attend if key.shape[2] <= MOST_KEPT else jax.checkpoint(attend)
    return kept(query, key, value, mask, dropout_key)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    dropout_key: Array | None,
    *,
    scale: float,
    softcap: float | None,
    dropout_rate: float,
) -> tuple[Array, Array]:
    logits = _logits(query, key, mask, scale, softcap)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    out = _by_rows(dropout(weights, dropout_rate, dropout_key), value, 2)
    return out.astype(query.dtype), weights


def _logits(
    query: Array, key: Array, mask: Array | None, scale: float, softcap: float | None = None
) -> Array:
    """[B, N, T, S] in at least float32."""
    logits = _by_rows(query, key, 3) * scale
    logits = capped(logits, softcap)
    return logits if mask is None else jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def _by_rows(x: Array, y: Array, y_axis: int) -> Array:
    """Rows x [B, N, T, F] times y [B, K, ., .], summed over y's axis: [B, N, T, .] in at least float32."""
    rows = by_rows(lambda x, y: batched_product(x, y, 3, y_axis), _grouped(x, y), y)
    return rows.reshape(*x.shape[:3], -1)


def _grouped(x: Array, key: Array) -> Array:
    """[B, N, T, F] to [B, K, N/K * T, F]: the queries that share a key head are rows of one product, so that
    no key is copied.
    """
    batch, heads, length, width = x.shape
    kv_heads = key.shape[1]
    return x.reshape(batch, kv_heads, heads // kv_heads * length, width)


# Autodiff would write and read [N, T, S] in float32 many times. This rule keeps two numbers per query,
# makes weights and output again, and narrows what it multiplies (Dao 2023, "FlashAttention-2", 3.1).
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _narrow_attend(query: Array, key: Array, value: Array, mask: Array | None, scale: float) -> Array:
    return _narrow_attend_fwd(query, key, value, mask, scale)[0]


def _narrow_attend_fwd(
    query: Array, key: Array, value: Array, mask: Array | None, scale: float
) -> tuple[Array, tuple[Any, ...]]:
    logits = _logits(query, key, mask, scale)
    highest = logits.max(axis=-1, keepdims=True)
    powers = jnp.exp(logits - highest)
    total = powers.sum(axis=-1, keepdims=True)
    out = _by_rows((powers / total).astype(query.dtype), value, 2)
    return out.astype(query.dtype), (query, key, value, mask, highest, total)


def _narrow_attend_bwd(scale: float, kept: tuple[Any, ...], g: Array) -> tuple[Array | None, ...]:
    query, key, value, mask, highest, total = kept
    weights = jnp.exp(_logits(query, key, mask, scale) - highest) / total
    narrow = weights.astype(g.dtype)
    out = _by_rows(narrow, value, 2)
    mean = (g.astype(out.dtype) * out).sum(axis=-1, keepdims=True)
    to_logits = weights * (_by_rows(g, value, 3) - mean) * scale
    if mask is not None:
        to_logits = jnp.where(mask, to_logits, 0)
    to_logits = to_logits.astype(g.dtype)
    to_query = _by_rows(to_logits, key, 2)
    to_key = batched_product(_grouped(to_logits, key), _grouped(query, key), 2, 2)
    to_value = batched_product(_grouped(narrow, key), _grouped(g, key), 2, 2)
    return to_query.astype(query.dtype), to_key.astype(key.dtype), to_value.astype(value.dtype), None


_narrow_attend.defvjp(_narrow_attend_fwd, _narrow_attend_bwd)


def causal_mask(length: int) -> Array:
    """bool [1, 1, T, T], True on and below the diagonal.

    >>> causal_mask(2)[0, 0].tolist()
    [[True, False], [True, True]]
    """
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def padding_mask(attention_mask: Array) -> Array:
    """[B, S] with non-zero for real tokens to bool [B, 1, 1, S].

    >>> padding_mask(jnp.array([[1, 0]])).tolist()
    [[[[True, False]]]]
    """
    chex.assert_rank(attention_mask, 2)
    return (attention_mask != 0)[:, None, None, :]


def combine_masks(*masks: Array | None) -> Array | None:
    """The conjunction of the masks that are given, or None.

    >>> combine_masks(None, None) is None
    True
    """
    result = None
    for mask in masks:
        if mask is not None:
            result = mask if result is None else result & mask
    return result
