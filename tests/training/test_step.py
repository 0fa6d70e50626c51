"""The step: frozen parts, accumulation, averages, bad steps, and the same numbers on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.nn import parameter_specs
from mmjax.parallel import batch_sharding, make_mesh, param_shardings, replicated
from mmjax.training.optimizer import make_optimizer
from mmjax.training.schedules import Constant
from mmjax.training.state import (
    TrainState,
    create_state,
    flatten,
    merge,
    named_leaves,
    state_from_arrays,
    state_shardings,
    state_to_arrays,
)
from mmjax.training.step import make_train_step, term_name
from tests.training.toy import SquaredError, toy_batch, toy_model, toy_params

HEAD = frozenset({"head/kernel", "head/bias"})


def setup(
    *, trained: frozenset[str] | None = None, drop: float = 0.0, rate: float = 0.05, **options: Any
) -> tuple[TrainState, Any, Any]:
    """A state, its step (not jitted), and the optimizer."""
    model = toy_model(drop=drop)
    params = toy_params(model)
    trained = frozenset(params) if trained is None else trained
    optimizer = make_optimizer(
        dict.fromkeys(trained, 0),
        {0: Constant(value=rate).build(10)},
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    task = options.pop("task", SquaredError())
    state = create_state(params, trained, optimizer, jax.random.key(3), ema=options.get("ema_decay", 0.0) > 0)
    return state, make_train_step(model, task, optimizer, **options), optimizer


def assert_same_bits(found: Any, wanted: Any) -> None:
    a, b = (named_leaves(state_to_arrays(x) if isinstance(x, TrainState) else x) for x in (found, wanted))
    assert list(a) == list(b)
    for name in a:
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def test_frozen_parameters_stay_bitwise_and_have_no_optimizer_state() -> None:
    state, step, _ = setup(trained=HEAD, ema_decay=0.5)
    before = jax.tree.map(np.array, state.frozen)
    assert set(before) == {"eyes/kernel", "eyes/bias"}
    assert not any("eyes" in name for name in named_leaves(state.opt_state))
    assert not any("eyes" in name for name in named_leaves(state.ema))
    jitted = jax.jit(step, donate_argnums=0)
    for seed in range(5):
        state, _ = jitted(state, toy_batch(seed=seed))
    assert_same_bits(state.frozen, before)
    assert int(state.step) == 5


def test_no_gradient_is_computed_for_frozen_parameters() -> None:
    """The compiled step has the head's two backward products and none for the eyes' kernel."""
    model = toy_model(drop=0.0)

    def products(trained: frozenset[str] | None) -> int:
        state, step, _ = setup(trained=trained)
        return str(jax.make_jaxpr(step)(state, toy_batch())).count("dot_general")

    # Forward: 2. Backward: head kernel 1, head input 1, eyes kernel 1 (its input is data).
    assert products(None) == 5
    assert products(HEAD) == 3
    assert model is not None


def test_the_step_is_pure() -> None:
    state, step, _ = setup(drop=0.3, ema_decay=0.9)
    copy = jax.tree.map(np.array, state_to_arrays(state))
    batch = toy_batch()
    inputs = jax.tree.map(np.array, batch)
    jitted = jax.jit(step)
    one, two = jitted(state, batch), jitted(state, batch)
    assert_same_bits(one[0], two[0])
    assert_same_bits(state_to_arrays(state), copy)
    assert_same_bits(batch, inputs)


def test_every_step_draws_its_own_dropout() -> None:
    state, step, _ = setup(drop=0.5, rate=0.0)
    jitted = jax.jit(step)
    batch = toy_batch()
    state, first = jitted(state, batch)
    state, second = jitted(state, batch)
    assert float(first["loss"]) != float(second["loss"])


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch_for_a_mean_loss(parts: int) -> None:
    state, whole, _ = setup()
    _, cut, _ = setup(accumulate=parts)
    batch = toy_batch(16)
    (a, metrics_a), (b, metrics_b) = jax.jit(whole)(state, batch), jax.jit(cut)(state, batch)
    for name, value in named_leaves(metrics_a).items():
        np.testing.assert_allclose(named_leaves(metrics_b)[name], value, rtol=1e-5, err_msg=name)
    for path in a.params:
        np.testing.assert_allclose(b.params[path], a.params[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_micro_batches_draw_their_own_dropout() -> None:
    """Two equal halves would lose the same entries otherwise."""
    half = toy_batch(8)
    twice = {name: jnp.repeat(x, 2, axis=0) for name, x in half.items()}
    state, whole, _ = setup(drop=0.5)
    _, cut, _ = setup(drop=0.5, accumulate=2)
    _, one = jax.jit(whole)(state, half)
    _, two = jax.jit(cut)(state, twice)
    assert float(one["loss"]) != float(two["loss"])


def test_the_average_follows_the_parameters() -> None:
    state, step, _ = setup(ema_decay=0.75)
    assert state.ema is not None
    wanted = {path: np.asarray(x, np.float64) for path, x in state.ema.items()}
    jitted = jax.jit(step)
    for seed in range(4):
        state, _ = jitted(state, toy_batch(seed=seed))
        wanted = {path: 0.75 * old + 0.25 * np.asarray(state.params[path]) for path, old in wanted.items()}
    assert state.ema is not None
    for path, value in wanted.items():
        np.testing.assert_allclose(state.ema[path], value, rtol=1e-5, atol=1e-6)


def test_no_average_without_a_decay() -> None:
    assert setup()[0].ema is None


class BadSecondTerm(SquaredError):
    """Its term "fit" is not finite for a batch that says so."""

    def __call__(self, model: Any, params: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
        terms = super().__call__(model, params, batch, key)
        return {**terms, "fit": terms["fit"] + batch["poison"].sum()}


class BadGradient(SquaredError):
    """Its terms are finite; the gradient of sqrt at zero is not."""

    def __call__(self, model: Any, params: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
        terms = super().__call__(model, params, batch, key)
        steep = jnp.sqrt(jnp.sum(params["head"]["bias"]) * batch["poison"].sum())
        return {**terms, "steep": steep}


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_term_keeps_the_last_good_state_and_is_remembered(poison: float) -> None:
    state, step, _ = setup(task=BadSecondTerm(), ema_decay=0.9, drop=0.2)
    jitted = jax.jit(step)
    good = {**toy_batch(), "poison": jnp.zeros(16)}
    bad = {**toy_batch(), "poison": jnp.full(16, poison)}
    state, _ = jitted(state, good)
    kept = state
    state, metrics = jitted(state, bad)
    assert (int(state.bad_step), term_name(metrics, int(state.bad_term))) == (2, "fit")
    assert_same_bits(state, kept)
    state, _ = jitted(state, good)
    assert (int(state.bad_step), int(state.step)) == (2, 1)
    assert_same_bits(state, kept)


def test_a_bad_gradient_is_named_as_such() -> None:
    state, step, _ = setup(task=BadGradient())
    state, metrics = jax.jit(step)(state, {**toy_batch(), "poison": jnp.zeros(16)})
    assert np.isfinite(float(metrics["loss"]))
    assert (int(state.bad_step), term_name(metrics, int(state.bad_term))) == (1, "gradient")


def test_rates_are_reported() -> None:
    state, step, _ = setup(rates={"learning_rate": Constant(value=0.5, warmup=2).build(4)})
    jitted = jax.jit(step)
    state, first = jitted(state, toy_batch())
    _, second = jitted(state, toy_batch())
    assert (float(first["rates"]["learning_rate"]), float(second["rates"]["learning_rate"])) == (0.25, 0.5)


def test_projection_is_applied_after_the_update() -> None:
    class Boxed(SquaredError):
        def project(self, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return {path: jnp.clip(x, -0.1, 0.1) for path, x in params.items()}

    state, step, _ = setup(task=Boxed())
    state, _ = jax.jit(step)(state, toy_batch())
    assert max(float(jnp.abs(x).max()) for x in state.params.values()) <= 0.1 + 1e-7


@pytest.mark.parametrize(
    "shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(shape: dict[str, int], accumulate: int) -> None:
    options: dict[str, Any] = {"drop": 0.3, "ema_decay": 0.9, "accumulate": accumulate}
    state, step, optimizer = setup(**options)
    mesh = make_mesh(shape)
    lay = flatten(param_shardings(mesh, parameter_specs(toy_model())))
    lay_state = state_shardings(state, lay, mesh)
    spread = jax.jit(
        step,
        in_shardings=(lay_state, batch_sharding(mesh)),
        out_shardings=(lay_state, replicated(mesh)),
        donate_argnums=0,
    )
    one = jax.jit(step)
    many = jax.device_put(jax.tree.map(jnp.copy, state), lay_state)
    moments = named_leaves(many.opt_state)
    for path, x in many.params.items():
        assert x.sharding == lay[path]
        for kind in ("mu", "nu"):
            [moment] = [m for name, m in moments.items() if name.endswith(f"{kind}.{path.replace('/', '.')}")]
            assert moment.sharding == lay[path]
    for seed in range(3):
        batch = toy_batch(32, seed)
        state, metrics = one(state, batch)
        many, spread_metrics = spread(many, jax.device_put(batch, batch_sharding(mesh)))
        for name, value in named_leaves(metrics).items():
            np.testing.assert_allclose(
                named_leaves(spread_metrics)[name], value, rtol=1e-5, atol=1e-6, err_msg=name
            )
    wanted = state_to_arrays(state)
    for name, value in state_to_arrays(many).items():
        np.testing.assert_allclose(
            np.asarray(value), np.asarray(wanted[name]), rtol=1e-5, atol=1e-5, err_msg=name
        )
    if shape.get("fsdp", 1) > 1:
        assert many.params["eyes/kernel"].sharding == NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))


def test_the_state_survives_its_flat_form() -> None:
    state, _, _ = setup(trained=HEAD, ema_decay=0.9)
    arrays = state_to_arrays(state)
    assert all(
        isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in arrays.values()
    )
    back = state_from_arrays(jax.eval_shape(lambda: state), arrays)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_same_bits(back, state)
    assert jax.random.key_impl(back.key) == jax.random.key_impl(state.key)


def test_a_bad_mark_is_not_kept_in_the_flat_form() -> None:
    state, step, _ = setup(task=BadGradient())
    state, _ = jax.jit(step)(state, {**toy_batch(), "poison": jnp.zeros(16)})
    assert int(state.bad_step) == 1
    assert int(state_from_arrays(state, state_to_arrays(state)).bad_step) == -1


def test_merge_is_the_inverse_of_flatten() -> None:
    params = toy_params(toy_model())
    assert flatten(merge(params)) == params
