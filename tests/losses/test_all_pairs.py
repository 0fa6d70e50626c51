"""The contrastive losses against dense float64: blocks, rings, groups, hard cases, and what is never held."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmjax.errors import ConfigError
from mmjax.losses import infonce, sigmoid
from mmjax.losses.pairs import FINE_PAIRS
from tests.losses.dense import (
    TOLERANCE,
    dense_infonce,
    dense_sigmoid,
    embeddings,
    reference,
    value_bound,
)


def check(loss, dense, arguments, tolerance, *, groups=None, **options):
    def f(*args):
        return loss(*args, groups=groups, **options)

    run = jax.jit(jax.value_and_grad(f, tuple(range(len(arguments)))))
    value, grads = run(*arguments)
    expected, expected_grads = reference(dense, *arguments, groups=groups)
    assert abs(float(value) - expected) <= value_bound(expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("scale", TOLERANCE)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("block_size", [7, 16, 1000])
def test_blocks_equal_dense(block_size, grouped, scale):
    image, text = embeddings(48)
    groups = np.random.default_rng(0).integers(0, 15, 48) if grouped else None
    arguments = (image, text, np.float32(scale))
    check(infonce, dense_infonce, arguments, TOLERANCE[scale], groups=groups, block_size=block_size)
    arguments = (*arguments, np.float32(-10))
    check(sigmoid, dense_sigmoid, arguments, TOLERANCE[scale], groups=groups, block_size=block_size)


@pytest.mark.parametrize("scale", TOLERANCE)
def test_rematerialised_equals_dense(scale):
    image, text = embeddings(48)
    for loss, dense, rest in ((infonce, dense_infonce, ()), (sigmoid, dense_sigmoid, (np.float32(-10),))):

        def again(*args, groups, loss=loss):
            return jax.checkpoint(lambda *a: loss(*a, groups=groups, block_size=16))(*args)

        check(again, dense, (image, text, np.float32(scale), *rest), TOLERANCE[scale])


MESHES = {
    "auto": lambda: jax.make_mesh((8, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2),
    "auto two axes": lambda: jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2),
    "explicit": lambda: jax.make_mesh((2, 4), ("data", "fsdp")),
}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_ring_equals_dense_and_gradients_stay_sharded(name, grouped):
    mesh, axis = MESHES[name](), ("data", "fsdp")
    split = NamedSharding(mesh, PartitionSpec(axis))
    image, text = (jax.device_put(x, split) for x in embeddings(48))
    groups = jax.device_put(np.arange(48) // 3, split) if grouped else None
    options = {"mesh": mesh, "axis": axis, "block_size": 4}
    with jax.set_mesh(mesh):
        for loss, dense, rest in (
            (infonce, dense_infonce, (np.float32(14),)),
            (sigmoid, dense_sigmoid, (np.float32(14), np.float32(-10))),
        ):
            run = jax.jit(
                jax.value_and_grad(lambda *a, loss=loss: loss(*a, groups=groups, **options), (0, 1, 2))
            )
            value, grads = run(image, text, *rest)
            plain = None if groups is None else np.asarray(groups)
            expected, expected_grads = reference(
                dense, np.asarray(image), np.asarray(text), *rest, groups=plain
            )
            assert abs(float(value) - expected) <= value_bound(expected)
            for ours, theirs in zip(grads, expected_grads, strict=False):
                assert np.abs(np.asarray(ours) - theirs).max() <= 2e-6 * np.abs(theirs).max()
            assert grads[0].sharding.is_equivalent_to(split, 2)
            text_of_program = run.lower(image, text, *rest).compile().as_text()
            assert "collective-permute" in text_of_program
            assert "all-gather" not in text_of_program


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (np.eye(12, dtype=np.float32), np.eye(12, dtype=np.float32)),
        (np.full((12, 4), 0.5, np.float32), np.full((12, 4), 0.5, np.float32)),
        (np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)),
        (np.eye(12, dtype=np.float32), -np.eye(12, dtype=np.float32)),
    ],
    ids=["orthogonal", "all equal", "one row", "opposite"],
)
def test_hard_cases_at_scale_100(image, text):
    value, grads = jax.value_and_grad(infonce, (0, 1, 2))(image, text, 100.0, block_size=5)
    expected, expected_grads = reference(dense_infonce, image, text, np.float32(100))
    assert abs(float(value) - expected) <= value_bound(expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert np.isfinite(np.asarray(ours)).all()
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def drawn(kind, count, seed):
    rng = np.random.default_rng(seed)
    image, text = embeddings(count, 64, closeness=seed / 2, seed=seed)
    if kind == "equal":
        image, text = (np.repeat(x[:1], count, 0) for x in (image, text))
    elif kind == "orthogonal":
        image = text = np.linalg.qr(rng.standard_normal((64, 64)))[0][:count].astype(np.float32)
    elif kind == "few":
        image, text = (image[rng.integers(0, min(4, count), count)] for _ in range(2))
    return image, text


def value_of(path, groups):
    """A compiled loss: one device, or the ring of eight."""
    options = {"block_size": 48}
    if path == "ring":
        options |= {"mesh": jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), "block_size": 3}
    return jax.jit(functools.partial(infonce, groups=groups, **options))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("path", "count"),
    [("blocks", 1), ("blocks", 2), ("blocks", 40), ("ring", 40), ("blocks", 129), ("blocks", FINE_PAIRS + 9)],
)
def test_values_are_within_a_millionth(path, count, grouped):
    groups = np.random.default_rng(0).integers(0, (count + 2) // 3, count) if grouped else None
    run = value_of(path, groups)
    for seed in range(1 if count > FINE_PAIRS else 4):
        for kind in ("random", "orthogonal", "equal", "few"):
            if kind == "orthogonal" and count > 64:
                continue
            image, text = drawn(kind, count, seed)
            for scale in TOLERANCE:
                value = float(run(image, text, np.float32(scale)))
                with jax.enable_x64(True):
                    wide = (x.astype(np.float64) for x in (image, text))
                    expected = float(dense_infonce(*wide, scale, groups))
                # Of more pairs dot products are float32's own; equal embeddings share one rounding.
                bound = value_bound(expected) if count <= FINE_PAIRS else 1e-6 * max(1.0, expected)
                assert abs(value - expected) <= bound, (kind, seed, scale, expected)


def test_second_derivatives_are_refused():
    image, text = embeddings(8)
    for loss, rest in ((infonce, ()), (sigmoid, (-10.0,))):
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            jax.grad(lambda s, loss=loss, rest=rest: jax.grad(loss, 2)(image, text, s, *rest))(1.0)


def test_bad_arguments():
    image, text = embeddings(12)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ConfigError, match="block_size"):
        infonce(image, text, 1.0, block_size=0)
    with pytest.raises(ConfigError, match="12 rows cannot be split evenly over the 8 devices"):
        infonce(image, text, 1.0, mesh=mesh)
    with pytest.raises(ConfigError, match="the mesh has no axis 'model'"):
        sigmoid(image, text, 1.0, 0.0, mesh=mesh, axis="model")
    with pytest.raises(AssertionError):
        infonce(image, text[:5], 1.0)
