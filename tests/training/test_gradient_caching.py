"""Micro-batches under a loss of the whole batch: exact, also with dropout or a frozen tower, flat memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import losses
from mmjax.models import CLIPModel, SiglipModel
from mmjax.training import Contrastive, Sigmoid, create_state
from mmjax.training.state import flatten, merge
from mmjax.training.step import in_micro_batches, make_train_step
from tests.losses.dense import TOLERANCE, dense_infonce, dense_sigmoid, embeddings, reference, value_bound
from tests.training.test_tasks import batch_for, clip, params_of, siglip

# The same programs but for speed, in a third of the time to compile.
QUICK = {"xla_backend_optimization_level": 0}
TASKS = {"clip": (clip, Contrastive), "siglip": (siglip, Sigmoid)}


def gradients(model: Any, task: Any, accumulate: int, batch: Any, trained: Any = None) -> Any:
    """Metrics and gradients of one step, read off a step of plain gradient descent."""
    flat = flatten(params_of(model))
    trained = frozenset(flat) if trained is None else frozenset(filter(trained, flat))
    optimizer = optax.sgd(1.0)
    state = create_state(flat, trained, optimizer, jax.random.key(0))
    step = jax.jit(make_train_step(model, task, optimizer, accumulate=accumulate), compiler_options=QUICK)
    after, metrics = step(state, batch)
    return metrics, {path: np.asarray(state.params[path] - after.params[path]) for path in sorted(trained)}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(np.abs(x).max() for x in expected.values())
    for path, gradient in expected.items():
        assert np.abs(found[path] - gradient).max() <= tolerance * largest, path


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("grouped", [False, True])
def test_micro_batches_change_nothing(name: str, grouped: bool) -> None:
    make, task = TASKS[name]
    model = make()
    batch = batch_for(model, 12)
    if grouped:
        batch["labels"] = jnp.arange(12) // 2
    task = task(groups="labels" if grouped else None, block_size=5)
    plain, expected = gradients(model, task, 1, batch)
    metrics, found = gradients(model, task, 3, batch)
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)
    assert_same(found, expected, 5e-6)


@pytest.mark.parametrize("name", TASKS)
def test_a_locked_image_tower_is_not_run_again(name: str) -> None:
    make, task = TASKS[name]
    model = make()
    batch = batch_for(model, 12)

    def text_only(path: str) -> bool:
        return not path.startswith(("vision_model", "visual_projection"))

    plain, expected = gradients(model, task(), 1, batch, text_only)
    metrics, found = gradients(model, task(), 3, batch, text_only)
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)
    assert_same(found, expected, 5e-6)

    def patches(trained: Any) -> int:
        """How many products of the program belong to the embedding of patches."""
        flat = flatten(params_of(model))
        frozen = {path: x for path, x in flat.items() if not trained(path)}

        def loss(params: Any) -> Any:
            terms = task()(model, merge(params, frozen), batch, jax.random.key(0), micro_batches=3)
            return sum(terms.values())

        moving = {path: x for path, x in flat.items() if trained(path)}
        program = jax.jit(jax.grad(loss)).lower(moving).compile().as_text()
        return sum("patch_embedding" in line and " dot(" in line for line in program.splitlines())

    assert patches(text_only) == 1 < patches(lambda path: True)


def test_dropout_is_the_same_in_both_passes() -> None:
    """Against ordinary differentiation of micro-batches that are all kept."""
    model = siglip()
    vision = dataclasses.replace(model.config.vision_config, attention_dropout=0.4)
    model = SiglipModel(dataclasses.replace(model.config, vision_config=vision))
    batch, key = batch_for(model, 12), jax.random.key(3)
    params = params_of(model)

    def kept(params: Any) -> Any:
        embeds = []
        for index in range(3):
            part = {name: x[index::3] for name, x in batch.items()}
            noise = {"dropout": jax.random.fold_in(key, index)}
            out = model.apply({"params": params}, **part, deterministic=False, rngs=noise)
            embeds.append((out.image_embeds, out.text_embeds))
        image, text = (jnp.stack(side, axis=1).reshape(12, -1) for side in zip(*embeds, strict=True))
        scale, bias = jnp.exp(params["logit_scale"]), params["logit_bias"]
        return dense_sigmoid(image, text, scale, bias)

    def cached(params: Any) -> Any:
        return Sigmoid()(model, params, batch, key, micro_batches=3)["sigmoid"]

    value, expected = jax.jit(jax.value_and_grad(kept), compiler_options=QUICK)(params)
    found_value, found = jax.jit(jax.value_and_grad(cached), compiler_options=QUICK)(params)
    np.testing.assert_allclose(found_value, value, rtol=1e-6)
    host = [{path: np.asarray(x) for path, x in flatten(tree).items()} for tree in (found, expected)]
    assert_same(*host, 5e-6)
    other = Sigmoid()(model, params, batch, jax.random.key(4), micro_batches=3)["sigmoid"]
    assert abs(float(other) - float(value)) > 1e-4


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("scale", TOLERANCE)
def test_gradients_of_embeddings_equal_dense_float64(scale: float) -> None:
    image, text = embeddings(48)
    rows = jnp.arange(48)

    def cached(loss: Any) -> Any:
        def f(image: Any, text: Any, *rest: Any) -> Any:
            pick = lambda part, key: (image[part["row"]], text[part["row"]])  # noqa: E731
            sides = in_micro_batches(pick, {"row": rows}, jax.random.key(0), 4)
            return loss(*sides, *rest, block_size=7)

        return f

    for loss, dense, rest in (
        (losses.infonce, dense_infonce, (np.float32(scale),)),
        (losses.sigmoid, dense_sigmoid, (np.float32(scale), np.float32(-10))),
    ):
        arguments = (image, text, *rest)
        run = jax.jit(jax.value_and_grad(cached(loss), tuple(range(len(arguments)))))
        value, grads = run(*arguments)
        expected, expected_grads = reference(dense, *arguments)
        assert abs(float(value) - expected) <= value_bound(expected)
        for ours, theirs in zip(grads, expected_grads, strict=True):
            assert np.abs(np.asarray(ours) - theirs).max() <= TOLERANCE[scale] * np.abs(theirs).max()


def test_memory_is_that_of_one_micro_batch() -> None:
    model: CLIPModel = clip()
    flat = flatten(params_of(model))
    optimizer = optax.sgd(1.0)

    def temporary_bytes(size: int, accumulate: int) -> int:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch_for(model))
        state = jax.eval_shape(lambda: create_state(flat, frozenset(flat), optimizer, jax.random.key(0)))
        task = Contrastive(block_size=16)
        step = jax.jit(make_train_step(model, task, optimizer, accumulate=accumulate), donate_argnums=0)
        return step.lower(state, shapes).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(16, 1), temporary_bytes(256, 16)
    # What grows are the inputs, laid out micro-batch by micro-batch, and a few rows of embeddings per sample.
    inputs = sum(x[0].nbytes for x in batch_for(model).values())
    assert large <= small + 240 * (inputs + 20 * 8 * 4)
    assert temporary_bytes(256, 1) > 4 * large


def test_a_batch_without_the_groups_is_refused() -> None:
    model = clip()
    with pytest.raises(Exception, match="the batch has no 'captions'; it has attention_mask, input_ids"):
        gradients(model, Contrastive(groups="captions"), 1, batch_for(model))
