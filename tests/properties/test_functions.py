"""What holds of every public array function: see the names of the tests."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import mmjax.generation
import mmjax.losses
import mmjax.nn
from mmjax.language.text_encoder import pool_eos
from mmjax.models.llava.model import merge_features

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def unit(*shape: int) -> np.ndarray:
    x = normal(*shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


MASK = np.tril(np.ones((5, 5), bool))[None, None]
KEY = np.asarray(jax.random.key_data(jax.random.key(7)))


def dropped(x, key):
    return mmjax.nn.dropout(x, 0.3, jax.random.wrap_key_data(key))


def attend(q, k, v, mask):
    return mmjax.nn.attention(q, k, v, mask, softcap=2.0)


ROPE = mmjax.nn.RopeConfig(head_dim=6, sections=(1, 2))


def claim(mask):
    cache, positions = mmjax.nn.claim_slots(mmjax.nn.init_cache(1, 2, 1, 5, 2), mask)
    return cache.mask, cache.positions, positions


def mix(x, weights, gate, up, down, chosen):
    return mmjax.nn.mix_experts(x, weights, chosen, gate, up, down, act="silu")


# name: (function, arguments, how many leading arguments are differentiable)
CASES = {
    "gelu_erf": (mmjax.nn.gelu_erf, (normal(3, 4),), 1),
    "gelu_tanh": (mmjax.nn.gelu_tanh, (normal(3, 4),), 1),
    "quick_gelu": (mmjax.nn.quick_gelu, (normal(3, 4),), 1),
    "dense": (mmjax.nn.dense, (normal(2, 3, 4), normal(4, 5), normal(5)), 3),
    "layer_norm": (
        lambda x, s, b: mmjax.nn.layer_norm(x, s, b, eps=1e-5),
        (normal(2, 3, 6), normal(6), normal(6)),
        3,
    ),
    "rms_norm": (
        lambda x, s: mmjax.nn.rms_norm(x, s, eps=1e-5, offset=1.0),
        (normal(2, 3, 6), normal(6)),
        2,
    ),
    "softcap": (lambda x: mmjax.nn.softcap(x, 1.5), (normal(3, 4),), 1),
    "apply_rope": (mmjax.nn.apply_rope, (normal(2, 3, 4, 6), normal(2, 4, 3), normal(2, 4, 3)), 3),
    "rope_angles": (
        lambda inv_freq, positions: mmjax.nn.rope_angles(positions, inv_freq, ROPE.axis_of_frequency),
        (normal(3), np.arange(16).reshape(2, 2, 4)),
        1,
    ),
    "claim_slots": (claim, (np.array([[True, False, True], [False, True, True]]),), 0),
    "write_slots": (
        lambda slots, new: mmjax.nn.write_slots(slots, new, jnp.int32(1)),
        (normal(2, 3, 5, 4), normal(2, 3, 2, 4)),
        2,
    ),
    "route": (lambda x: mmjax.nn.route(x, 2, normalize=True)[0], (normal(3, 4),), 1),
    "mix_experts": (
        mix,
        (
            *(normal(2, 3), normal(2, 2), normal(4, 3, 5), normal(4, 3, 5), normal(4, 5, 3)),
            np.array([[0, 2], [3, 0]]),
        ),
        5,
    ),
    "dropout": (dropped, (normal(4, 5), KEY), 1),
    "l2_normalize": (mmjax.nn.l2_normalize, (normal(3, 4),), 1),
    "split_heads": (lambda x: mmjax.nn.split_heads(x, 2), (normal(2, 3, 8),), 1),
    "merge_heads": (mmjax.nn.merge_heads, (normal(2, 3, 4, 5),), 1),
    "attention": (attend, (normal(2, 4, 5, 3), normal(2, 2, 5, 3), normal(2, 2, 5, 3), MASK), 3),
    "causal_mask": (lambda x: mmjax.nn.causal_mask(x.shape[0]), (normal(4),), 0),
    "padding_mask": (mmjax.nn.padding_mask, (np.array([[1, 1, 0], [1, 0, 0]]),), 0),
    "combine_masks": (mmjax.nn.combine_masks, (MASK, MASK[..., ::-1]), 0),
    "patchify": (lambda x: mmjax.nn.patchify(x, (2, 3)), (normal(2, 5, 7, 3),), 1),
    "unpatchify": (lambda x: mmjax.nn.unpatchify(x, (2, 2), (2, 3)), (normal(2, 4, 18),), 1),
    "interpolate_positions": (
        lambda x: mmjax.nn.interpolate_positions(x, (3, 4), (5, 2)),
        (normal(12, 6),),
        1,
    ),
    "pool_eos": (
        lambda x, i: pool_eos(x, i, 9),
        (normal(2, 4, 3), np.array([[1, 9, 2, 9], [3, 4, 5, 9]])),
        1,
    ),
    "merge_features": (
        lambda x, table, weights, index: merge_features(x, table, index, weights),
        (
            *(normal(2, 3, 4), normal(5, 4), normal(2, 3, 2)),
            np.array([[[0, 4], [-1, -1], [2, -1]], [[1, 1], [3, -1], [-1, -1]]]),
        ),
        3,
    ),
    "infonce": (mmjax.losses.infonce, (unit(5, 8), unit(5, 8), np.float64(14.0)), 3),
    "sigmoid": (mmjax.losses.sigmoid, (unit(5, 8), unit(5, 8), np.float64(10.0), np.float64(-9.0)), 4),
    "cross_entropy": (
        lambda x, y: mmjax.losses.cross_entropy(x, y, label_smoothing=0.1),
        (normal(4, 6), np.array([0, 5, 2, 2])),
        1,
    ),
    "masked_l1": (
        mmjax.losses.masked_l1,
        (normal(2, 4, 4, 3), normal(2, 4, 4, 3), np.array([[1, 0, 0, 1], [0, 0, 1, 0]])),
        2,
    ),
    "next_token": (
        lambda h, k, y: mmjax.losses.next_token(h, k, y, sequence_block=3, vocabulary_block=4, softcap=5.0),
        (normal(2, 4, 3), normal(3, 7), np.array([[0, 6, -100, 2], [3, 3, 1, 5]])),
        2,
    ),
    "token_losses": (
        lambda h, k, b, y: mmjax.losses.token_losses(h, k, y, bias=b, vocabulary_block=4),
        (normal(2, 3, 3), normal(3, 7), normal(7), np.array([[0, 6, -100], [3, 3, 1]])),
        3,
    ),
    "penalize_repetition": (
        lambda x, seen: mmjax.generation.penalize_repetition(x, seen, 1.5),
        (normal(2, 5), np.array([[1, 0, 1, 0, 0], [0, 0, 1, 1, 1]], bool)),
        1,
    ),
    "keep_top_k": (lambda x: jnp.isfinite(mmjax.generation.keep_top_k(x, 3)), (normal(2, 5),), 0),
    "keep_top_p": (lambda x: jnp.isfinite(mmjax.generation.keep_top_p(x, 0.7)), (normal(2, 5),), 0),
    "keep_min_p": (lambda x: jnp.isfinite(mmjax.generation.keep_min_p(x, 0.2)), (normal(2, 5),), 0),
}


def test_every_public_array_function_is_here():
    """Adding a function to the rooms means adding it to the table above."""
    public = {
        name
        for room in (mmjax.nn, mmjax.losses, mmjax.generation)
        for name in room.__all__
        if inspect.isfunction(getattr(room, name))
    }
    # These take configs, models or trees: tests/nn, tests/models and tests/generation have them.
    not_of_arrays = {
        "activation",
        "canonical_dtype",
        "param",
        "parameter_specs",
        "init_cache",
        "rope_frequencies",
        "rope_tables",
        "run_layers",
        "transpose_kernels",
        *("generate", "score", "stream", "stream_text"),
    }
    assert public - not_of_arrays <= set(CASES)


@pytest.fixture(params=CASES)
def case(request):
    with jax.enable_x64(True):
        function, arguments, differentiable = CASES[request.param]
        yield function, tuple(jnp.asarray(a) for a in arguments), differentiable


def assert_trees_close(a, b, tolerance=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


def test_same_bits_twice_and_inputs_untouched(case):
    function, arguments, _ = case
    copies = [np.array(a) for a in arguments]
    numpy_arguments = [np.array(a) for a in arguments]
    first, second = function(*arguments), function(*arguments)
    function(*[jnp.asarray(a) for a in numpy_arguments])
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)
    for argument, before, copy in zip(arguments, numpy_arguments, copies, strict=True):
        np.testing.assert_array_equal(argument, copy)
        np.testing.assert_array_equal(before, copy)


def test_jit_equals_eager(case):
    function, arguments, _ = case
    assert_trees_close(jax.jit(function)(*arguments), function(*arguments))


def test_vmap_equals_a_loop(case):
    function, arguments, _ = case
    stacked = [jnp.stack([a, jnp.flip(a, 0) if a.ndim and a.shape[0] > 1 else a]) for a in arguments]
    looped = [function(*(a[i] for a in stacked)) for i in range(2)]
    together = jax.vmap(function)(*stacked)
    assert_trees_close(together, jax.tree.map(lambda *x: jnp.stack(x), *looped))


def test_remat_equals_plain(case):
    function, arguments, count = case
    if not count:
        assert_trees_close(jax.checkpoint(function)(*arguments), function(*arguments))
        return

    def total(f):
        return lambda *args: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(f(*args)))

    which = tuple(range(count))
    plain = jax.grad(total(function), argnums=which)(*arguments)
    assert_trees_close(jax.grad(total(jax.checkpoint(function)), argnums=which)(*arguments), plain)


def test_gradients_equal_finite_differences(case):
    function, arguments, count = case
    if not count:
        assert all(not jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(function(*arguments)))
        return
    moving, fixed = arguments[:count], arguments[count:]
    jax.test_util.check_grads(
        lambda *x: function(*x, *fixed), moving, order=1, modes=("rev",), rtol=1e-5, atol=1e-6
    )
