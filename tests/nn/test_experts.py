"""A mixture of experts: equal to a loop over tokens, for few tokens and for many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import Execution, MixtureOfExperts, mix_experts, route

RNG = np.random.default_rng(0)
EXPERTS, WIDTH, HIDDEN = 6, 5, 7
GATE, UP = (RNG.standard_normal((EXPERTS, WIDTH, HIDDEN)).astype(np.float32) for _ in range(2))
DOWN = RNG.standard_normal((EXPERTS, HIDDEN, WIDTH)).astype(np.float32)


def by_loop(x, weights, chosen):
    out = np.zeros_like(x)
    for token, (row, experts) in enumerate(zip(weights, chosen, strict=True)):
        for weight, e in zip(row, experts, strict=True):
            gate = x[token] @ GATE[e]
            out[token] += weight * ((gate / (1 + np.exp(-gate)) * (x[token] @ UP[e])) @ DOWN[e])
    return out


def test_route_takes_the_largest():
    logits = RNG.standard_normal((4, EXPERTS)).astype(np.float32)
    weights, chosen = route(jnp.asarray(logits), 3, normalize=False)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.argsort(-logits, axis=1)[:, :3]
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(weights, np.take_along_axis(probabilities, expected, axis=1), rtol=1e-5)
    normal, _ = route(jnp.asarray(logits), 3, normalize=True)
    np.testing.assert_allclose(normal, weights / weights.sum(axis=1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 4, 33])
def test_equal_to_a_loop(tokens):
    x = RNG.standard_normal((tokens, WIDTH)).astype(np.float32)
    weights, chosen = route(jnp.asarray(RNG.standard_normal((tokens, EXPERTS))), 2, normalize=True)
    out = jax.jit(mix_experts, static_argnames="act")(x, weights, chosen, GATE, UP, DOWN, act="silu")
    np.testing.assert_allclose(out, by_loop(x, np.asarray(weights), np.asarray(chosen)), atol=2e-5)


@pytest.mark.usefixtures("optimised")
def test_few_and_many_have_the_same_gradients():
    """Three tokens fetch their kernels; the same three among others, which weigh nothing, are sorted."""
    x = RNG.standard_normal((3, WIDTH)).astype(np.float32)
    chosen = jnp.array([[0, 2], [2, 4], [4, 0]])
    weights = jnp.array([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1]])

    def total(repeats):
        def loss(x, gate, up, down):
            many = jnp.concatenate([x] * repeats)
            taken = jnp.concatenate([weights] + [jnp.zeros_like(weights)] * (repeats - 1))
            out = mix_experts(many, taken, jnp.tile(chosen, (repeats, 1)), gate, up, down, act="silu")
            return jnp.sum(jnp.sin(out[:3]))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))

    few, many = total(1)(x, GATE, UP, DOWN), total(4)(x, GATE, UP, DOWN)
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for gradient in few[1][1:]:
        unused = [not np.any(gradient[e]) for e in range(EXPERTS)]
        assert unused == [False, True, False, True, False, True]


def test_compute_dtype_is_a_choice():
    x = jnp.asarray(RNG.standard_normal((2, 9, WIDTH)), jnp.float32)
    plain = MixtureOfExperts(EXPERTS, 2, HIDDEN, "silu", kernel_init=jax.nn.initializers.normal(0.3))
    params = plain.init(jax.random.key(0), x)
    narrow = plain.clone(execution=Execution(dtype="bfloat16"))
    out, expected = jax.jit(narrow.apply)(params, x), plain.apply(params, x)
    assert out.dtype == jnp.bfloat16 and out.shape == x.shape
    close = np.isclose(np.asarray(out, np.float32), expected, rtol=0.05, atol=0.05)
    assert close.mean() > 0.9  # A token on the border between two experts may take the other one.
    gradients = jax.jit(jax.grad(lambda p: narrow.apply(p, x).astype(jnp.float32).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
