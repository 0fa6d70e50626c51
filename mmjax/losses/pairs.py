"""What the contrastive losses share: where the rows lie, and the products of one tile.

Values and gradients are computed tile by tile (see `sweep`); the gradients are written out by hand, because
automatic differentiation of the sweep would keep every tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax.errors import ConfigError
from mmjax.losses.rows import Axis, Rows, vary_alike
from mmjax.losses.sweep import blocks, join
from mmjax.nn.products import accumulator

Array = jax.Array
BLOCK_SIZE = 512
# A float32 dot product is off by some 6e-8, which a scale of 100 makes 6e-6 of a row's loss. The mean over
# many rows evens that out; over so few it is computed away, which takes three products in place of one.
FINE_PAIRS = 2048
# Embeddings of length 1 on grids of 1 / 2**12 and 1 / 2**11: every partial sum of their products is a
# multiple of 1 / 2**23 below 2, so that float32 holds it exactly in whatever order a product sums.
_GRIDS = (2.0**12, 2.0**11)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static: tile size, where both sides' rows lie, whether dot products are finer than float32."""

    block_size: int
    rows: Rows
    fine: bool


def prepare(
    image_embeds: Array,
    text_embeds: Array,
    groups: Array | None,
    scalars: dict[str, Array | float],
    block_size: int | None,
    mesh: Mesh | None,
    axis: Axis,
) -> tuple[Plan, Array, Array, Array | None, list[Array]]:
    """The plan, and both sides, the groups and the scalars as the losses take them.

    Raises:
        ConfigError: what cannot be a batch, groups, a scalar, a tile or a mesh's rows.
    """
    sides = {"image_embeds": image_embeds, "text_embeds": text_embeds}
    for name, value in sides.items():
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ConfigError(f"{name}: expected floating-point numbers, got {jnp.result_type(value)}")
    chex.assert_rank([image_embeds, text_embeds], 2)
    chex.assert_equal_shape([image_embeds, text_embeds])
    count = image_embeds.shape[0]
    if not count:
        raise ConfigError("image_embeds: no rows; a batch has at least one pair")
    block_size = BLOCK_SIZE if block_size is None else block_size
    if block_size < 1:
        raise ConfigError(f"block_size: expected a positive integer, got {block_size}")
    fine = count <= FINE_PAIRS and accumulator(image_embeds.dtype) == jnp.float32
    rows = Rows.over(mesh, axis, count, "image_embeds")
    dtype = accumulator(image_embeds.dtype)
    numbers = [_scalar(name, value, dtype) for name, value in scalars.items()]
    ids = None if groups is None else rows.lay(_ids(groups, count), "groups")
    laid = [rows.lay(value, name) for name, value in sides.items()]
    (image, text), ids, numbers = vary_alike((laid, ids, numbers))
    return Plan(block_size, rows, fine), image, text, ids, numbers


def _scalar(name: str, value: Array | float, dtype: Any) -> Array:
    number = jnp.asarray(value, dtype)
    if number.size != 1:
        raise ConfigError(f"{name}: expected one number, got shape {number.shape}")
    return number.reshape(())


def _ids(groups: Any, count: int) -> Any:
    """Groups as integers that jax does not cut: those of 64 bits are numbered anew where they are large."""
    groups = groups if isinstance(groups, jax.Array) else np.asarray(groups)
    if not jnp.issubdtype(groups.dtype, jnp.integer):
        raise ConfigError(f"groups: expected integers, got {groups.dtype}")
    if groups.shape != (count,):
        raise ConfigError(f"groups: expected one for each of the {count} rows, got shape {groups.shape}")
    kept = jax.dtypes.canonicalize_dtype(groups.dtype)
    if isinstance(groups, np.ndarray) and (groups.astype(kept) != groups).any():
        return np.unique(groups, return_inverse=True)[1].astype(np.int32)
    return groups


def all_sum(x: Array, axis: Axis | None) -> Array:
    total = x.sum()
    return total if axis is None else jax.lax.psum(total, axis)


def all_mean(x: Array, axis: Axis | None) -> Array:
    def mean(x: Array) -> Array:
        return x.mean() if axis is None else jax.lax.pmean(x.mean(), axis)

    # A long float32 sum is rounded at its own size; what that cost is the mean of what is left over.
    first = mean(x)
    return first + mean(x - first)


def group_ids(groups: Array | None, count: int, axis: Axis | None) -> Array:
    """This device's groups [n]; without groups every row of the whole batch is its own."""
    if groups is not None:
        return groups
    first = 0 if axis is None else jax.lax.axis_index(axis) * count
    return first + jnp.arange(count)


def tile_dots(row: dict[str, Array], col: dict[str, Array], fine: bool = False) -> tuple[Array, ...]:
    """Tile of dot products, in at least float32; if `fine` as two tiles whose sum is good to some 1e-9."""
    if not fine:
        return (_product(row["x"], col["x"], None),)
    (x, x_high, x_low), (y, y_high, y_low) = (
        _split(side["x"], grid) for side, grid in zip((row, col), _GRIDS, strict=True)
    )
    exactly = jax.lax.Precision.HIGHEST
    low = _product(x_high, y_low, exactly) + _product(x_low, y, exactly)
    return _product(x_high, y_high, exactly), low


def _product(x: Array, y: Array, precision: jax.lax.Precision | None) -> Array:
    sums = accumulator(x.dtype)
    return jnp.einsum("id,jd->ij", x, y, precision=precision, preferred_element_type=sums)


def _split(x: Array, grid: float) -> tuple[Array, Array, Array]:
    """x in float32, its part on the grid, and the rest."""
    x = x.astype(jnp.float32)
    high = jnp.round(x * grid) / grid
    return x, high, x - high


def own_dots(image: Array, text: Array, plan: Plan) -> tuple[Array, ...]:
    """Dot products of pair k's two sides [n], rounded just as in the tiles that the sweep computes.

    Where a model is right, a row's own product is nearly all of its log-sum-exp: the two have to cancel.
    """

    def diagonal(block: dict[str, Array]) -> tuple[Array, ...]:
        return tuple(jnp.diagonal(x) for x in tile_dots({"x": block["x"]}, {"x": block["y"]}, plan.fine))

    found = jax.lax.map(diagonal, blocks({"x": image, "y": text}, plan.block_size))
    return join(found, image.shape[0])


def beyond(dots: tuple[Array, ...], base: tuple[Array, ...], axis: int) -> Array:
    """Dot products of a tile relative to a base of each row (axis 1) or column (0), empty for zero."""
    if not base:
        return dots[0]
    # The first parts differ exactly; what the second ones add is small.
    high, low = (x - jnp.expand_dims(y, axis) for x, y in zip(dots, base, strict=True))
    return high + low


def weighted(weights: Array, row: dict[str, Array], col: dict[str, Array]) -> tuple[Array, Array]:
    """weights @ columns and weights^T @ rows, in at least float32."""
    sums, weights = weights.dtype, weights.astype(row["x"].dtype)
    return (
        jnp.einsum("ij,jd->id", weights, col["x"], preferred_element_type=sums),
        jnp.einsum("ij,id->jd", weights, row["x"], preferred_element_type=sums),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def once_only(losses: str, grads: Any) -> Any:
    """Passes the gradients of "infonce" or another loss on, and refuses to be differentiated."""
    return grads


@once_only.defjvp
def _refuse(losses: str, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        f"{losses}: first derivatives only, since the gradient is computed tile by tile and cannot be "
        "differentiated again"
    )
