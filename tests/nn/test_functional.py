"""The small functions, against values worked out by hand or in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import ConfigError
from mmjax.nn import (
    ACTIVATIONS,
    Embedding,
    Execution,
    LayerNorm,
    activation,
    canonical_dtype,
    dense,
    dropout,
    l2_normalize,
    layer_norm,
)
from mmjax.nn.products import accumulator

RNG = np.random.default_rng(0)
X = np.array([-30.0, -3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0, 30.0])
FORMULAS = {
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}
SAME = {
    "gelu_python": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "swish": "silu",
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    formula = FORMULAS[SAME.get(name, name)]
    expected = [formula(x) for x in X]
    np.testing.assert_allclose(activation(name)(jnp.asarray(X, "float32")), expected, rtol=2e-6, atol=1e-7)
    with jax.enable_x64(True):
        np.testing.assert_allclose(activation(name)(jnp.asarray(X)), expected, rtol=1e-12, atol=1e-15)


def test_the_gelus_differ():
    values = [float(activation(name)(jnp.float32(1.0))) for name in ("gelu", "gelu_new", "quick_gelu")]
    np.testing.assert_allclose(values, [0.8413447, 0.8411920, 0.8457958], atol=1e-6)


def test_unknown_activation():
    with pytest.raises(ConfigError, match="hidden_act: unknown activation 'gelu_10'; known: gelu, "):
        activation("gelu_10")


def test_layer_norm_by_hand():
    x = jnp.array([[1.0, 2.0, 3.0, 6.0]])
    # Mean 3, variance 3.5, and the epsilon is added before the root.
    expected = np.array([-2, -1, 0, 3]) / math.sqrt(3.5 + 0.5)
    np.testing.assert_allclose(layer_norm(x, jnp.ones(4), jnp.zeros(4), eps=0.5)[0], expected, rtol=1e-6)
    scaled = layer_norm(x, jnp.array([1.0, 2, 3, 4]), jnp.array([0.0, 1, 0, -1]), eps=0.5)[0]
    np.testing.assert_allclose(scaled, expected * [1, 2, 3, 4] + [0, 1, 0, -1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 1e-3])
def test_layer_norm_epsilon_decides_where_the_variance_is_small(eps):
    x = 1e-3 * RNG.standard_normal((3, 8)).astype("float32")
    centred = x.astype("float64") - x.astype("float64").mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    params = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    np.testing.assert_allclose(LayerNorm(eps).apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_of_large_and_narrow_values_runs_in_float32():
    x = (1000 + RNG.standard_normal((2, 16))).astype("float16")
    wide = x.astype("float64")
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    out = layer_norm(jnp.asarray(x), jnp.ones(16, "float16"), jnp.zeros(16, "float16"), eps=1e-5)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=2e-3)


def test_dense():
    x, kernel, bias = RNG.standard_normal((2, 3, 4)), RNG.standard_normal((4, 5)), RNG.standard_normal(5)
    narrow = [jnp.asarray(a, "float32") for a in (x, kernel, bias)]
    np.testing.assert_allclose(dense(*narrow), x @ kernel + bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dense(*narrow[:2]), x @ kernel, rtol=1e-5, atol=1e-6)
    assert dense(*narrow, dtype="bfloat16").dtype == jnp.bfloat16
    assert dense(narrow[0].astype("bfloat16"), *narrow[1:]).dtype == jnp.float32


def test_bfloat16_products_are_summed_in_float32():
    """256 + 1 is 256 in bfloat16: summed there, the ones would be lost."""
    x = jnp.array([[256.0] + [1.0] * 256], jnp.bfloat16)
    assert float(dense(x, jnp.ones((257, 1), jnp.bfloat16))[0, 0]) == 512.0


def test_accumulator():
    names = ["float16", "bfloat16", "float32", "float64"]
    assert [accumulator(name).name for name in names] == ["float32", "float32", "float32", "float64"]


def test_l2_normalize():
    x = RNG.standard_normal((3, 7)).astype("float32")
    expected = x / np.linalg.norm(x.astype("float64"), axis=-1, keepdims=True)
    np.testing.assert_allclose(l2_normalize(x), expected, rtol=1e-6)
    half = l2_normalize(jnp.asarray(300 * x, "float16"))
    assert half.dtype == jnp.float16  # The squares alone would overflow.
    np.testing.assert_allclose(half, expected, rtol=2e-3, atol=1e-3)


# Dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_statistics(rate):
    """Over 100,000 entries the share of zeros lies within five standard deviations."""
    count = 100_000
    out = np.asarray(dropout(jnp.full(count, 2.0), rate, jax.random.key(3)))
    kept = np.float32(2.0) / np.float32(1.0 - rate)
    np.testing.assert_allclose(out[out != 0], kept, rtol=1e-6)
    deviation = math.sqrt(rate * (1 - rate) / count)
    assert abs((out == 0).mean() - rate) < 5 * deviation
    assert abs(out.mean() - 2.0) < 5 * deviation * kept
    # Neighbours are dropped independently of each other.
    zero = (out == 0).astype(float)
    assert abs(np.mean(zero[1:] * zero[:-1]) - rate**2) < 5 * math.sqrt(rate**2 / count)


def test_dropout_bits_belong_to_their_key():
    x = jnp.ones((50, 40))
    first, same, other = (dropout(x, 0.5, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    agree = np.mean((np.asarray(first) == 0) == (np.asarray(other) == 0))
    assert abs(agree - 0.5) < 5 * math.sqrt(0.25 / 2000)


def test_no_dropout_without_a_key_or_a_rate():
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
    assert dropout(x.astype("bfloat16"), 0.5, jax.random.key(0)).dtype == jnp.bfloat16


# Tables


def test_embedding_rows_and_ids_outside():
    table = RNG.standard_normal((5, 3)).astype("float32")
    module, params = Embedding(5, 3), {"params": {"embedding": jnp.asarray(table)}}
    ids = jnp.array([[0, 4], [2, 2]])
    np.testing.assert_array_equal(module.apply(params, ids), table[[[0, 4], [2, 2]]])
    out = np.asarray(module.apply(params, jnp.array([3, 5, 1, 10**6])))
    np.testing.assert_array_equal(out[[0, 2]], table[[3, 1]])
    assert np.isnan(out[[1, 3]]).all()
    gradient = jax.grad(lambda p: module.apply(p, ids).sum())(params)["params"]["embedding"]
    np.testing.assert_array_equal(gradient, np.array([1, 0, 2, 0, 1])[:, None] * np.ones((5, 3)))


def test_embedding_in_a_compute_dtype():
    module = Embedding(5, 3, execution=Execution(dtype="bfloat16"))
    params = module.init(jax.random.key(0), jnp.zeros(1, int))
    assert params["params"]["embedding"].dtype == jnp.float32
    assert module.apply(params, jnp.zeros(1, int)).dtype == jnp.bfloat16
    assert module.apply(params, method="table").dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", np.float32, jnp.bfloat16])
def test_dtypes_by_name(dtype):
    assert canonical_dtype(dtype) == jnp.dtype(dtype).name
    assert Execution(dtype=dtype) == Execution(dtype=jnp.dtype(dtype).name)


@pytest.mark.parametrize("dtype", ["int8", "nonsense", int, object(), "float8_e4m3fn"])
def test_dtypes_that_are_no_floats(dtype):
    with pytest.raises(ConfigError, match="dtype: .* is not a floating type; use one of float16"):
        Execution(dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [(), (5,), (2, 5), (1, 5), (2, 3, 5)])
def test_narrow_dense_gradients_are_products_of_narrow_factors(dtype, rows):
    """Each gradient is the exact product of the rounded factors; the kernel's keeps its float32 sum."""
    x, g = (jnp.asarray(RNG.standard_normal((*rows, n)), dtype) for n in (4, 6))
    kernel, bias = (jnp.asarray(RNG.standard_normal(s), "float32") for s in ((4, 6), (6,)))

    def total(x, kernel, bias):
        return jnp.sum(dense(x, kernel, bias, dtype=dtype).astype("float32") * g.astype("float32"))

    dx, dkernel, dbias = jax.grad(total, argnums=(0, 1, 2))(x, kernel, bias)
    x64, g64 = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, g))
    rounded = np.asarray(kernel.astype(dtype), np.float64)
    assert (dx.dtype, dkernel.dtype, dbias.dtype) == (jnp.dtype(dtype), jnp.float32, jnp.float32)
    np.testing.assert_allclose(dkernel, x64.T @ g64, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dbias, g64.sum(0), rtol=1e-5, atol=1e-5)
    expected = (g64 @ rounded.T).reshape(x.shape)
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, rtol=2**-7, atol=2**-6)


def test_narrow_dense_gradients_may_be_transposed():
    """XLA on CPU compiles a transposed bfloat16 product to something it cannot run."""
    x, kernel = jnp.ones((2, 5, 4), "bfloat16"), jnp.ones((4, 6))

    @jax.jit
    def gradient(x, kernel):
        return jax.grad(lambda k: jnp.sum(dense(x, k, dtype="bfloat16").astype("float32")))(kernel).T

    np.testing.assert_array_equal(gradient(x, kernel), np.full((6, 4), 10.0))


def test_narrow_dense_under_vmap_equals_a_loop():
    x = jnp.asarray(RNG.standard_normal((3, 2, 5, 4)), "bfloat16")
    kernel = jnp.asarray(RNG.standard_normal((3, 4, 6)), "float32")

    def gradients(x, kernel):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(dense(*a, dtype="bfloat16"))), argnums=(0, 1))(x, kernel)

    for whole, parts in zip(
        jax.vmap(gradients)(x, kernel), zip(*map(gradients, x, kernel), strict=True), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(whole, "float32"), np.asarray(jnp.stack(parts), "float32"), rtol=2**-6, atol=2**-6
        )
