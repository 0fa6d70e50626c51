"""InfoNCE over all pairs of a batch, exact, with memory linear in the batch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax.losses.pairs import (
    Plan,
    all_mean,
    all_sum,
    beyond,
    group_ids,
    once_only,
    own_dots,
    prepare,
    tile_dots,
    weighted,
)
from mmjax.losses.rows import Axis
from mmjax.losses.sweep import sweep, valid_pairs

Array = jax.Array


def infonce(
    image_embeds: Array,
    text_embeds: Array,
    logit_scale: Array | float,
    *,
    groups: Array | None = None,
    block_size: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis = "data",
) -> Array:
    """Symmetric InfoNCE: row k of one side is the positive of row k of the other.

    Exact for any N, in value and in the gradients of both embeddings and of the scale. Memory beyond the
    inputs and their gradients is a few numbers per row and one tile. First derivatives only.

    Args:
        image_embeds: [N, D], of length 1.
        text_embeds: [N, D], of length 1.
        logit_scale: scalar, the multiplier itself (not its logarithm).
        groups: int [N]; every text whose group is an image's is a positive of it, each with the same weight
            (and the other way round). None: row k alone. Numpy's of 64 bits are all told apart; jax keeps
            32 of them unless jax_enable_x64 is set.
        block_size: rows and columns of a tile; None means 512, the least memory at full speed on a CPU;
            larger tiles keep larger chips busy.
        mesh: the embeddings are sharded over `axis` of this mesh; columns travel in a ring, and no device
            ever holds all of a side. None: one device.
        axis: mesh axis or axes of the embeddings' rows.

    Returns:
        Scalar in at least float32: the mean over N of the two cross-entropies' mean.

    Raises:
        ConfigError: embeddings that are no numbers or no rows, groups that are no integers or not one a row,
            a scale that is more than one number, an impossible block size, or rows that the mesh axes cannot
            split evenly.

    Source: Radford et al. 2021, figure 3; several positives as in Khosla et al. 2020, equation 2.

    >>> float(infonce(jnp.eye(2), jnp.eye(2), 100.0))
    0.0
    """
    scalars = {"logit_scale": logit_scale}
    plan, image, text, ids, (scale,) = prepare(
        image_embeds, text_embeds, groups, scalars, block_size, mesh, axis
    )
    return _infonce(plan, image, text, scale, ids)


def _extend(state: tuple[Array, Array], logits: Array, axis: int) -> tuple[Array, Array]:
    """Running maximum and sum of exponentials, extended by a tile."""
    highest, total = state
    new = jnp.maximum(highest, logits.max(axis=axis))
    # A row that is all padding so far has no maximum yet; any finite number will do.
    finite = jnp.where(jnp.isfinite(new), new, 0)
    return new, total * jnp.exp(highest - finite) + jnp.exp(logits - jnp.expand_dims(finite, axis)).sum(axis)


def _infonce_value(
    image: Array, text: Array, ids: Array | None, scale: Array, plan: Plan, axis: Axis | None
) -> Any:
    """The loss; what similarities are taken relative to (see `beyond`); and per row of each side, relative to
    it: log-sum-exp, mean positive dot product, number of positives."""

    def tile(row: Any, row_sums: Any, col: Any, col_sums: Any) -> tuple[Any, Any]:
        dots = tile_dots(row, col, plan.fine)
        valid = valid_pairs(row, col)
        out = []
        for side, sums, dimension in ((row, row_sums, 1), (col, col_sums, 0)):
            ahead = beyond(dots, side["base"], dimension)
            logits = ahead * scale
            if valid is not None:
                logits = jnp.where(valid, logits, -jnp.inf)
            new = {"lse": _extend(sums["lse"], logits, dimension)}
            if ids is not None:
                same = row["group"][:, None] == col["group"][None, :]
                same = same if valid is None else same & valid
                new["positive"] = sums["positive"] + jnp.where(same, ahead, 0).sum(dimension)
                new["count"] = sums["count"] + same.sum(dimension).astype(ahead.dtype)
            out.append(new)
        return out[0], out[1]

    own = own_dots(image, text, plan)
    zero = jnp.zeros(image.shape[0], scale.dtype)
    # A subtraction in every tile pays off where dot products are finer than float32.
    base, own_positive = (own, zero) if plan.fine else ((), own[0])
    start: dict[str, Any] = {"lse": (jnp.full_like(zero, -jnp.inf), zero)}
    rows, cols = {"x": image, "base": base}, {"x": text, "base": base}
    if ids is not None:
        start |= {"positive": zero, "count": zero}
        rows, cols = {**rows, "group": ids}, {**cols, "group": ids}
    sides = sweep(tile, rows, start, cols, start, block_size=plan.block_size, axis=axis)
    per_row, statistics = zero, []
    for sums in sides:
        highest, total = sums["lse"]
        count = sums["count"] if ids is not None else jnp.ones_like(zero)
        positive = sums["positive"] / count if ids is not None else own_positive
        statistics.append((highest + jnp.log(total), positive, count))
        # The large parts meet first: the sum that the gradient needs is rounded at its own size.
        per_row += (highest - scale * positive) + jnp.log(total)
    return all_mean(per_row / 2, axis), (base, tuple(statistics))


def _infonce_gradient(
    image: Array,
    text: Array,
    groups: Array | None,
    statistics: Any,
    scale: Array,
    share: Array,
    plan: Plan,
    axis: Axis | None,
) -> Any:
    """Gradients of both sides and of the scale; `share` is the weight of one row."""

    ids = group_ids(groups, image.shape[0], axis)

    def tile(row: Any, row_sums: Any, col: Any, col_sums: Any) -> tuple[Any, Any]:
        dots = tile_dots(row, col, plan.fine)
        over_row, over_col = beyond(dots, row["base"], 1), beyond(dots, col["base"], 0)
        by_row = jnp.exp(over_row * scale - row["lse"][:, None])
        by_col = jnp.exp(over_col * scale - col["lse"][None, :])
        # Where a row has one positive, its probability minus one is the mass of all others, summed below:
        # the subtraction itself would cancel when the model is right.
        same = row["group"][:, None] == col["group"][None, :]
        kept = ~(same & (row["count"] == 1)[:, None])
        valid = valid_pairs(row, col)
        kept = kept if valid is None else kept & valid
        by_row, by_col = jnp.where(kept, by_row, 0), jnp.where(kept, by_col, 0)
        moved = by_row * (over_row - row["positive"][:, None])
        moved += by_col * (over_col - col["positive"][None, :])
        weights = by_row + by_col - jnp.where(same & kept, 2 / row["count"][:, None], 0)
        to_rows, to_cols = weighted(weights, row, col)
        return {
            "x": row_sums["x"] + to_rows,
            "mass": row_sums["mass"] + by_row.sum(axis=1),
            "scale": row_sums["scale"] + moved.sum(axis=1),
        }, {"x": col_sums["x"] + to_cols, "mass": col_sums["mass"] + by_col.sum(axis=0)}

    base, sides = statistics
    rows, cols = (
        {"x": x, "base": base, "lse": lse, "positive": positive, "count": number, "group": ids}
        for x, (lse, positive, number) in zip((image, text), sides, strict=True)
    )
    zeros = jnp.zeros(image.shape, scale.dtype)
    start = {"x": zeros, "mass": zeros[:, 0]}
    row_start = {**start, "scale": zeros[:, 0]}
    row_sums, col_sums = sweep(tile, rows, row_start, cols, start, block_size=plan.block_size, axis=axis)
    mass = jnp.where(rows["count"] == 1, row_sums["mass"] + col_sums["mass"], 0)[:, None]
    to_image, to_text = row_sums["x"] - mass * text, col_sums["x"] - mass * image
    to_scale = share * all_sum(row_sums["scale"], axis)
    return (
        (share * scale * to_image).astype(image.dtype),
        (share * scale * to_text).astype(text.dtype),
        to_scale,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _infonce(plan: Plan, image: Array, text: Array, scale: Array, groups: Array | None) -> Array:
    return _infonce_forward(plan, image, text, scale, groups)[0]


@functools.partial(jax.jit, static_argnums=0)
def _infonce_forward(plan: Plan, image: Array, text: Array, scale: Array, groups: Array | None) -> Any:
    def local(sharded: Any, whole: Any, axis: Axis | None) -> Any:
        image, text, groups = sharded
        return _infonce_value(image, text, groups, whole[0], plan, axis)

    out = (False, ((True,) * (2 if plan.fine else 0), ((True,) * 3,) * 2))
    loss, statistics = plan.rows.run(local, (image, text, groups), (scale,), out)
    return loss, (image, text, scale, groups, statistics)


@functools.partial(jax.jit, static_argnums=0)
def _infonce_backward(plan: Plan, saved: Any, cotangent: Array) -> Any:
    image, text, scale, groups, statistics = saved
    count = image.shape[0]

    def local(sharded: Any, whole: Any, axis: Axis | None) -> Any:
        image, text, groups, statistics = sharded
        scale, cotangent = whole
        share = cotangent / (2 * count)
        return _infonce_gradient(image, text, groups, statistics, scale, share, plan, axis)

    sharded = (image, text, groups, statistics)
    return *once_only("infonce", plan.rows.run(local, sharded, (scale, cotangent), (True, True, False))), None


_infonce.defvjp(_infonce_forward, _infonce_backward)
