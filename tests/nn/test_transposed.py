"""Transposed kernels: the same numbers, however many rows, under every transformation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.errors import ConfigError
from mmjax.models import CausalLM
from mmjax.nn import Execution, TransposedKernel, dense, transpose_kernels, transposed
from mmjax.nn.quantized import dequantize
from mmjax.parallel import make_mesh
from tests.tiny import DECODERS, random_batch, random_params

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65])
@pytest.mark.parametrize(("dtype", "tiles"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_the_product_is_that_of_the_array(dtype, tiles, rows, monkeypatch):
    # The order of the factors is the processor's choice: both are held on every machine.
    monkeypatch.setattr(transposed, "_has_tiles", lambda: tiles)
    kernel = jnp.asarray(RNG.standard_normal((24, 10)), dtype)
    stored, x = TransposedKernel(kernel.T), jnp.asarray(RNG.standard_normal((rows, 24)), dtype)
    assert stored.shape == kernel.shape and stored.dtype == kernel.dtype
    assert stored.nbytes == kernel.nbytes
    wide = np.asarray(kernel, np.float64)
    expected = np.asarray(x, np.float64) @ wide

    def product(x):
        return dense(x, stored, keep_sums=True)

    for y in (product(x), jax.jit(product)(x), jax.vmap(product)(x[:, None])[:, 0]):
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert product(x.reshape(rows, 1, 24)).shape == (rows, 1, 10)
    gradient = jax.jit(jax.grad(lambda x: (product(x) * expected).sum()))(x)
    assert gradient.dtype == x.dtype
    target = expected @ wide.T
    close = 1e-5 if dtype == "float32" else 1e-2
    assert np.abs(np.asarray(gradient, np.float64) - target).max() <= close * np.abs(target).max()


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_gives_the_same(scan):
    model = DECODERS["plain"]
    model = model.clone(execution=Execution(scan_layers=scan))
    params, batch = random_params(model), random_batch(model)
    stored = transpose_kernels(params)
    assert isinstance(stored["lm_head"]["kernel"], TransposedKernel)
    logits = jax.jit(model.apply)({"params": stored}, **batch).logits
    np.testing.assert_allclose(logits, model.apply({"params": params}, **batch).logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, dequantize(stored), params)


@pytest.mark.parametrize("mesh", [None, {"data": 1, "fsdp": 2, "tensor": 4}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_opens_with_kernels_as_they_lie(tmp_path, dtype, mesh):
    model = CausalLM(dataclasses.replace(DECODERS["experts"].config, hidden_dropout=0.0))
    mmjax.save(tmp_path, model, random_params(model))
    mesh = mesh and make_mesh(mesh)
    _, params, _ = mmjax.load(tmp_path, dtype=dtype, mesh=mesh)
    _, stored, _ = mmjax.load(tmp_path, dtype=dtype, mesh=mesh, transpose_kernels=True)
    assert isinstance(stored["lm_head"]["kernel"], TransposedKernel)
    expected = transpose_kernels(params)
    assert jax.tree.structure(stored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, stored, expected)
    if mesh:
        jax.tree.map(lambda x, y: np.testing.assert_equal(pieces(x), pieces(y)), stored, expected)


def pieces(x):
    """The shapes of an array's parts on the devices."""
    return [shard.data.shape for shard in x.addressable_shards]


def test_bad_patterns():
    with pytest.raises(ConfigError, match="no parameter matches"):
        transpose_kernels({"a": jnp.ones((2, 2))}, "b")
    with pytest.raises(ConfigError, match="a is no kernel"):
        transpose_kernels({"a": jnp.ones(2)}, "a")
