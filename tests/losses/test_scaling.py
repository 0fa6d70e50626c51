"""Memory that grows with the batch and not with its square, and every way to call a loss over a mesh."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmjax.losses import infonce, sigmoid
from tests.losses.dense import dense_infonce, dense_sigmoid, embeddings, reference

LOSSES = {"infonce": (infonce, dense_infonce, 3), "sigmoid": (sigmoid, dense_sigmoid, 4)}
WIDTH = 512


def compile_for(loss, count, arguments, sharding=None, **options):
    side = jax.ShapeDtypeStruct((count, WIDTH), jnp.float32, sharding=sharding)
    inputs = (side, side, *(jax.ShapeDtypeStruct((), jnp.float32),) * (arguments - 2))
    run = jax.jit(jax.value_and_grad(lambda *a: loss(*a, **options), tuple(range(arguments))))
    return run.lower(*inputs).compile()


def temporary_bytes(*arguments):
    return compile_for(*arguments).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_linear(name):
    loss, dense, number = LOSSES[name]
    # The gradients of both sides while they are summed, and less than a third of that besides.
    sizes = [temporary_bytes(loss, count, number) for count in (8192, 16384, 131072)]
    assert sizes[0] <= 1.5 * 8192 * WIDTH * 4
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[2] <= 8.4 * sizes[1]
    if name == "infonce":
        assert sizes[0] <= temporary_bytes(dense_infonce, 8192, 3) / 30


@pytest.mark.parametrize("name", LOSSES)
def test_no_device_holds_a_whole_side(name):
    loss, _, number = LOSSES[name]
    count, devices = 8192, 8
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    program = compile_for(loss, count, number, split, mesh=mesh).as_text()
    sizes = {
        math.prod(int(n) for n in shape.split(","))
        for shape in re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", program)
    }
    # One device's rows of one side are the largest array of its program.
    assert max(sizes) == count // devices * WIDTH
    assert "all-gather" not in program
    assert "collective-permute" in program


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", LOSSES)
def test_called_plainly_jitted_and_inside_a_larger_step(name, kind):
    loss, dense, number = LOSSES[name]
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(kind,) * 2)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    image, text = (jax.device_put(x, split) for x in embeddings(16))
    rest = (14.0, -10.0)[: number - 2]

    def over_mesh(image, text):
        return loss(image, text, *rest, mesh=mesh, axis=("data", "fsdp"), block_size=3)

    def step(kernel, image, text):
        moved = image @ kernel
        moved = moved / jnp.sqrt(jnp.square(moved).sum(axis=1, keepdims=True))
        return over_mesh(moved, text)

    value, (to_image, _) = reference(lambda i, t, _: dense(i, t, *rest), np.asarray(image), np.asarray(text))
    kernel = jax.device_put(jnp.eye(16), NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_allclose(over_mesh(image, text), value, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(over_mesh)(image, text), value, rtol=1e-6)
    whole, gradient = jax.jit(jax.value_and_grad(step))(kernel, image, text)
    np.testing.assert_allclose(whole, value, rtol=2e-6)
    assert np.abs(np.asarray(gradient)).max() > 0
    with jax.set_mesh(
        mesh
    ):  # jax.grad outside jit asks for it where axes are Explicit, whatever the function
        plain = jax.grad(over_mesh)(image, text)
    assert np.abs(np.asarray(plain) - to_image).max() <= 2e-6 * np.abs(to_image).max()
    assert plain.sharding.is_equivalent_to(split, 2)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_embeddings_are_summed_in_float32(name):
    loss, dense, number = LOSSES[name]
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in embeddings(48)]
    rest = tuple(np.float32(x) for x in (14.0, -10.0)[: number - 2])
    value, grads = jax.value_and_grad(loss, (0, 1, 2))(*narrow, *rest, block_size=7)
    wide = [np.asarray(x, np.float32) for x in narrow]
    expected, expected_grads = reference(dense, *wide, *rest)
    # The inputs are exact in float64 too: what is left is the rounding of each result to its own dtype.
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=False):
        bound = 2**-8 if ours.dtype == jnp.bfloat16 else 2e-3
        assert np.abs(np.asarray(ours, np.float64) - theirs).max() <= bound * np.abs(theirs).max()
