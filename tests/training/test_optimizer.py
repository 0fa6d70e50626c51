"""Patterns, and AdamW against arithmetic written out in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.errors import ConfigError
from mmjax.training.optimizer import Rule, label_parameters, make_optimizer, trained_rules
from mmjax.training.schedules import FROZEN, Constant, Linear

PATHS = ("eyes/kernel", "eyes/bias", "head/kernel", "head/bias")
SHAPES = {"eyes/kernel": (3, 4), "eyes/bias": (4,), "head/kernel": (4, 2), "head/bias": (2,)}
ONE = Constant(value=1.0)


def test_first_match_wins() -> None:
    rules = [Rule(".*/bias", ONE), Rule("eyes/.*", FROZEN), Rule(".*", ONE)]
    assert label_parameters(PATHS, rules, "s") == {
        "eyes/kernel": 1,
        "eyes/bias": 0,
        "head/kernel": 2,
        "head/bias": 0,
    }
    assert list(trained_rules(rules)) == [0, 2]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([Rule("eyes/.*", ONE)], ["'head/kernel'", "'head/bias'", "no pattern covers"]),
        ([Rule("tail/.*", FROZEN), Rule(".*", ONE)], ["'tail/.*' matches no parameter"]),
        ([Rule("head", FROZEN), Rule(".*", ONE)], ["'head' matches no parameter", "whole path"]),
        ([Rule(".*", ONE), Rule("head/.*", FROZEN)], ["'head/.*' comes too late"]),
        ([Rule("(", ONE)], ["'('", "not a regular expression"]),
        ([], ["'eyes/kernel'"]),
    ],
)
def test_patterns_that_do_not_fit_are_named(rules: list[Rule], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        label_parameters(PATHS, rules, "align")
    for word in ["stage 'align'", *words]:
        assert word in str(caught.value)


def draw(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {path: generator.standard_normal(shape) for path, shape in SHAPES.items()}


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_by_hand(clip_norm: float, weight_decay: float) -> None:
    b1, b2, eps = 0.8, 0.95, 1e-6
    schedules = {0: Linear(peak=0.1).build(4), 1: Constant(value=0.02).build(4)}
    labels = {"eyes/kernel": 0, "eyes/bias": 0, "head/kernel": 1, "head/bias": 1}
    optimizer = make_optimizer(
        labels, schedules, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, clip_norm=clip_norm
    )
    wanted = draw(0)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), wanted)
    state = optimizer.init(params)
    first = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    second = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    for count in range(3):
        grads = draw(count + 1)
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
        updates, state = optimizer.update(given, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for path, grad in grads.items():
            grad = grad * factor
            first[path] = b1 * first[path] + (1 - b1) * grad
            second[path] = b2 * second[path] + (1 - b2) * grad**2
            direction = (first[path] / (1 - b1 ** (count + 1))) / (
                np.sqrt(second[path] / (1 - b2 ** (count + 1))) + eps
            )
            if wanted[path].ndim >= 2:
                direction = direction + weight_decay * wanted[path]
            rate = 0.1 * (1 - count / 4) if labels[path] == 0 else 0.02
            wanted[path] = wanted[path] - rate * direction
    for path, value in wanted.items():
        np.testing.assert_allclose(np.asarray(params[path]), value, rtol=2e-5, atol=1e-6)


def test_muon_moves_kernels_along_orthogonal_matrices_and_all_else_as_adamw() -> None:
    shapes = {
        "eyes/kernel": (6, 9),
        "eyes/bias": (9,),
        "patch/kernel": (2, 2, 3, 4),
        "table/embedding": (5, 4),
    }
    schedules = {0: Constant(value=0.1).build(1)}
    options = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0}
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    generator = np.random.default_rng(0)
    grads = {
        path: jnp.asarray(generator.standard_normal(shape), jnp.float32) for path, shape in shapes.items()
    }
    steps = {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(dict.fromkeys(shapes, 0), schedules, optimizer=name, **options)
        steps[name], _ = optimizer.update(grads, optimizer.init(params), params)
    for path in shapes:
        if path != "eyes/kernel":
            np.testing.assert_array_equal(steps["muon"][path], steps["adamw"][path])
    moved = -np.asarray(steps["muon"]["eyes/kernel"]) / (0.1 * 0.2 * 9**0.5)
    left, _, right = np.linalg.svd(np.asarray(grads["eyes/kernel"]), full_matrices=False)
    # Five steps of Newton and Schulz bring every singular value near one, and keep the singular vectors.
    turned = left.T @ moved @ right.T
    assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-4
    assert (np.diag(turned) > 0.6).all() and (np.diag(turned) < 1.3).all()
