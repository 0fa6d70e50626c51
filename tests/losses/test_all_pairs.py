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
from mmjax.parallel import make_mesh
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


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 127])
@pytest.mark.parametrize("scale", TOLERANCE)
def test_values_of_the_sigmoid_are_within_a_millionth(scale, count, grouped):
    groups = np.random.default_rng(0).integers(0, (count + 2) // 3, count) if grouped else None
    for seed in range(12):
        image, text = embeddings(count, 24, (0.3, 1.0, 3.0)[seed % 3], seed)
        value = float(sigmoid(image, text, scale, -10.0, groups=groups))
        with jax.enable_x64(True):
            wide = (x.astype(np.float64) for x in (image, text))
            expected = float(dense_sigmoid(*wide, scale, -10.0, groups))
        assert abs(value - expected) <= value_bound(expected), (seed, expected)


def test_groups_of_64_bits_are_told_apart():
    image, text = embeddings(24)
    groups = np.arange(24, dtype=np.int64) << 32
    assert float(infonce(image, text, 14.0, groups=groups)) == float(
        infonce(image, text, 14.0, groups=np.arange(24))
    )
    assert float(infonce(image, text, 14.0, groups=[0] * 24)) == float(
        infonce(image, text, 14.0, groups=np.zeros(24, np.int8))
    )


def explicit():
    return jax.make_mesh((4, 2), ("data", "model"))


def mixed():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))


@pytest.mark.parametrize("make", [explicit, mixed])
@pytest.mark.parametrize("spec", [(), ("data",), ("data", "model"), (("model", "data"),), None])
@pytest.mark.parametrize("axis", ["data", ("data", "model")])
def test_rows_may_lie_anywhere_on_an_explicit_mesh(make, spec, axis):
    """And their gradients come back as they lay; groups are the host's."""
    mesh, groups = make(), np.arange(48) // 3
    sides, scale = embeddings(48), np.float32(14)
    expected, grads = reference(dense_infonce, *sides, scale, groups=groups)
    if spec is not None:
        if make is mixed:
            spec = tuple(name if name == "data" else None for name in spec)
        sides = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for x in sides]
    with jax.set_mesh(mesh):

        def loss(image, text):
            return infonce(image, text, scale, groups=groups, mesh=mesh, axis=axis, block_size=4)

        for way in (jax.jit, lambda f: f):
            value, found = way(jax.value_and_grad(loss, (0, 1)))(*sides)
            assert abs(float(value) - expected) <= value_bound(expected)
            for ours, theirs, side in zip(found, grads, sides, strict=False):
                assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE[14.0] * np.abs(theirs).max()
                # Over Auto axes gradients lie as the compiler likes.
                if spec is not None and make is explicit:
                    assert ours.sharding.is_equivalent_to(side.sharding, 2)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_plain_call_on_a_mesh_with_other_axes(grouped):
    mesh = make_mesh({"data": 4, "fsdp": 2})
    groups = np.arange(48) // 3 if grouped else None
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    sides = [jax.device_put(x, split) for x in embeddings(48)]
    options = {"groups": groups, "mesh": mesh, "axis": ("data", "fsdp")}
    for loss, rest in ((infonce, (14.0,)), (sigmoid, (14.0, -10.0))):
        plain = jax.value_and_grad(functools.partial(loss, **options), (0, 1))(*sides, *rest)
        compiled = jax.jit(jax.value_and_grad(functools.partial(loss, **options), (0, 1)))(*sides, *rest)
        for ours, theirs in zip(jax.tree.leaves(plain), jax.tree.leaves(compiled), strict=True):
            np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("checked", [False, True])
def test_a_device_may_have_a_loss_of_its_own(checked):
    """Inside a shard_map, of the rows that it has; the scale is one for all."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    image, text = embeddings(48)
    options = {"in_specs": (PartitionSpec("data"),) * 2 + (PartitionSpec(),), "mesh": mesh}
    for loss, rest in ((infonce, ()), (sigmoid, (-10.0,))):

        def each(image, text, scale, loss=loss, rest=rest):
            return loss(image, text, scale, *rest, block_size=4)[None]

        def total(*args, each=each):
            split = jax.shard_map(each, out_specs=PartitionSpec("data"), check_vma=checked, **options)
            return split(*args).sum()

        def parts(image, text, scale, each=each):
            return sum(each(image[n : n + 6], text[n : n + 6], scale).sum() for n in range(0, 48, 6))

        arguments = (image, text, np.float32(14))
        for way in (total, parts):
            value, grads = jax.jit(jax.value_and_grad(way, (0, 1, 2)))(*arguments)
            if way is total:
                first = (value, grads)
        for ours, theirs in zip(jax.tree.leaves(first), jax.tree.leaves((value, grads)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_a_ring_inside_of_a_shard_map_over_another_axis():
    mesh, (image, text) = explicit(), embeddings(48)

    def each(image, text):
        return infonce(image, text, 14.0, mesh=mesh, block_size=4)[None]

    options = {"mesh": mesh, "axis_names": {"model"}, "in_specs": PartitionSpec()}
    with jax.set_mesh(mesh):
        found = jax.jit(jax.shard_map(each, out_specs=PartitionSpec("model"), check_vma=False, **options))(
            image, text
        )
    np.testing.assert_allclose(np.asarray(found), float(infonce(image, text, 14.0)), rtol=1e-6)


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
    for arguments, options, words in (
        ((image, text, 1.0), {"groups": np.arange(5)}, "groups: expected one for each of the 12 rows"),
        ((image, text, 1.0), {"groups": np.arange(12)[:, None]}, r"got shape \(12, 1\)"),
        ((image, text, 1.0), {"groups": np.full(12, np.nan)}, "groups: expected integers, got float"),
        ((image, text, np.arange(12.0)), {}, "logit_scale: expected one number"),
        ((image[:0], text[:0], 1.0), {}, "image_embeds: no rows"),
        ((image, text.astype(int), 1.0), {}, "text_embeds: expected floating-point numbers"),
        ((image, text, 1.0), {"mesh": 8}, "mesh: expected a jax.sharding.Mesh, got int"),
        ((image, text, 1.0), {"mesh": mesh, "axis": None}, "axis: expected a mesh axis"),
        ((image, text, 1.0), {"mesh": mesh, "axis": ("data", "data")}, "axis: expected a mesh axis"),
    ):
        with pytest.raises(ConfigError, match=words):
            infonce(*arguments, **options)
    split = NamedSharding(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), PartitionSpec("data"))
    with pytest.raises(ConfigError, match="image_embeds: sharded as .*; give mesh and axis"):
        infonce(*(jax.device_put(x, split) for x in (image, text)), 1.0)
