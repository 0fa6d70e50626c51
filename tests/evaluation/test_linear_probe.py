"""The probe reaches scikit-learn's optimum on real digits, and the same one every time."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mmjax.errors import DataError
from mmjax.evaluation import LinearProbe, fit_linear_probe

DIGITS = load_digits()
PIXELS, LABELS = DIGITS.data.astype(np.float32), DIGITS.target
TRAIN, TEST = slice(0, 500), slice(1400, None)


def objective(kernel, bias, features, labels, l2):
    logits = features @ kernel + bias
    logits -= logits.max(axis=1, keepdims=True)
    own = logits[np.arange(len(labels)), labels]
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - own) + 0.5 * l2 * np.sum(kernel**2)


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_reaches_the_reference_objective(l2):
    probe = fit_linear_probe(PIXELS[TRAIN], LABELS[TRAIN], l2=l2)
    scaled = ((PIXELS[TRAIN] - probe.mean) / probe.scale).astype(np.float64)
    model = LogisticRegression(C=1 / (l2 * 500), max_iter=2000, tol=1e-6).fit(scaled, LABELS[TRAIN])
    wanted = objective(model.coef_.T, model.intercept_, scaled, LABELS[TRAIN], l2)
    found = objective(
        probe.kernel.astype(np.float64), probe.bias.astype(np.float64), scaled, LABELS[TRAIN], l2
    )
    assert probe.converged and probe.gradient <= 1e-5
    assert abs(found - wanted) <= 1e-5
    assert abs(probe.objective - found) <= 1e-5
    reference = model.score((PIXELS[TEST] - probe.mean) / probe.scale, LABELS[TEST])
    assert abs(probe.accuracy(PIXELS[TEST], LABELS[TEST]) - reference) <= 2 / 397


def test_the_same_bits_twice_and_inputs_untouched():
    features, labels = PIXELS[TRAIN].copy(), LABELS[TRAIN].copy()
    first, second = (fit_linear_probe(features, labels, l2=1e-2) for _ in range(2))
    np.testing.assert_array_equal(first.kernel, second.kernel)
    np.testing.assert_array_equal(first.bias, second.bias)
    np.testing.assert_array_equal(features, PIXELS[TRAIN])
    np.testing.assert_array_equal(labels, LABELS[TRAIN])


def test_float64_goes_further():
    with jax.enable_x64(True):
        probe = fit_linear_probe(DIGITS.data[TRAIN], LABELS[TRAIN], l2=1e-2, tolerance=1e-9)
    assert probe.kernel.dtype == np.float64 and probe.converged
    model = LogisticRegression(C=1 / (1e-2 * 500), max_iter=5000, tol=1e-12)
    scaled = (DIGITS.data[TRAIN] - probe.mean) / probe.scale
    model.fit(scaled, LABELS[TRAIN])
    found = objective(probe.kernel, probe.bias, scaled, LABELS[TRAIN], 1e-2)
    assert found <= objective(model.coef_.T, model.intercept_, scaled, LABELS[TRAIN], 1e-2) + 1e-12
    np.testing.assert_allclose(probe.kernel, model.coef_.T, atol=1e-5)


def test_large_offsets_and_constant_features_do_no_harm():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    features = np.stack([labels + 0.1 * rng.normal(size=60), np.full(60, 0.1), np.full(60, 1e4)], axis=1)
    features[:, 0] += 1000.0
    probe = fit_linear_probe(features.astype(np.float32), labels)
    np.testing.assert_array_equal(probe.scale[1:], [1.0, 1.0])
    assert probe.converged and probe.accuracy(features, labels) == 1.0


def test_unsolvable_tolerance_stops_at_the_last_step():
    rng = np.random.default_rng(0)
    probe = fit_linear_probe(
        rng.normal(size=(30, 3)), rng.integers(0, 3, 30), num_classes=4, tolerance=0.0, max_steps=40
    )
    assert probe.steps <= 40 and np.isfinite(probe.kernel).all() and probe.kernel.shape == (3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((0, 3))}, "not empty"),
        ({"features": np.zeros(4)}, "samples, width"),
        ({"features": np.array([[1.0], [np.inf]])}, "1 rows of features are not finite"),
        ({"labels": [0]}, "2 features but labels of shape"),
        ({"labels": [0, 0]}, "at least two classes"),
        ({"labels": [0, 3], "num_classes": 3}, "0..2"),
        ({"labels": [0.0, 1.0]}, "integers"),
        ({"l2": -1.0}, "must not be negative"),
        ({"l2": float("nan")}, "must not be negative"),
        ({"max_steps": 0}, "at least 1"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(DataError, match=message):
        fit_linear_probe(**({"features": np.eye(2), "labels": [0, 1]} | changes))


def test_a_probe_refuses_features_of_another_width():
    probe = LinearProbe(
        mean=np.zeros(2),
        scale=np.ones(2),
        kernel=np.eye(2),
        bias=np.zeros(2),
        objective=0.0,
        gradient=0.0,
        steps=0,
        converged=True,
    )
    np.testing.assert_array_equal(probe.predict([[0.0, 3.0], [1.0, 0.0]]), [1, 0])
    with pytest.raises(DataError, match=r"\[N, 2\]"):
        probe.predict(np.zeros((1, 3)))
