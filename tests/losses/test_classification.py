"""Cross-entropy and the loss of masked images, against float64 loops."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.losses import cross_entropy, masked_l1

RNG = np.random.default_rng(0)


def loop(logits, labels, smoothing=0.0):
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        top = max(row)
        lse = top + math.log(sum(math.exp(x - top) for x in row))
        target = [smoothing / len(row) + (1 - smoothing) * (k == label) for k in range(len(row))]
        total -= sum(t * (x - lse) for t, x in zip(target, row, strict=True))
    return total / len(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", [1.0, 50.0])
def test_cross_entropy(size, smoothing):
    logits, labels = size * RNG.standard_normal((7, 5)), RNG.integers(0, 5, 7)
    expected = loop(logits, labels, smoothing)
    actual = cross_entropy(jnp.asarray(logits, "float32"), jnp.asarray(labels), label_smoothing=smoothing)
    assert actual.dtype == jnp.float32 and actual.shape == ()
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


def test_cross_entropy_far_out():
    """No overflow, and the exact value where one class is certain."""
    logits = jnp.array([[1e4, 0.0], [0.0, 1e4]])
    assert float(cross_entropy(logits, jnp.array([0, 1]))) == 0.0
    assert float(cross_entropy(logits, jnp.array([1, 0]))) == 1e4
    gradient = jax.grad(cross_entropy)(logits, jnp.array([1, 0]))
    np.testing.assert_array_equal(gradient, [[0.5, -0.5], [-0.5, 0.5]])


def test_cross_entropy_of_bfloat16_is_summed_in_float32():
    logits = jnp.asarray(RNG.standard_normal((3, 4)), "bfloat16")
    actual = cross_entropy(logits, jnp.array([0, 1, 2]))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, loop(np.asarray(logits, "float64"), [0, 1, 2]), rtol=1e-6)


def test_cross_entropy_shapes():
    with pytest.raises(AssertionError):
        cross_entropy(jnp.zeros((3, 4, 2)), jnp.zeros(3, int))
    with pytest.raises(AssertionError):
        cross_entropy(jnp.zeros((3, 4)), jnp.zeros((3, 4)))


def test_masked_l1():
    made, image = RNG.standard_normal((2, 2, 4, 6, 3))
    mask = np.array([[1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]])
    total, count = 0.0, 0
    for b in range(2):
        for row in range(4):
            for column in range(6):
                if mask[b, (row // 2) * 3 + column // 2]:
                    count += 1
                    total += np.abs(made[b, row, column] - image[b, row, column]).sum()
    actual = masked_l1(*(jnp.asarray(x, "float32") for x in (made, image)), jnp.asarray(mask))
    np.testing.assert_allclose(actual, total / (count + 1e-5) / 3, rtol=1e-6)
    gradient = jax.grad(lambda x: masked_l1(x, jnp.asarray(image), jnp.asarray(mask)))(jnp.asarray(made))
    hidden = mask.reshape(2, 2, 3).repeat(2, 1).repeat(2, 2).astype(bool)
    assert (np.asarray(gradient)[~hidden] == 0).all() and (np.asarray(gradient)[hidden] != 0).all()


def test_masked_l1_of_nothing_hidden():
    image = jnp.ones((1, 4, 4, 3))
    assert float(masked_l1(0 * image, image, jnp.zeros((1, 4)))) == 0.0
    with pytest.raises(AssertionError):
        masked_l1(image, image[..., :1], jnp.zeros((1, 4)))
