"""All pairs of rows and columns, tile by tile: what the contrastive losses are sums over.

A tile function sees a block of rows and a block of columns and adds to accumulators that belong to the
rows and to the columns. Nothing larger than one tile is ever held, on one device or on a ring of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.losses.rows import Axis, vary_alike

Array = jax.Array
# (rows, their accumulators, columns, their accumulators) -> new accumulators of both.
Tile = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def sweep(
    tile: Tile, rows: Any, row_sums: Any, cols: Any, col_sums: Any, *, block_size: int, axis: Axis | None
) -> tuple[Any, Any]:
    """Visit every pair of a row and a column once.

    Args:
        tile: adds one tile; rows and columns that are padding have "valid" False, and "valid" is missing
            where there is no padding.
        rows: dict of arrays [n, ...], this device's rows.
        row_sums: pytree of arrays [n, ...] to add to.
        cols, col_sums: the same for the columns.
        block_size: rows and columns of a tile.
        axis: mesh axis (or axes) that rows and columns are sharded over, inside shard_map: the columns then
            travel once round the ring, with what is added to them. None on one device.

    Returns:
        The accumulators of the rows and of the columns.
    """
    row_sums, col_sums = vary_alike((row_sums, col_sums), (rows, cols))
    if axis is None:
        return _sweep_local(tile, rows, row_sums, cols, col_sums, block_size)
    size = lax.axis_size(axis)
    ring = [(device, (device - 1) % size) for device in range(size)]

    def travel(tree: Any) -> Any:
        return jax.tree.map(lambda x: lax.ppermute(x, axis, ring), tree)

    def visit(state: Any, _: None) -> tuple[Any, None]:
        cols, row_sums, col_sums = state
        # The next columns do not wait for this tile, so that they can travel while it is computed.
        next_cols = travel(cols)
        row_sums, col_sums = _sweep_local(tile, rows, row_sums, cols, col_sums, block_size)
        return (next_cols, row_sums, travel(col_sums)), None

    (_, row_sums, col_sums), _ = lax.scan(visit, (cols, row_sums, col_sums), length=size)
    return row_sums, col_sums


def _sweep_local(
    tile: Tile, rows: Any, row_sums: Any, cols: Any, col_sums: Any, block_size: int
) -> tuple[Any, Any]:
    count, other = (jax.tree.leaves(side)[0].shape[0] for side in (rows, cols))
    rows, row_sums = blocks(rows, block_size), blocks(row_sums, block_size, mark=False)
    cols, col_sums = blocks(cols, block_size), blocks(col_sums, block_size, mark=False)

    def row_step(col_sums: Any, row: Any) -> tuple[Any, Any]:
        def col_step(sums: Any, col: Any) -> tuple[Any, Any]:
            return tile(row[0], sums, col[0], col[1])

        sums, col_sums = lax.scan(col_step, row[1], (cols, col_sums))
        return col_sums, sums

    col_sums, row_sums = lax.scan(row_step, col_sums, (rows, row_sums))
    return join(row_sums, count), join(col_sums, other)


def blocks(tree: Any, size: int, mark: bool = True) -> Any:
    """Leading axis [n] to [n / size, size]; padded with zeros, which "valid" marks."""
    count = jax.tree.leaves(tree)[0].shape[0]
    size = min(size, count)
    padding = -count % size
    if padding:
        tree = jax.tree.map(lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)), tree)
        if mark:
            tree = {**tree, "valid": jnp.arange(count + padding) < count}
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def join(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], tree)


def valid_pairs(row: dict[str, Array], col: dict[str, Array]) -> Array | None:
    """bool, broadcastable to the tile: False where either side is padding; None without padding."""
    masks = []
    if "valid" in row:
        masks.append(row["valid"][:, None])
    if "valid" in col:
        masks.append(col["valid"][None, :])
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]
