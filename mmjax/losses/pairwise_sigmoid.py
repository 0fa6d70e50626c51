"""The pairwise sigmoid loss over all pairs of a batch, exact, with memory linear in the batch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax.losses.pairs import Plan, all_mean, all_sum, group_ids, once_only, prepare, tile_dots, weighted
from mmjax.losses.rows import Axis
from mmjax.losses.sweep import sweep, valid_pairs

Array = jax.Array


def sigmoid(
    image_embeds: Array,
    text_embeds: Array,
    logit_scale: Array | float,
    logit_bias: Array | float,
    *,
    groups: Array | None = None,
    block_size: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis = "data",
) -> Array:
    """Pairwise sigmoid loss: every pair is its own yes-or-no question.

    Exact for any N, in value and in the gradients of both embeddings, the scale and the bias, with the
    memory of `infonce`. First derivatives only.

    Args:
        image_embeds: [N, D], of length 1.
        text_embeds: [N, D], of length 1.
        logit_scale: scalar, the multiplier itself (not its logarithm).
        logit_bias: scalar, added to every similarity.
        groups: int [N]; pairs of one group are positives. None: row k with row k.
        block_size, mesh, axis: as in `infonce`.

    Returns:
        Scalar in at least float32: the sum over the N x N pairs, divided by N.

    Raises:
        ConfigError: as `infonce`.

    Source: Zhai et al. 2023, algorithm 1.

    >>> round(float(sigmoid(jnp.eye(1), jnp.eye(1), 0.0, 0.0)), 4)
    0.6931
    """
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    plan, image, text, ids, (scale, bias) = prepare(
        image_embeds, text_embeds, groups, scalars, block_size, mesh, axis
    )
    return _sigmoid(plan, image, text, scale, bias, ids)


def _signs(row: dict[str, Array], col: dict[str, Array], dtype: Any) -> Array:
    return jnp.where(row["group"][:, None] == col["group"][None, :], 1, -1).astype(dtype)


def _tile_losses(row: Any, col: Any, scale: Array, bias: Array, fine: bool) -> tuple[Array, Array, Array]:
    """Of one tile: dot products, losses, and the derivatives of the losses by the logits."""
    dots, *finer = tile_dots(row, col, fine)
    signs = _signs(row, col, dots.dtype)
    logits = dots * scale + bias
    if finer:
        # Added last: it is small, and would be rounded away beside the product.
        dots, logits = dots + finer[0], logits + finer[0] * scale
    logits = signs * logits
    # softplus(-x) and sigmoid(-x) from the one exponential that they share and that cannot overflow.
    small = jnp.exp(-jnp.abs(logits))
    losses = jnp.maximum(-logits, 0) + jnp.log1p(small)
    weights = -signs * jnp.where(logits >= 0, small, 1) / (1 + small)
    valid = valid_pairs(row, col)
    if valid is not None:
        losses, weights = jnp.where(valid, losses, 0), jnp.where(valid, weights, 0)
    return dots, losses, weights


def _sides(image: Array, text: Array, groups: Array | None, axis: Axis | None) -> Any:
    ids = group_ids(groups, image.shape[0], axis)
    return ({"x": x, "group": ids} for x in (image, text))


def _sigmoid_value(
    image: Array, text: Array, groups: Array | None, scale: Array, bias: Array, plan: Plan, axis: Axis | None
) -> Array:
    def tile(row: Any, row_sums: Any, col: Any, col_sums: Any) -> tuple[Any, Any]:
        return row_sums + _tile_losses(row, col, scale, bias, plan.fine)[1].sum(axis=1), col_sums

    zero = jnp.zeros(image.shape[0], scale.dtype)
    rows, cols = _sides(image, text, groups, axis)
    row_sums, _ = sweep(tile, rows, zero, cols, zero, block_size=plan.block_size, axis=axis)
    return all_mean(row_sums, axis)


def _sigmoid_gradient(
    image: Array, text: Array, groups: Array | None, scale: Array, bias: Array, plan: Plan, axis: Axis | None
) -> Any:
    """The loss and its gradients, in at least float32: no tile waits for another, so one sweep has both."""

    def tile(row: Any, row_sums: Any, col: Any, col_sums: Any) -> tuple[Any, Any]:
        dots, losses, weights = _tile_losses(row, col, scale, bias, plan.fine)
        to_rows, to_cols = weighted(weights, row, col)
        sums = {
            "x": row_sums["x"] + to_rows,
            "loss": row_sums["loss"] + losses.sum(axis=1),
            "scale": row_sums["scale"] + (weights * dots).sum(axis=1),
            "bias": row_sums["bias"] + weights.sum(axis=1),
        }
        return sums, {"x": col_sums["x"] + to_cols}

    zeros = jnp.zeros(image.shape, scale.dtype)
    rows, cols = _sides(image, text, groups, axis)
    start = {"x": zeros} | dict.fromkeys(("loss", "scale", "bias"), zeros[:, 0])
    row_sums, col_sums = sweep(tile, rows, start, cols, {"x": zeros}, block_size=plan.block_size, axis=axis)
    devices = 1 if axis is None else jax.lax.axis_size(axis)
    share = 1 / (image.shape[0] * devices)
    return (
        all_mean(row_sums["loss"], axis),
        share * scale * row_sums["x"],
        share * scale * col_sums["x"],
        share * all_sum(row_sums["scale"], axis),
        share * all_sum(row_sums["bias"], axis),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _sigmoid(plan: Plan, image: Array, text: Array, scale: Array, bias: Array, groups: Array | None) -> Array:
    def local(sharded: Any, whole: Any, axis: Axis | None) -> Any:
        (image, text, groups), (scale, bias) = sharded, whole
        return _sigmoid_value(image, text, groups, scale, bias, plan, axis)

    return plan.rows.run(local, (image, text, groups), (scale, bias), False)


@functools.partial(jax.jit, static_argnums=0)
def _sigmoid_forward(
    plan: Plan, image: Array, text: Array, scale: Array, bias: Array, groups: Array | None
) -> tuple[Array, Any]:
    def local(sharded: Any, whole: Any, axis: Axis | None) -> Any:
        (image, text, groups), (scale, bias) = sharded, whole
        return _sigmoid_gradient(image, text, groups, scale, bias, plan, axis)

    out = (False, True, True, False, False)
    loss, *grads = plan.rows.run(local, (image, text, groups), (scale, bias), out)
    return loss, (grads, jnp.zeros((), image.dtype), jnp.zeros((), text.dtype))


@functools.partial(jax.jit, static_argnums=0)
def _sigmoid_backward(plan: Plan, saved: Any, cotangent: Array) -> Any:
    grads, image, text = saved
    to_image, to_text, to_scale, to_bias = (cotangent * gradient for gradient in once_only("sigmoid", grads))
    return to_image.astype(image.dtype), to_text.astype(text.dtype), to_scale, to_bias, None


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)
