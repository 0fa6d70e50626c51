"""Int8 kernels: their definition, the bound of the error, the product and its gradient, the memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import ConfigError
from mmjax.nn import dense
from mmjax.nn.quantized import Int8Kernel, dequantize, quantize, quantize_kernel

RNG = np.random.default_rng(0)


def kernel(dtype: str = "float32") -> jax.Array:
    columns = np.array([1e-6, 0.0, 1.0, 3.0, 1e4])
    return jnp.asarray(RNG.standard_normal((40, 5)) * columns, dtype)


def test_definition_and_bound():
    wide = np.asarray(kernel(), np.float64)
    stored = quantize_kernel(jnp.asarray(wide, jnp.float32))
    scale = np.abs(wide).max(axis=0) / 127
    scale[1] = 1
    np.testing.assert_allclose(stored.scale, scale, rtol=1e-6)
    np.testing.assert_allclose(stored.values, np.round(wide / scale), atol=1)
    assert stored.values.dtype == jnp.int8 and np.abs(np.asarray(stored.values)).max() == 127
    error = np.abs(np.asarray(stored.array(), np.float64) - wide)
    assert (error <= np.asarray(stored.scale, np.float64) / 2 * (1 + 1e-5)).all()
    assert error.max(axis=0)[3] > scale[3] / 4
    # What is on the grid already comes back as it is.
    grid = quantize_kernel(stored.array())
    np.testing.assert_array_equal(grid.values, stored.values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_is_that_of_the_array(dtype):
    stored, x = quantize_kernel(kernel(dtype)), jnp.asarray(RNG.standard_normal((3, 7, 40)), dtype)
    bias = jnp.asarray(RNG.standard_normal(5), dtype)
    assert stored.dtype == jnp.dtype(dtype) and stored.shape == (40, 5)
    wide = np.asarray(stored.values, np.float64) * np.asarray(stored.scale, np.float64)
    expected = np.asarray(x, np.float64) @ wide
    y = dense(x, stored, keep_sums=True)
    assert y.dtype == jnp.float32
    largest = np.abs(expected).max(axis=(0, 1))
    assert (np.abs(np.asarray(y) - expected) <= 1e-5 * largest).all()
    assert dense(x, stored, bias).dtype == jnp.dtype(dtype)

    def total(x):
        return (dense(x, stored, keep_sums=True) * expected).sum()

    gradient = jax.jit(jax.grad(total))(x)
    assert gradient.dtype == jnp.dtype(dtype)
    close = np.abs(np.asarray(gradient, np.float64) - expected @ wide.T).max()
    assert close <= (1e-5 if dtype == "float32" else 1e-2) * np.abs(expected @ wide.T).max()


def test_trees():
    tree = {
        "embed": {"embedding": kernel()},
        "layers_0": {
            "mlp": {"up": {"kernel": kernel(), "bias": jnp.ones(5)}},
            "norm": {"scale": jnp.ones(4)},
        },
        "lm_head": {"kernel": kernel()},
    }
    stored = quantize(tree)
    assert isinstance(stored["layers_0"]["mlp"]["up"]["kernel"], Int8Kernel)
    assert stored["lm_head"]["kernel"] is tree["lm_head"]["kernel"]
    wide = dequantize(stored)
    assert jax.tree.structure(wide) == jax.tree.structure(tree)
    np.testing.assert_array_equal(
        wide["layers_0"]["mlp"]["up"]["kernel"], stored["layers_0"]["mlp"]["up"]["kernel"].array()
    )
    with pytest.raises(ConfigError, match="no parameter matches 'nothing'; one is 'embed/embedding'"):
        quantize(tree, "nothing")
    with pytest.raises(ConfigError, match="layers_0/mlp/up/bias is no kernel"):
        quantize(tree, ".*bias")
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda t: dense(jnp.ones((1, 40)), t).sum())(stored["layers_0"]["mlp"]["up"]["kernel"])


def test_memory():
    """A quarter of float32 at rest, and over a scanned stack the wide copy of one kernel at a time."""
    depth, width = 12, 512
    kernels = [jnp.asarray(RNG.standard_normal((width, width)), jnp.float32) for _ in range(depth)]
    stored = [quantize_kernel(k) for k in kernels]
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (stored, kernels)]
    assert sizes[0] < 0.26 * sizes[1] and stored[0].nbytes == width * width + 4 * width

    def loss(x, stack):
        return jax.lax.scan(lambda x, each: (jnp.tanh(dense(x, each)), None), x, stack)[0].sum()

    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stored)
    program = jax.jit(jax.grad(loss)).lower(jnp.ones((2, width)), stack).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4 * width * width
