"""What samplers do to logits, and the draw, as pure array functions; what is left out becomes -inf."""

from __future__ import annotations

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from mmjax.generation.samplers import Plan

Array = jax.Array


def penalize_repetition(logits: Array, seen: Array, penalty: Array | float) -> Array:
    """Make tokens that were seen less likely (or more, with a penalty below 1).

    Args:
        logits: [R, V].
        seen: bool [R, V].
        penalty: positive logits are divided by it, others multiplied.

    Returns:
        [R, V].

    Source: Keskar et al. 2019, section 4.1.

    >>> penalize_repetition(jnp.array([[2.0, -1.0, 3.0]]), jnp.array([[True, True, False]]), 2.0).tolist()
    [[1.0, -2.0, 3.0]]
    """
    chex.assert_equal_shape([logits, seen])
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Array, k: Array | int) -> Array:
    """Keep the k largest logits of each row, and those equal to the smallest of them.

    Args:
        logits: [R, V].
        k: at least 1; more than V means V.

    Returns:
        [R, V].

    >>> keep_top_k(jnp.array([[1.0, 3.0, 2.0]]), 2).tolist()
    [[-inf, 3.0, 2.0]]
    """
    chex.assert_rank(logits, 2)
    size = logits.shape[1]
    ordered = jnp.sort(logits, axis=-1)
    least = jnp.take(ordered, size - jnp.clip(k, 1, size), axis=1)[:, None]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Array, p: Array | float) -> Array:
    """Keep the fewest likeliest tokens that reach a probability of p together; at least one.

    Args:
        logits: [R, V].
        p: above 0 and at most 1.

    Returns:
        [R, V].

    Source: Holtzman et al. 2020, section 3.1.

    >>> keep_top_p(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0.7).tolist()[0][2]
    -inf
    """
    chex.assert_rank(logits, 2)
    order = jnp.argsort(logits, axis=-1)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    dropped = (below <= 1 - p).at[:, -1].set(False)
    rows = jnp.arange(logits.shape[0])[:, None]
    dropped = jnp.zeros_like(dropped).at[rows, order].set(dropped)
    return jnp.where(dropped, -jnp.inf, logits)


def keep_min_p(logits: Array, p: Array | float) -> Array:
    """Keep tokens with at least p times the probability of the likeliest one.

    Args:
        logits: [R, V].
        p: above 0 and at most 1.

    Returns:
        [R, V].

    Source: Nguyen et al. 2024, section 3.

    >>> keep_min_p(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), 0.3).tolist()[0][2]
    -inf
    """
    chex.assert_rank(logits, 2)
    likely = jax.nn.softmax(logits, axis=-1)
    return jnp.where(likely < p * likely.max(axis=-1, keepdims=True), -jnp.inf, logits)


def warp(logits: Array, plan: Plan, numbers: Mapping[str, Array], seen: Array | None) -> Array:
    """The logits that a sampler draws from, or takes the largest of.

    Args:
        logits: [R, V].
        plan: which of the changes apply.
        numbers: the number of each.
        seen: bool [R, V], tokens of the text so far; only for a repetition penalty.

    Returns:
        [R, V].

    >>> warp(jnp.array([[1.0, 3.0]]), Plan(names=("temperature",)), {"temperature": 2.0}, None).tolist()
    [[0.5, 1.5]]
    """
    if "repetition_penalty" in plan.names:
        assert seen is not None
        logits = penalize_repetition(logits, seen, numbers["repetition_penalty"])
    if "temperature" in plan.names:
        logits = logits / numbers["temperature"]
    for name, keep in (("top_k", keep_top_k), ("top_p", keep_top_p), ("min_p", keep_min_p)):
        if name in plan.names:
            logits = keep(logits, numbers[name])
    return logits


def choose(
    logits: Array, plan: Plan, numbers: Mapping[str, Array], seen: Array | None, keys: Array | None
) -> Array:
    """The next token of each row.

    Args:
        logits: [R, V].
        plan, numbers, seen: as in `warp`.
        keys: one PRNG key per row, [R]; a row's draw depends on its own key only. None for greedy plans.

    Returns:
        int32 [R].

    >>> choose(jnp.array([[1.0, 3.0]]), Plan(), {}, None, None).tolist()
    [1]
    """
    logits = warp(logits, plan, numbers, seen)
    if keys is None or not plan.random:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


__all__ = [
    "choose",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalize_repetition",
    "warp",
]
