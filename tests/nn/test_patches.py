"""The order of patches on images that count upwards, and the bicubic matrix by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import interpolate_positions, patchify, unpatchify


def test_patches_go_row_by_row_and_their_values_too():
    image = jnp.arange(4 * 6 * 2).reshape(1, 4, 6, 2)  # value = 12 * row + 2 * column + channel
    patches = patchify(image, (2, 3))
    assert patches.shape == (1, 4, 12)
    np.testing.assert_array_equal(patches[0, 0], [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17])
    np.testing.assert_array_equal(patches[0, 1], [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23])
    np.testing.assert_array_equal(patches[0, 2], [24, 25, 26, 27, 28, 29, 36, 37, 38, 39, 40, 41])
    np.testing.assert_array_equal(unpatchify(patches, (2, 2), (2, 3)), image)


@pytest.mark.parametrize(("height", "width"), [(7, 9), (6, 6), (5, 8)])
def test_a_remainder_at_the_right_and_bottom_is_dropped(height, width):
    image = np.arange(2 * height * width * 3).reshape(2, height, width, 3)
    patches = np.asarray(patchify(jnp.asarray(image), (2, 3)))
    rows, columns = height // 2, width // 3
    assert patches.shape == (2, rows * columns, 18)
    for b in range(2):
        for r in range(rows):
            for c in range(columns):
                expected = image[b, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3].ravel()
                np.testing.assert_array_equal(patches[b, r * columns + c], expected)


def test_an_image_needs_four_axes():
    with pytest.raises(AssertionError):
        patchify(jnp.zeros((4, 4, 3)), (2, 2))


def cubic(x):
    """Keys' kernel with a = -0.75."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized(line, size):
    """One axis, one entry at a time, in float64; positions outside repeat the border."""
    out = []
    for i in range(size):
        place = (i + 0.5) * len(line) / size - 0.5
        left = int(np.floor(place))
        taps = range(left - 1, left + 3)
        out.append(sum(cubic(place - k) * line[min(max(k, 0), len(line) - 1)] for k in taps))
    return np.array(out)


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (4, 1)])
@pytest.mark.parametrize("new_grid", [(3, 4), (5, 2), (1, 1), (7, 9), (2, 4)])
def test_interpolation_equals_a_loop(grid, new_grid):
    table = np.random.default_rng(1).standard_normal((grid[0] * grid[1], 2))
    x = table.reshape(*grid, 2)
    x = np.apply_along_axis(resized, 0, x, new_grid[0])
    x = np.apply_along_axis(resized, 1, x, new_grid[1])
    actual = interpolate_positions(jnp.asarray(table, "float32"), grid, new_grid)
    np.testing.assert_allclose(actual, x.reshape(-1, 2), rtol=1e-5, atol=1e-5)


def test_interpolation_keeps_constants_and_the_dtype():
    out = interpolate_positions(jnp.full((12, 2), 3.0, jnp.bfloat16), (3, 4), (5, 7))
    assert out.dtype == jnp.bfloat16 and out.shape == (35, 2)
    np.testing.assert_array_equal(out.astype("float32"), 3.0)
    with pytest.raises(AssertionError):
        interpolate_positions(jnp.zeros((11, 2)), (3, 4), (5, 7))
