"""What holds of every model: the same properties, and that execution choices change nothing."""

from __future__ import annotations

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mmjax.nn import Execution, parameter_specs
from tests.tiny import DECODERS, MODELS, random_batch, random_params

X64 = 1e-10


# Between them these hold every brick: class and mask tokens, both norms' places, all poolings, both masks.
TOWERS = ("ViTModel", "ViTForMaskedImageModeling", "CLIPModel", "SiglipModel")
ALL = {**MODELS, **DECODERS}
BRICKS = (*TOWERS, *DECODERS)


@pytest.fixture(params=BRICKS)
def setting(request):
    with jax.enable_x64(True):
        model = ALL[request.param]
        params = random_params(model, dtype="float64")
        batch = random_batch(model)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].astype(np.float64)
        yield model, params, batch


def close(a, b, tolerance=X64):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


def loss(model, params, batch, **options):
    out = model.apply({"params": params}, **batch, **options)
    return sum(jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))


def test_pure(setting):
    model, params, batch = setting
    before = {name: value.copy() for name, value in batch.items()}
    first = model.apply({"params": params}, **batch)
    second = model.apply({"params": params}, **batch)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, value in batch.items():
        np.testing.assert_array_equal(value, before[name])
    close(jax.jit(model.apply)({"params": params}, **batch), first)


def test_rows_are_independent(setting):
    """A row alone gives what it gives in a batch, so that vmap over rows is the batch."""
    model, params, batch = setting
    if set(batch) >= {"pixel_values", "input_ids"}:
        out = model.apply({"params": params}, batch["pixel_values"], method="encode_image")
        alone = [
            model.apply({"params": params}, batch["pixel_values"][i : i + 1], method="encode_image")
            for i in range(3)
        ]
        close(out, jnp.concatenate(alone))
        return
    out = model.apply({"params": params}, **batch)

    def one(row):
        return model.apply({"params": params}, **jax.tree.map(lambda x: x[None], row))

    # jax has no vmap of the ragged product that experts are.
    each = jax.lax.map if getattr(model.config, "experts", None) else lambda f, rows: jax.vmap(f)(rows)
    close(jax.tree.map(lambda x: x[:, 0], each(one, batch)), out)


@pytest.mark.parametrize(
    "execution", [Execution(scan_layers=True), Execution(remat=True)], ids=["scan", "remat"]
)
def test_execution_changes_nothing(setting, execution):
    model, params, batch = setting
    key = jax.random.key(3)

    def everything(model, params):
        options = {"output_hidden_states": True, "output_attentions": True}
        out = model.apply({"params": params}, **batch, **options)
        # One family with noise is enough: random bits are slow to compile.
        noise = (
            {"deterministic": False, "rngs": {"dropout": key}} if type(model).__name__ == "ViTModel" else {}
        )
        return out, jax.value_and_grad(lambda p: loss(model, p, batch, **noise))(params)

    run = jax.jit(everything, static_argnums=0)
    close(run(model.clone(execution=execution), params), run(model, params))


def test_dropout_needs_its_key_and_changes_the_output(setting):
    model, params, batch = setting
    plain = model.apply({"params": params}, **batch)
    noisy = model.apply({"params": params}, **batch, deterministic=False, rngs={"dropout": jax.random.key(3)})
    assert any(not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (plain, noisy)), strict=True))
    with pytest.raises(flax.errors.InvalidRngError):
        model.apply({"params": params}, **batch, deterministic=False)


def test_gradient_equals_finite_difference(setting):
    model, params, batch = setting
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(5)
    direction = tree.unflatten([jnp.asarray(rng.standard_normal(leaf.shape)) for leaf in leaves])
    step = 1e-5

    def along(t):
        return loss(model, jax.tree.map(lambda p, d: p + t * d, params, direction), batch)

    along = jax.jit(along)
    numeric = (along(step) - along(-step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(along))(0.0), numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_specs_are_what_init_makes(name):
    model = ALL[name]
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example_batch()))
    assert set(made) == {"params"}
    made, specs = flatten_dict(made["params"], sep="/"), flatten_dict(parameter_specs(model), sep="/")
    assert made.keys() == specs.keys()
    for path, spec in specs.items():
        assert (made[path].shape, made[path].dtype.name) == (spec.shape, spec.dtype), path
        assert len(spec.axes) == len(spec.shape), path


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", BRICKS)
def test_compute_dtype_is_a_choice_beside_the_parameters(name, dtype):
    model = ALL[name].clone(execution=Execution(dtype=dtype))
    params, batch = random_params(model), random_batch(model)
    out = jax.jit(model.apply)({"params": params}, **batch)
    narrow = model.apply({"params": jax.tree.map(lambda x: x.astype(dtype), params)}, **batch)
    exact = jax.jit(ALL[name].apply)({"params": params}, **batch)
    # In float32 it is the same program, so that all bits are the same.
    tolerance = 0.0 if dtype == "float32" else 0.1
    for part in out:
        for a, b, c in zip(*map(jax.tree.leaves, (out[part], exact[part], narrow[part])), strict=True):
            assert a.dtype == (jnp.float32 if part.startswith("logits") else jnp.dtype(dtype)), part
            np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b), rtol=tolerance, atol=tolerance * 4
            )
            assert c.dtype == a.dtype
