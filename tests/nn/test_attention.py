"""Attention against a plain loop, with masks written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import (
    Attention,
    TransformerConfig,
    attention,
    causal_mask,
    combine_masks,
    merge_heads,
    padding_mask,
    split_heads,
)

RNG = np.random.default_rng(0)


def loop(query, key, value, mask, scale):
    """One row at a time, in float64; `mask` is [B, N, T, S]."""
    batch, heads, rows, width = query.shape
    group = heads // key.shape[1]
    out = np.zeros((batch, heads, rows, width))
    weights = np.zeros((batch, heads, rows, key.shape[2]))
    for b in range(batch):
        for n in range(heads):
            for t in range(rows):
                seen = [s for s in range(key.shape[2]) if mask[b, n, t, s]]
                scores = [scale * np.dot(query[b, n, t], key[b, n // group, s]) for s in seen]
                top = max(scores)
                powers = [np.exp(score - top) for score in scores]
                for s, power in zip(seen, powers, strict=True):
                    weights[b, n, t, s] = power / sum(powers)
                    out[b, n, t] += weights[b, n, t, s] * value[b, n // group, s]
    return out, weights


CAUSAL = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
MASKS = {
    "none": None,
    "causal": CAUSAL[None, None],
    "band": np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]], bool)[None, None],
    "padding": np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 1]], bool)[:, None, None],
    "per head": RNG.random((2, 4, 4, 5)) < 0.6,
}
MASKS["per head"][..., 0] = True


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_equals_a_loop(name, kv_heads, scale):
    query = RNG.standard_normal((2, 4, 4, 3))
    key, value = RNG.standard_normal((2, 2, kv_heads, 5, 3))
    mask = MASKS[name]
    whole = np.broadcast_to(True if mask is None else mask, (2, 4, 4, 5))
    expected = loop(query, key, value, whole, 3**-0.5 if scale is None else scale)
    with jax.enable_x64(True):
        actual = attention(*map(jnp.asarray, (query, key, value)), mask, scale=scale)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert (np.asarray(actual[1])[~whole] == 0).all()


def test_query_heads_share_key_heads_in_order():
    """Query heads 0 and 1 use key head 0, heads 2 and 3 key head 1."""
    value = np.zeros((1, 2, 3, 2), np.float32)
    value[:, 1] = 1
    out, _ = attention(jnp.ones((1, 4, 3, 2)), jnp.ones((1, 2, 3, 2)), jnp.asarray(value))
    np.testing.assert_allclose(out[0, :, 0, 0], [0, 0, 1, 1], atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_that_may_see_nothing_sees_everything_equally(dtype):
    query, key, value = (jnp.asarray(RNG.standard_normal((1, 1, 2, 4)), dtype) for _ in range(3))
    mask = np.array([[False, False], [True, False]])[None, None]
    out, weights = attention(query, key, value, mask)
    assert out.dtype == weights.dtype == dtype
    np.testing.assert_array_equal(np.asarray(weights, np.float32)[0, 0], [[0.5, 0.5], [1, 0]])
    np.testing.assert_array_equal(out[0, 0, 1], value[0, 0, 0])
    gradient = jax.grad(lambda q: attention(q, key, value, mask)[0].astype("float32").sum())(query)
    assert jnp.isfinite(gradient.astype("float32")).all()


def test_large_scores_do_not_overflow():
    query = jnp.full((1, 1, 1, 4), 200.0, jnp.float16)
    key = jnp.stack([query[0, 0, 0], -query[0, 0, 0]])[None, None]
    out, weights = attention(query, key, jnp.arange(8.0, dtype=jnp.float16).reshape(1, 1, 2, 4))
    np.testing.assert_array_equal(weights[0, 0, 0], [1, 0])
    np.testing.assert_array_equal(out[0, 0, 0], [0, 1, 2, 3])


def test_dropout_falls_on_the_weights_after_the_softmax():
    query, key, value = (jnp.asarray(RNG.standard_normal((1, 2, 3, 4)), "float32") for _ in range(3))
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(1)}
    out, weights = attention(query, key, value, **options)
    plain, plain_weights = attention(query, key, value)
    np.testing.assert_array_equal(weights, plain_weights)
    identity = jnp.broadcast_to(jnp.eye(3), (1, 2, 3, 3))
    kept, _ = attention(query[..., :3], key[..., :3], identity, scale=0.0, **options)
    # With equal weights of 1/3 each is dropped, or doubled to 2/3.
    assert set(np.unique(np.asarray(kept).round(6))) == {0.0, np.float32(2 / 3).round(6)}
    assert not np.allclose(out, plain)
    same, _ = attention(query, key, value, dropout_rate=0.5)
    np.testing.assert_array_equal(same, plain)


@pytest.mark.parametrize("length, kept", [(200, True), (300, False)])
def test_weights_over_many_keys_are_made_again_for_the_gradient(length, kept):
    """Also with dropout, on the same weights; the gradient is that of an attention that keeps them."""
    query, key, value = (
        jax.random.normal(jax.random.key(n), (1, 2, length, 4), jnp.float32) for n in range(3)
    )
    mask, dice = jnp.tril(jnp.ones((length, length), bool)), jax.random.key(9)

    def run(query, key, value):
        return attention(query, key, value, mask, dropout_rate=0.2, dropout_key=dice)[0]

    def plain(query, key, value):
        weights = jax.nn.softmax(jnp.where(mask, query @ key.mT / 2, -jnp.inf))
        return jnp.where(jax.random.bernoulli(dice, 0.8, weights.shape), weights / 0.8, 0) @ value

    out, pull = jax.vjp(run, query, key, value)
    held = max(leaf.size for leaf in jax.tree.leaves(pull))
    assert (held >= 2 * length**2) == kept
    expected, pull_plain = jax.vjp(plain, query, key, value)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for mine, other in zip(pull(value), pull_plain(value), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_heads_are_consecutive_pieces_of_the_last_axis():
    x = jnp.arange(2 * 3 * 6).reshape(2, 3, 6)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 3, 2)
    for n in range(3):
        np.testing.assert_array_equal(heads[:, n], x[..., 2 * n : 2 * n + 2])
    np.testing.assert_array_equal(merge_heads(heads), x)


def test_masks():
    np.testing.assert_array_equal(causal_mask(3)[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(padding_mask(jnp.array([[2, 0, 1]])), [[[[True, False, True]]]])
    both = combine_masks(None, causal_mask(3), padding_mask(jnp.array([[1, 0, 1], [0, 1, 1]])))
    np.testing.assert_array_equal(both[0, 0], [[1, 0, 0], [1, 0, 0], [1, 0, 1]])
    np.testing.assert_array_equal(both[1, 0], [[0, 0, 0], [0, 1, 0], [0, 1, 1]])
    assert combine_masks() is None


def test_wrong_shapes_are_refused():
    x = jnp.zeros((1, 2, 3, 4))
    with pytest.raises(AssertionError):
        attention(x[0], x[0], x[0])
    with pytest.raises(AssertionError):
        attention(x, x, x[:, :1])
    with pytest.raises(AssertionError):
        padding_mask(jnp.ones(3))


def test_module_attends_to_its_context():
    config = TransformerConfig(hidden_size=4, intermediate_size=8, num_attention_heads=2, qkv_bias=False)
    module = Attention(config)
    x, context = jnp.asarray(RNG.standard_normal((2, 3, 4)), "float32"), jnp.ones((2, 5, 4))
    params = module.init(jax.random.key(0), x, context=context)["params"]
    assert {name: set(value) for name, value in params.items()} == {
        "q_proj": {"kernel"}, "k_proj": {"kernel"}, "v_proj": {"kernel"}, "out_proj": {"kernel", "bias"},
    }  # fmt: skip
    out, weights = module.apply({"params": params}, x, context=context)
    assert out.shape == (2, 3, 4) and weights.shape == (2, 2, 3, 5)
    # Equal keys: every weight is a fifth, and the output is that of any one of them.
    np.testing.assert_allclose(weights, 0.2, rtol=1e-6)
    expected = jnp.ones(4) @ params["v_proj"]["kernel"] @ params["out_proj"]["kernel"]
    np.testing.assert_allclose(out, jnp.broadcast_to(expected, out.shape), rtol=1e-5, atol=1e-6)
