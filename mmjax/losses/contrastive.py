"""Losses that compare images with texts."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from mmjax.nn.functional import accumulator

Array = jax.Array


def _similarities(image_embeds: Array, text_embeds: Array) -> Array:
    """Dot products [N, N] of images (rows) and texts (columns), in at least float32."""
    chex.assert_rank([image_embeds, text_embeds], 2)
    chex.assert_equal_shape([image_embeds, text_embeds])
    sums = accumulator(image_embeds.dtype)
    return jnp.einsum("id,td->it", image_embeds, text_embeds, preferred_element_type=sums)


def infonce(image_embeds: Array, text_embeds: Array, logit_scale: Array | float) -> Array:
    """Symmetric InfoNCE: row k of one side is the positive of row k of the other.

    Args:
        image_embeds: [N, D], of length 1.
        text_embeds: [N, D], of length 1.
        logit_scale: scalar, the multiplier itself (not its logarithm).

    Returns:
        Scalar in at least float32: the mean over N of the two cross-entropies' mean.

    Memory: holds the [N, N] similarities.

    Source: Radford et al. 2021, figure 3.

    >>> float(infonce(jnp.eye(2), jnp.eye(2), 100.0))
    0.0
    """
    logits = _similarities(image_embeds, text_embeds) * logit_scale
    positives = jnp.diagonal(logits)
    per_image = jax.nn.logsumexp(logits, axis=1) - positives
    per_text = jax.nn.logsumexp(logits, axis=0) - positives
    return (per_image + per_text).mean() / 2


def sigmoid(
    image_embeds: Array, text_embeds: Array, logit_scale: Array | float, logit_bias: Array | float
) -> Array:
    """Pairwise sigmoid loss: every pair is its own yes-or-no question.

    Args:
        image_embeds: [N, D], of length 1.
        text_embeds: [N, D], of length 1.
        logit_scale: scalar, the multiplier itself (not its logarithm).
        logit_bias: scalar, added to every similarity.

    Returns:
        Scalar in at least float32: the sum over the N x N pairs, divided by N.

    Memory: holds the [N, N] similarities.

    Source: Zhai et al. 2023, algorithm 1.

    >>> round(float(sigmoid(jnp.eye(1), jnp.eye(1), 0.0, 0.0)), 4)
    0.6931
    """
    logits = _similarities(image_embeds, text_embeds) * logit_scale + logit_bias
    signs = 2 * jnp.eye(logits.shape[0], dtype=logits.dtype) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum() / logits.shape[0]
