"""Narrow products and what is made of them: values, gradients, and forms that XLA cannot run by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import attention
from mmjax.nn.functional import dense, lookup
from mmjax.nn.products import batched_product

RNG = np.random.default_rng(0)
AXES = [(3, 3), (3, 2), (2, 3), (2, 2)]
# [T, S, width]: one query, few queries of many keys, as many, more; powers of two and others.
SIZES = [(1, 5, 4), (3, 33, 8), (16, 16, 16), (17, 5, 7), (64, 33, 64)]


def factors(rows, columns, summed, x_axis, y_axis):
    """Numbers that bfloat16 holds, as float32."""
    shapes = [(2, 3, 0, 0), (2, 3, 0, 0)]
    made = []
    for shape, axis, other in zip(shapes, (x_axis, y_axis), (rows, columns), strict=True):
        sizes = list(shape)
        sizes[axis], sizes[5 - axis] = summed, other
        made.append(np.asarray(RNG.standard_normal(sizes), jnp.bfloat16).astype(np.float32))
    return made


def wide(x, y, x_axis, y_axis):
    """The product in float64."""
    x, y = (np.moveaxis(np.float64(z), axis, -1) for z, axis in ((x, x_axis), (y, y_axis)))
    return np.einsum("bktc,bksc->bkts", x, y)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("sizes", SIZES)
def test_sums_of_narrow_factors_are_wide(sizes, axes):
    x, y = factors(*sizes, *axes)
    want = wide(x, y, *axes)
    made = jax.jit(batched_product, static_argnums=(2, 3))(jnp.bfloat16(x), jnp.bfloat16(y), *axes)
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(made, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(batched_product(x, y, *axes), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_those_of_the_sum(sizes, axes):
    x, y = factors(*sizes, *axes)
    g = np.asarray(RNG.standard_normal((2, 3, *sizes[:2])), jnp.bfloat16).astype(np.float32)

    def pull(x, y):
        return jax.vjp(lambda x, y: batched_product(x, y, *axes), x, y)[1](g)

    made = jax.jit(pull)(jnp.bfloat16(x), jnp.bfloat16(y))
    for mine, exact in zip(made, pull(x, y), strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(mine), exact, rtol=0, atol=2**-8 * np.abs(exact).max())


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("turned", [(0, 1, 3, 2), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_factors_and_sums_may_be_transposed(turned, axes):
    """jaxlib 0.10 compiles some such programs to something that it cannot run."""
    for sizes in SIZES:
        x, y = factors(*sizes, *axes)

        def turn(x, y):
            x, y = (z.swapaxes(1, 2).astype(jnp.bfloat16).swapaxes(1, 2) for z in (x, y))
            return batched_product(x, y, *axes).transpose(turned)

        want = wide(x, y, *axes).transpose(turned)
        np.testing.assert_allclose(jax.jit(turn)(x, y), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_under_vmap_it_is_the_same():
    x, y = (jnp.bfloat16(np.stack([z, -2 * z])) for z in factors(5, 6, 4, 3, 2))
    made = jax.vmap(lambda x, y: batched_product(x, y, 3, 2))(x, y)
    for one, a, b in zip(made, x, y, strict=True):
        np.testing.assert_array_equal(one, batched_product(a, b, 3, 2))


MASKS = {
    "none": None,
    "causal": np.tril(np.ones((7, 7), bool))[None, None],
    "a row that sees nothing": (np.arange(7) != 2)[None, None, :, None]
    & (np.arange(7) < 5)[None, None, None],
}


def pull(query, key, value, g, mask, **options):
    """The output and the gradients of attention."""
    out, back = jax.vjp(lambda *x: attention(*x, mask, **options)[0], query, key, value)
    return out, *back(g)


def narrow_inputs(queries, keys, kv_heads, dtype=jnp.bfloat16):
    """Query, key, value and a cotangent."""
    sizes = ((queries, 4), (keys, kv_heads), (keys, kv_heads), (queries, 4))
    return [jnp.asarray(RNG.standard_normal((2, heads, length, 8)), dtype) for length, heads in sizes]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("options", [{"scale": 0.7}, {"softcap": 2.0}], ids=["plain", "softcap"])
def test_attention_in_bfloat16_has_the_gradient_of_float32(options, kv_heads, name):
    narrow = narrow_inputs(7, 7, kv_heads)
    exact = pull(*(x.astype(jnp.float32) for x in narrow), MASKS[name], **options)
    for made, want in zip(jax.jit(lambda *x: pull(*x, MASKS[name], **options))(*narrow), exact, strict=True):
        assert made.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(made), want, rtol=0, atol=2e-2 * np.abs(want).max())


@pytest.mark.parametrize("queries, keys", [(1, 7), (3, 300)])
def test_so_have_one_query_and_many_keys_and_vmap(queries, keys):
    narrow = narrow_inputs(queries, keys, 2)
    mask = (np.arange(keys) % 3 > 0)[None, None, None]
    exact = pull(*(x.astype(jnp.float32) for x in narrow), mask)
    mapped = jax.vmap(lambda *x: pull(*x, mask))(*(jnp.stack([x, x]) for x in narrow))
    for made, twice, want in zip(pull(*narrow, mask), mapped, exact, strict=True):
        for mine in (made, *twice):
            np.testing.assert_allclose(np.float32(mine), want, rtol=0, atol=2e-2 * np.abs(want).max())


def test_attention_in_float16_keeps_small_gradients():
    query, key, value, g = narrow_inputs(256, 256, 4, jnp.float16)
    g = g * jnp.float16(1e-5)
    exact = pull(*(x.astype(jnp.float32) for x in (query, key, value, g)), None)
    for made, want in zip(pull(query, key, value, g, None)[1:], exact[1:], strict=True):
        np.testing.assert_allclose(np.float32(made), want, rtol=0, atol=5e-2 * np.abs(want).max())


def test_attention_in_bfloat16_keeps_no_weights():
    narrow = narrow_inputs(64, 64, 4)
    _, back = jax.vjp(lambda *x: attention(*x)[0], *narrow[:3])
    assert max(x.size for x in jax.tree.leaves(back) if hasattr(x, "size")) < 2 * 4 * 64 * 64


def test_attention_weights_have_a_gradient_in_bfloat16():
    query, key, value, g = (jnp.bfloat16(RNG.standard_normal((1, 2, 5, 4))) for _ in range(4))
    mask = np.tril(np.ones((5, 5), bool))

    def through_weights(query, key):
        weights = attention(query, key, value, mask)[1].astype(jnp.float32)
        return (weights * jnp.arange(5.0)).sum()

    made = jax.grad(through_weights, (0, 1))(query, key)
    exact = jax.grad(through_weights, (0, 1))(query.astype(jnp.float32), key.astype(jnp.float32))
    for mine, want in zip(made, exact, strict=True):
        np.testing.assert_allclose(np.float32(mine), want, rtol=0, atol=2e-2 * np.abs(want).max())


def test_kernels_may_be_narrow_where_inputs_train():
    x, kernel, g = (jnp.bfloat16(RNG.standard_normal(s)) for s in ((2, 5, 6), (6, 9), (2, 5, 9)))
    dx = jax.jit(lambda x: jax.vjp(lambda x: dense(x, kernel), x)[1](g)[0])(x)
    want = np.einsum("btf,df->btd", np.float64(g), np.float64(kernel))
    np.testing.assert_allclose(np.float32(dx), want, rtol=0, atol=2**-8 * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_of_a_table_and_their_gradient(dtype):
    table = jnp.asarray(RNG.standard_normal((6, 3)), dtype)
    ids = np.array([[0, 5, 5], [2, 6, -1]])
    rows, back = jax.jit(lambda t: jax.vjp(lambda t: lookup(t, ids), t))(table)
    assert rows.dtype == dtype
    want = np.float32(table)[[0, 5, 5, 2, 0, 5]].reshape(2, 3, 3)
    want[1, 1] = np.nan
    np.testing.assert_array_equal(np.float32(rows), want)
    (gradient,) = back(jnp.ones_like(rows))
    np.testing.assert_array_equal(np.float32(gradient)[:, 0], [1, 0, 1, 0, 0, 3])
