"""Text towers: which token is pooled, and what each token may see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import ConfigError
from mmjax.language import TextConfig, TextTransformer
from mmjax.language.text_encoder import pool_eos

SIZES = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)


@pytest.mark.parametrize(
    ("ids", "eos", "position"),
    [
        ([5, 6, 9, 0, 0], 9, 2),
        ([5, 9, 6, 9, 9], 9, 1),  # The first of several.
        ([9, 5, 6, 7, 8], 9, 0),
        ([5, 6, 7, 8, 9], 9, 4),
        ([5, 11, 9, 12, 0], 9, 2),  # Larger ids are nothing special.
        ([5, 6, 7, 8, 3], 9, 0),  # None at all: as in transformers.
        ([5, 6, 9, 0, 0], 2, 2),  # The id 2 stands for the largest of the row,
        ([5, 9, 6, 9, 9], 2, 1),  # the first of them,
        ([5, 2, 9, 2, 2], 2, 2),  # even where the id itself occurs.
    ],
)
def test_both_rules_of_end_of_text(ids, eos, position):
    x = jnp.arange(5.0)[None, :, None] * jnp.ones((1, 1, 3))
    np.testing.assert_array_equal(pool_eos(x, jnp.array([ids]), eos)[0], [position] * 3)


def test_rows_are_pooled_each_at_its_own_place():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    out = pool_eos(x, jnp.array([[7, 9, 0, 0], [7, 7, 7, 9]]), 9)
    np.testing.assert_array_equal(out, [x[0, 1], x[1, 3]])


def tower(**options):
    config = TextConfig(vocab_size=20, max_position_embeddings=6, eos_token_id=19, **SIZES, **options)
    model = TextTransformer(config)
    ids = jnp.array([[3, 4, 19, 0, 0, 0], [5, 6, 7, 8, 19, 0]])
    variables = jax.jit(model.init)(jax.random.key(1), ids)
    noisy = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), variables)
    run = jax.jit(model.apply, static_argnames="output_attentions")
    return lambda *args, **kwargs: run(noisy, *args, **kwargs), ids


def test_a_causal_tower_does_not_look_ahead():
    run, ids = tower(causal=True, pooling="eos")
    before = run(ids)
    after = run(ids.at[:, 3:].set(11))
    np.testing.assert_array_equal(before.last_hidden_state[:, :3], after.last_hidden_state[:, :3])
    assert not np.allclose(before.last_hidden_state[:, 3:], after.last_hidden_state[:, 3:])
    np.testing.assert_array_equal(before.pooler_output[0], before.last_hidden_state[0, 2])
    np.testing.assert_array_equal(before.pooler_output[1], before.last_hidden_state[1, 4])
    weights = run(ids, output_attentions=True).attentions
    assert len(weights) == 2
    for layer in weights:
        assert (np.triu(np.ones((6, 6)), 1) * np.asarray(layer) == 0).all()


def test_a_bidirectional_tower_looks_everywhere_and_pools_the_last():
    run, ids = tower(causal=False, pooling="last", projection_size=5)
    out, other = run(ids), run(ids.at[:, -1].set(11))
    assert not np.allclose(out.last_hidden_state[:, 0], other.last_hidden_state[:, 0])
    assert out.pooler_output.shape == (2, 5)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_not_seen(causal):
    run, ids = tower(causal=causal, pooling="eos")
    mask = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    out = run(ids, mask)
    other = run(jnp.where(mask == 0, 13, ids), mask)
    real = np.asarray(mask, bool)
    np.testing.assert_array_equal(out.last_hidden_state[real], other.last_hidden_state[real])
    whole = run(ids, jnp.ones_like(ids))
    np.testing.assert_array_equal(whole.last_hidden_state, run(ids).last_hidden_state)


def test_positions_are_an_argument():
    run, ids = tower()
    counted = jnp.broadcast_to(jnp.arange(6), ids.shape)
    np.testing.assert_array_equal(run(ids, None, counted).last_hidden_state, run(ids).last_hidden_state)
    turned = run(ids, None, counted[:, ::-1]).last_hidden_state
    assert not np.allclose(turned, run(ids).last_hidden_state)


def test_short_and_long_texts():
    run, ids = tower(causal=True, pooling="eos")
    np.testing.assert_allclose(
        run(ids[:, :3]).last_hidden_state, run(ids).last_hidden_state[:, :3], rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ConfigError, match="input_ids: 7 tokens, but the model has 6 positions; truncate"):
        run(jnp.zeros((1, 7), int))
    with pytest.raises(AssertionError):
        run(jnp.zeros(6, int))


def test_an_id_outside_the_vocabulary_gives_nan_in_its_row_alone():
    run, ids = tower()
    out = np.asarray(run(ids.at[0, 1].set(20)).last_hidden_state)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
