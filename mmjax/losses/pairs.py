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
from jax.sharding import Mesh

from mmjax.errors import ConfigError
from mmjax.losses.rows import Axis, Rows
from mmjax.nn.functional import accumulator

Array = jax.Array
BLOCK_SIZE = 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static: tile size, and where both sides' rows lie."""

    block_size: int
    rows: Rows


def make_plan(
    image_embeds: Array, text_embeds: Array, block_size: int | None, mesh: Mesh | None, axis: Axis
) -> Plan:
    chex.assert_rank([image_embeds, text_embeds], 2)
    chex.assert_equal_shape([image_embeds, text_embeds])
    block_size = BLOCK_SIZE if block_size is None else block_size
    if block_size < 1:
        raise ConfigError(f"block_size: expected a positive integer, got {block_size}")
    return Plan(block_size, Rows.over(mesh, axis, image_embeds.shape[0], "image_embeds"))


def all_sum(x: Array, axis: Axis | None) -> Array:
    total = x.sum()
    return total if axis is None else jax.lax.psum(total, axis)


def all_mean(x: Array, axis: Axis | None) -> Array:
    return x.mean() if axis is None else jax.lax.pmean(x.mean(), axis)


def group_ids(groups: Array | None, count: int, axis: Axis | None) -> Array:
    """This device's groups [n]; without groups every row of the whole batch is its own."""
    if groups is not None:
        return groups
    first = 0 if axis is None else jax.lax.axis_index(axis) * count
    return first + jnp.arange(count)


def tile_dots(row: dict[str, Array], col: dict[str, Array]) -> Array:
    """Tile of dot products, in at least float32."""
    sums = accumulator(row["x"].dtype)
    return jnp.einsum("id,jd->ij", row["x"], col["x"], preferred_element_type=sums)


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
