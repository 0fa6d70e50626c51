"""Images to patches and back, and position tables for other resolutions."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def patchify(pixels: Array, patch_size: tuple[int, int]) -> Array:
    """Cut images into flattened patches, row by row; a remainder at the right and bottom is dropped.

    Args:
        pixels: [B, H, W, C].
        patch_size: (height, width) in pixels.

    Returns:
        [B, P, h*w*C], with the patch's rows, columns and channels in that order.

    >>> patchify(jnp.zeros((1, 8, 13, 3)), (4, 4)).shape
    (1, 6, 48)
    """
    chex.assert_rank(pixels, 4)
    batch, height, width, channels = pixels.shape
    ph, pw = patch_size
    rows, columns = height // ph, width // pw
    pixels = pixels[:, : rows * ph, : columns * pw]
    x = pixels.reshape(batch, rows, ph, columns, pw, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, ph * pw * channels)


def unpatchify(patches: Array, grid: tuple[int, int], patch_size: tuple[int, int]) -> Array:
    """The inverse of `patchify`: [B, P, h*w*C] to [B, H, W, C].

    >>> unpatchify(jnp.zeros((1, 6, 48)), (2, 3), (4, 4)).shape
    (1, 8, 12, 3)
    """
    (rows, columns), (ph, pw) = grid, patch_size
    x = patches.reshape(patches.shape[0], rows, columns, ph, pw, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(patches.shape[0], rows * ph, columns * pw, -1)


@functools.lru_cache(maxsize=64)
def _cubic_matrix(size: int, new_size: int) -> np.ndarray:
    """[new_size, size]: bicubic weights with a = -0.75, half-pixel centres, clamped borders, no antialiasing.

    Source: Keys 1981 with the constant that torch's interpolate uses; in float32, as there.
    """
    a = np.float32(-0.75)
    ratio = np.float32(size) / np.float32(new_size)
    source = ratio * (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    left = np.floor(source)
    offset = (source - left).astype(np.float32)

    def near(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = (far(offset + 1), near(offset), near(1 - offset), far(2 - offset))
    matrix = np.zeros((new_size, size), np.float32)
    for shift, weight in zip((-1, 0, 1, 2), weights, strict=True):
        columns = np.clip(left.astype(int) + shift, 0, size - 1)
        np.add.at(matrix, (np.arange(new_size), columns), weight.astype(np.float32))
    matrix.setflags(write=False)
    return matrix


def interpolate_positions(table: Array, grid: tuple[int, int], new_grid: tuple[int, int]) -> Array:
    """Resize a table of patch positions to another grid, bicubically, as torch's interpolate does.

    Args:
        table: [P, D], the positions of a (rows, columns) grid, row by row.
        grid: rows and columns of the table.
        new_grid: rows and columns wanted.

    Returns:
        [P', D] in the table's dtype.

    >>> interpolate_positions(jnp.ones((4, 8)), (2, 2), (3, 5)).shape
    (15, 8)
    """
    chex.assert_shape(table, (grid[0] * grid[1], None))
    rows, columns = (_cubic_matrix(old, new) for old, new in zip(grid, new_grid, strict=True))
    dtype = jnp.promote_types(table.dtype, jnp.float32)
    x = table.reshape(*grid, -1).astype(dtype)
    x = jnp.einsum("vw,hwd->hvd", columns.astype(dtype), x)
    x = jnp.einsum("uh,hvd->uvd", rows.astype(dtype), x)
    return x.reshape(new_grid[0] * new_grid[1], -1).astype(table.dtype)
