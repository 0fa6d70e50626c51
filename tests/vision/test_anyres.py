"""Grids, padding and layouts of tiles: by hand, and for many sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.errors import ConfigError
from mmjax.vision.anyres import (
    NEWLINE,
    anyres_layout,
    best_resolution,
    bilinear,
    fitted,
    pooled_layout,
    unpadded,
)
from mmjax.vision.tables import FeatureTable
from mmjax.vision.tiles import TileImageProcessor, pad_to_square

POINTS = ((8, 16), (16, 8), (16, 16), (24, 8), (8, 24))


def test_most_pixels_then_least_waste():
    # 10 x 10 fits into 16 x 16 whole, and into 8 x 16 only scaled down.
    assert best_resolution((10, 10), POINTS) == (16, 16)
    # All keep the one pixel whole: the smallest area wins, the first of several.
    assert best_resolution((1, 1), POINTS) == (8, 16)
    assert best_resolution((5, 40), POINTS) == (8, 24)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_layouts_hold_each_feature_once(height, width):
    """Every feature of the image is there once, rows have equal lengths, and ends end them."""
    layout = anyres_layout((height, width), POINTS, (8, 8), (4, 4))
    best = best_resolution((height, width), POINTS)
    assert layout.tiles == 1 + best[0] * best[1] // 64
    index = layout.index[:, 0]
    assert index[:16].tolist() == list(range(16))
    body = index[16:]
    rows = int((body == NEWLINE).sum())
    if not rows:
        # So flat that no row of features is its own: the image as a whole remains.
        assert not body.size and width > 8 * height
        return
    assert len(body) % rows == 0
    assert (body.reshape(rows, -1)[:, -1] == NEWLINE).all()
    features = body[body >= 0]
    assert len(set(features.tolist())) == len(features) and (features >= 16).all()
    assert features.size == 0 or features.max() < layout.tiles * 16
    # A padded row or column is dropped on both sides alike.
    fit = fitted((height, width), best)
    assert fit[0] == best[0] or fit[1] == best[1]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 400), st.integers(1, 400))
def test_scaled_down_layouts_are_weighted_means(height, width):
    layout = anyres_layout((height, width), POINTS, (8, 8), (4, 4), most_tiles=2, width=4)
    is_end = layout.index[:, 0] == NEWLINE
    np.testing.assert_allclose(layout.weights.sum(axis=1), 1, atol=1e-6)
    assert (layout.weights >= 0).all() and (layout.index[~is_end][:, 0] >= 0).all()
    # At most a fifth more than two tiles' features.
    assert (~is_end).sum() - 16 <= 1.21 * 2 * 16


def test_bilinear_is_what_the_formula_says():
    values = np.random.default_rng(0).standard_normal((5, 7))
    index, weights = bilinear((5, 7), (3, 4))
    for row in range(3):
        for column in range(4):
            y, x = (row + 0.5) * 5 / 3 - 0.5, (column + 0.5) * 7 / 4 - 0.5
            top, left = math.floor(y), math.floor(x)
            down, across = y - top, x - left
            near = values[top : top + 2, left : left + 2]
            wanted = np.array([1 - down, down])[: len(near)] @ near @ np.array([1 - across, across])
            found = (values.reshape(-1)[index[row, column]] * weights[row, column]).sum()
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_frames_are_pooled_by_two():
    layout = pooled_layout(2, (3, 3))
    assert len(layout) == 2 * 4 + 1 and layout.index[-1, 0] == NEWLINE
    assert layout.index[4, 0] == 9


def test_unpadding_rounds_before_it_cuts():
    assert unpadded((10, 30), (6, 9)) == (slice(1, 5), slice(0, 9))
    assert unpadded((30, 10), (9, 6)) == (slice(0, 9), slice(1, 5))


def test_tables_renumber_and_refuse():
    old = FeatureTable(rows=2, images=2, tiles=2, videos=1, frames=2)
    new = FeatureTable(rows=2, images=4, tiles=3, videos=2, frames=2)
    index = np.array([0, 5, 8, 11, 12, -1])
    moved = old.renumbered(index, new, np.array([2, 0]), np.array([1]))
    # Image 0, row 0; image 1, tile 0, row 1; the video's first and last rows; the end; nothing.
    assert moved.tolist() == [12, 1, 28, 31, 32, -1]


def test_tiles_of_an_image_are_its_parts():
    processor = TileImageProcessor(
        size=8, crop_size=8, image_grid_pinpoints=[[8, 16]], do_normalize=False, do_rescale=False
    )
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    batch = processor(image)
    tiles = batch["pixel_values"][0]
    np.testing.assert_array_equal(np.concatenate([tiles[1], tiles[2]], axis=1), image)
    tall = processor(np.full((16, 8, 3), 9, np.uint8))["pixel_values"][0]
    # Scaled to 8 x 4 in the middle of 8 x 16, zeros around.
    assert tall[1, 0, :, 0].tolist() == [0] * 6 + [9] * 2 and tall[2, 0, :, 0].tolist() == [9] * 2 + [0] * 6


def test_squares_have_the_colour_of_the_mean():
    square = pad_to_square(np.zeros((2, 5, 3), np.uint8), (0.5, 0.25, 1.0))
    assert square.shape == (5, 5, 3) and square[0, 0].tolist() == [127, 63, 255] and not square[1:3].any()


@pytest.mark.parametrize("points", [[], "x", [[8, 12]], [[8]]])
def test_pinpoints_that_are_refused(points):
    with pytest.raises(ConfigError, match="image_grid_pinpoints"):
        TileImageProcessor(size=8, crop_size=8, image_grid_pinpoints=points)
