"""One real training run, several ways to its loss: all pairs, blocks, a ring, micro-batches."""

from __future__ import annotations

import dataclasses
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.nn import Execution
from mmjax.parallel import batch_sharding, make_mesh, replicated
from mmjax.training import Contrastive, Sigmoid, create_state
from mmjax.training.step import make_train_step
from tests.losses.dense import dense_infonce, dense_sigmoid

STEPS, BATCH = 12, 32
QUICK = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Dense:
    """The textbook loss, with the whole matrix of similarities."""

    sigmoid: bool

    def __call__(self, model: Any, params: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
        out = model.apply({"params": params}, **batch)
        scale = jnp.exp(params["logit_scale"])
        if self.sigmoid:
            return {"loss": dense_sigmoid(out.image_embeds, out.text_embeds, scale, -5.0)}
        return {"loss": dense_infonce(out.image_embeds, out.text_embeds, scale)}


@dataclasses.dataclass(frozen=True)
class WithBias:
    """CLIP has no bias of its own: the sigmoid loss gets a constant one."""

    task: Sigmoid

    def __call__(
        self, model: Any, params: Any, batch: Any, key: Any, mesh: Any = None, micro_batches: int = 1
    ) -> dict[str, jax.Array]:
        return self.task(model, {**params, "logit_bias": jnp.float32(-5)}, batch, key, mesh, micro_batches)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["infonce", "sigmoid"])
def test_every_path_trains_alike(sigmoid: bool) -> None:
    digits_run = runpy.run_path("experiments/digits.py")["experiment"]()
    source = dataclasses.replace(digits_run.model, execution=Execution(scan_layers=True))
    key, mesh = jax.random.key(0), make_mesh({"data": 4, "fsdp": 2})
    opened = source.open(digits_run.data, key, make_mesh({"data": 1}, jax.devices()[:1]))
    digits = iter(digits_run.data.build(processor=opened.processor, batch_size=BATCH, seed=0, split="train"))
    names = ("input_ids", "attention_mask", "pixel_values")
    batches = [{name: batch[name] for name in names} for batch in (next(digits) for _ in range(STEPS))]
    digits.close()
    params = {path: np.asarray(x) for path, x in opened.params().items()}
    optimizer = optax.adamw(3e-4 if sigmoid else 1e-3, b2=0.98)

    def curve(task: Any, **options: Any) -> np.ndarray:
        step = make_train_step(opened.model, task, optimizer, **options)
        state = create_state(params, frozenset(params), optimizer, key)
        place: Any = jnp.asarray
        if "mesh" in options:
            state = jax.device_put(state, replicated(mesh))
            place = lambda x: jax.device_put(x, batch_sharding(mesh))  # noqa: E731
        jitted = jax.jit(step, compiler_options=QUICK)
        losses = []
        for batch in batches:
            state, metrics = jitted(state, jax.tree.map(place, batch))
            losses.append(float(metrics["loss"]))
        return np.array(losses)

    def make(**fields: Any) -> Any:
        return WithBias(Sigmoid(**fields)) if sigmoid else Contrastive(**fields)

    whole = curve(Dense(sigmoid))
    assert whole[-1] < whole[0] - 0.05
    paths = {"ring of micro-batches": curve(make(block_size=3), mesh=mesh, accumulate=2)}
    if not sigmoid:  # What leads to the loss is the same code for both.
        paths["blocks"] = curve(make(block_size=7))
        paths["ring"] = curve(make(), mesh=mesh)
        paths["micro-batches"] = curve(make(), accumulate=4)
    for name, losses in paths.items():
        np.testing.assert_allclose(losses, whole, rtol=0, atol=1e-4, err_msg=name)
