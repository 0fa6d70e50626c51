"""What the contrastive losses are held against: every pair at once, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Largest error of a gradient over its largest entry, by scale: float32's own.
TOLERANCE = {14.0: 2e-6, 100.0: 2e-5}


def value_bound(value: float) -> float:
    """How far a loss may be from its float64 value: 1e-6 up to 8; above, float32 itself is that coarse."""
    return 1e-6 * max(1.0, abs(value) / 8)


def embeddings(
    count: int, width: int = 16, closeness: float = 1.0, seed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count if seed is None else seed)
    image = rng.standard_normal((count, width))
    text = closeness * image + rng.standard_normal((count, width))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


def dense_infonce(image, text, scale, groups=None):
    groups = np.arange(len(image)) if groups is None else groups
    target = (groups[:, None] == groups[None, :]) / (groups[:, None] == groups[None, :]).sum(1, keepdims=True)
    logits = image @ text.T * scale
    by_row, by_col = jax.nn.log_softmax(logits, 1), jax.nn.log_softmax(logits, 0)
    return -(target * (by_row + by_col)).sum() / (2 * len(image))


def dense_sigmoid(image, text, scale, bias, groups=None):
    groups = np.arange(len(image)) if groups is None else groups
    signs = 2 * (groups[:, None] == groups[None, :]) - 1
    return -jax.nn.log_sigmoid(signs * (image @ text.T * scale + bias)).sum() / len(image)


def reference(dense, *arguments, groups=None):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in arguments]
        value, grads = jax.value_and_grad(dense, tuple(range(len(wide))))(*wide, groups)
        return float(value), [np.asarray(g) for g in grads]
