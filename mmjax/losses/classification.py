"""Cross-entropy over classes, and the reconstruction loss of masked image modelling."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from mmjax.nn.products import accumulator

Array = jax.Array


def cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
    """Mean cross-entropy of class labels.

    Args:
        logits: [B, classes].
        labels: int [B].
        label_smoothing: share of the target spread evenly over all classes.

    Returns:
        Scalar in at least float32.

    >>> round(float(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 3]))), 4)
    1.3863
    """
    chex.assert_rank([logits, labels], [2, 1])
    log_probs = jax.nn.log_softmax(logits.astype(accumulator(logits.dtype)), axis=-1)
    hits = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    return -((1 - label_smoothing) * hits + label_smoothing * log_probs.mean(axis=-1)).mean()


def masked_l1(reconstruction: Array, pixel_values: Array, bool_masked_pos: Array) -> Array:
    """Mean absolute error over the hidden patches' pixels and channels.

    Args:
        reconstruction: [B, H, W, C].
        pixel_values: [B, H, W, C].
        bool_masked_pos: [B, P], non-zero where a patch was hidden; patches are square.

    Returns:
        Scalar in at least float32; 0 when nothing was hidden.

    Source: Xie et al. 2022 (SimMIM), section 3.4, with transformers' guard of 1e-5 in the divisor.

    >>> x = jnp.ones((1, 4, 4, 3))
    >>> round(float(masked_l1(x, 2 * x, jnp.array([[1, 0, 0, 0]]))), 3)
    1.0
    """
    chex.assert_rank([reconstruction, pixel_values, bool_masked_pos], [4, 4, 2])
    chex.assert_equal_shape([reconstruction, pixel_values])
    batch, height, width, channels = pixel_values.shape
    patch = round((height * width / bool_masked_pos.shape[1]) ** 0.5)
    mask = (bool_masked_pos != 0).reshape(batch, height // patch, width // patch, 1)
    mask = mask.repeat(patch, axis=1).repeat(patch, axis=2)
    error = jnp.abs(reconstruction - pixel_values).astype(accumulator(reconstruction.dtype))
    return (error * mask).sum() / (mask.sum() + 1e-5) / channels
