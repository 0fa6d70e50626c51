"""Rotary positions: frequencies by hand, what rotations must keep, positions with several axes."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import ConfigError
from mmjax.nn import RopeConfig, apply_rope, rope_angles, rope_frequencies, rope_tables
from mmjax.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling

RNG = np.random.default_rng(0)
PLAIN = 100.0 ** -(np.arange(4) / 4)


def config(**options):
    return RopeConfig(head_dim=8, theta=100.0, **options)


def test_plain_and_linear_frequencies():
    np.testing.assert_allclose(rope_frequencies(config()), PLAIN, rtol=1e-6)
    scaled = rope_frequencies(config(scaling=LinearScaling(factor=4.0)))
    np.testing.assert_allclose(scaled, PLAIN / 4, rtol=1e-6)


def test_llama3_keeps_fast_slows_slow_and_blends_between():
    # Turns within a context of 20 tokens: 3.18, 1.01, 0.32, 0.10.
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_position_embeddings=20
    )
    found = np.asarray(rope_frequencies(config(scaling=scaling)))
    kept = (20 * PLAIN[1] / (2 * math.pi) - 0.5) / 1.5
    expected = [PLAIN[0], PLAIN[1] * (kept + (1 - kept) / 8), PLAIN[2] / 8, PLAIN[3] / 8]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_yarn_keeps_fast_and_slows_slow():
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=40, beta_fast=6.0, beta_slow=0.5)
    found = np.asarray(rope_frequencies(config(scaling=scaling)))
    np.testing.assert_allclose(found[0], PLAIN[0], rtol=1e-6)
    np.testing.assert_allclose(found[3], PLAIN[3] / 4, rtol=1e-6)
    assert PLAIN[1] / 4 < found[1] < PLAIN[1]
    assert config(scaling=scaling).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    given = YarnScaling(factor=4.0, original_max_position_embeddings=40, attention_factor=1.5)
    assert config(scaling=given).attention_factor == 1.5
    ratio = YarnScaling(factor=4.0, original_max_position_embeddings=40, mscale=2.0, mscale_all_dim=1.0)
    expected = (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    assert config(scaling=ratio).attention_factor == pytest.approx(expected)


def test_dynamic_changes_only_texts_beyond_the_context():
    settings = config(scaling=DynamicScaling(factor=2.0, original_max_position_embeddings=10))
    found = np.asarray(rope_frequencies(settings, jnp.array([4, 10, 25])))
    assert found.shape == (3, 1, 4)
    np.testing.assert_allclose(found[:2, 0], np.stack([PLAIN, PLAIN]), rtol=1e-6)
    base = 100 * (2 * 25 / 10 - 1) ** (8 / 6)
    np.testing.assert_allclose(found[2, 0], base ** -(np.arange(4) / 4), rtol=1e-5)
    np.testing.assert_allclose(rope_frequencies(settings), PLAIN, rtol=1e-6)


def test_longrope_has_divisors_for_either_length_of_a_row():
    scaling = LongRopeScaling(
        short_factor=(1.0, 1.5, 2.0, 3.0),
        long_factor=(2.0, 3.0, 4.0, 8.0),
        original_max_position_embeddings=10,
        factor=4.0,
    )
    settings = config(scaling=scaling)
    short, long = (np.asarray(f) for f in (scaling.short_factor, scaling.long_factor))
    found = rope_frequencies(settings, jnp.array([10, 11]))
    np.testing.assert_allclose(found[:, 0], np.stack([PLAIN / short, PLAIN / long]), rtol=1e-6)
    np.testing.assert_allclose(rope_frequencies(settings), PLAIN / short, rtol=1e-6)
    assert settings.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(10)))
    # The neighbours of a text do not change it.
    positions = np.array([np.arange(12), np.minimum(np.arange(12), 3)])
    together = rope_tables(settings, jnp.asarray(positions))
    for row in range(2):
        alone = rope_tables(settings, jnp.asarray(positions[row : row + 1]))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[row], b[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        DynamicScaling(factor=2.0, original_max_position_embeddings=4),
        LongRopeScaling(
            short_factor=(1.0, 1.5, 2.0, 3.0),
            long_factor=(2.0, 3.0, 4.0, 8.0),
            original_max_position_embeddings=4,
            factor=4.0,
        ),
    ],
    ids=lambda scaling: type(scaling).__name__,
)
@pytest.mark.parametrize("axes", [1, 3])
def test_packed_texts_have_their_own_lengths(scaling, axes):
    settings = config(scaling=scaling, sections=(2, 1, 1) if axes == 3 else ())
    segments = np.array([[1] * 7 + [2] * 3 + [3] * 5, [5] * 2 + [4] * 9 + [0] * 4])
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in ((7, 3, 5), (2, 9, 4))])
    positions = np.stack([positions // (axis + 1) for axis in range(axes)]) if axes == 3 else positions
    packed = rope_tables(settings, positions, segments)
    for row, column in zip(*np.nonzero(np.diff(segments, axis=1, prepend=-1)), strict=True):
        here = segments[row] == segments[row, column]
        alone = rope_tables(settings, positions[..., row : row + 1, here])
        for a, b in zip(packed, alone, strict=True):
            np.testing.assert_allclose(a[row, here], b[0], rtol=1e-6, atol=1e-6)


def test_rotation_keeps_lengths_and_sees_only_distances():
    query, key = (RNG.standard_normal((1, 1, 1, 8)).astype(np.float32) for _ in range(2))

    def turned(x, position):
        return np.asarray(apply_rope(jnp.asarray(x), *rope_tables(config(), jnp.array([[position]]))))

    np.testing.assert_allclose(np.linalg.norm(turned(query, 9)), np.linalg.norm(query), rtol=1e-5)
    products = [np.sum(turned(query, a) * turned(key, b)) for a, b in ((7, 3), (104, 100), (4, 0))]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)
    assert abs(products[0] - np.sum(turned(query, 3) * turned(key, 7))) > 1e-3


def test_rotation_by_hand():
    x = np.arange(4.0, dtype=np.float32).reshape(1, 1, 1, 4)
    cos, sin = (np.array(v, np.float32).reshape(1, 1, 2) for v in ((0.6, 1.0), (0.8, 0.0)))
    expected = [0 * 0.6 - 2 * 0.8, 1.0, 2 * 0.6 + 0 * 0.8, 3.0]
    np.testing.assert_allclose(apply_rope(x, cos, sin).ravel(), expected, rtol=1e-6)
    assert apply_rope(x.astype(jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_several_position_axes():
    positions = RNG.integers(0, 50, (3, 2, 5))
    blocks = RopeConfig(head_dim=12, sections=(2, 3, 1))
    assert blocks.axis_of_frequency == (0, 0, 1, 1, 1, 2)
    turns = RopeConfig(head_dim=12, sections=(3, 2, 1), interleaved=True)
    assert turns.axis_of_frequency == (0, 1, 2, 0, 1, 0)
    for settings in (blocks, turns):
        inv_freq = np.asarray(rope_frequencies(settings))
        found = np.asarray(rope_angles(jnp.asarray(positions), inv_freq, settings.axis_of_frequency))
        for index, axis in enumerate(settings.axis_of_frequency):
            np.testing.assert_allclose(found[..., index], positions[axis] * inv_freq[index], rtol=1e-6)
        # A text, whose axes are equal, is as with one axis.
        same = np.broadcast_to(positions[:1], positions.shape)
        several, single = (rope_tables(settings, jnp.asarray(p)) for p in (same, positions[0]))
        for a, b in zip(several, single, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(head_dim=7), "head_dim: 7 is not even"),
        (dict(head_dim=8, theta=0.0), "rope_theta: 0.0 is not a positive number"),
        (dict(head_dim=8, theta=math.inf), "rope_theta: inf"),
        (dict(head_dim=8, sections=(1, 2)), r"mrope_section: \(1, 2\) does not add up to head_dim / 2 = 4"),
        (
            dict(head_dim=8, scaling=LinearScaling(factor=-1.0)),
            "factor should be a positive number, got -1.0",
        ),
        (
            dict(
                head_dim=8,
                scaling=LongRopeScaling(
                    short_factor=(1.0,), long_factor=(1.0,), original_max_position_embeddings=8, factor=1.0
                ),
            ),
            "short_factor has 1 numbers, head_dim / 2 is 4",
        ),
        (
            dict(
                head_dim=8,
                scaling=Llama3Scaling(
                    factor=2.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_position_embeddings=8
                ),
            ),
            "high_freq_factor 4.0 is not above low_freq_factor 4.0",
        ),
    ],
)
def test_impossible_positions_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        RopeConfig(**options)
