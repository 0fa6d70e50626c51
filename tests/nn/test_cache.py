"""The key/value cache: what is where, one cursor for all rows, and writing in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import ConfigError
from mmjax.nn import claim_slots, init_cache, write_slots


def test_an_empty_cache():
    cache = init_cache(3, 2, 4, 7, 5, jnp.bfloat16)
    assert (cache.length, cache.batch_size) == (7, 2)
    assert [x.shape for x in (*cache.keys, *cache.values)] == [(2, 4, 7, 5)] * 6
    assert {x.dtype for x in (*cache.keys, *cache.values)} == {jnp.dtype("bfloat16")}
    assert not cache.mask.any() and int(cache.cursor) == 0
    assert len(jax.tree.leaves(cache)) == 9


def test_padding_on_either_side_counts_for_nothing():
    cache = init_cache(1, 3, 1, 8, 2)
    first = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]], bool)
    cache, positions = claim_slots(cache, jnp.asarray(first))
    assert positions.tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1], [0, 1, 2, 2]]
    cache = cache.replace(cursor=cache.cursor + 4)
    cache, positions = claim_slots(cache, jnp.ones((3, 2), bool))
    assert positions.tolist() == [[4, 5], [2, 3], [3, 4]]
    expected = np.concatenate([first, np.ones((3, 2), bool), np.zeros((3, 2), bool)], axis=1)
    np.testing.assert_array_equal(cache.mask, expected)
    assert cache.positions[2].tolist() == [0, 1, 2, 2, 3, 4, 0, 0]


@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (2, 6)])
def test_new_entries_lie_at_the_cursor_in_the_slots_dtype(shape):
    slots = jnp.zeros(shape, jnp.bfloat16)
    new = jnp.ones([*shape[:-2], 2, 4] if len(shape) == 4 else [2, 2], jnp.float32)
    written = write_slots(slots, new, jnp.int32(3))
    assert written.dtype == jnp.bfloat16
    along = np.asarray(written, np.float32).swapaxes(0, len(shape) // 2).reshape(6, -1)
    assert along.min(axis=1).tolist() == along.max(axis=1).tolist() == [0, 0, 0, 1, 1, 0]


def test_a_donated_cache_is_written_in_place():
    cache = init_cache(1, 2, 3, 64, 8)
    where = cache.keys[0].unsafe_buffer_pointer()

    def step(slots, new, cursor):
        return write_slots(slots, new, cursor)

    new = jnp.ones((2, 3, 1, 8))
    written = jax.jit(step, donate_argnums=0)(cache.keys[0], new, cache.cursor)
    assert written.unsafe_buffer_pointer() == where
    assert float(written.sum()) == 48


def test_more_tokens_than_slots_are_refused():
    cache = init_cache(1, 2, 1, 4, 2)
    with pytest.raises(ConfigError, match="cache: 5 tokens do not fit into 4 slots"):
        claim_slots(cache, jnp.ones((2, 5), bool))
