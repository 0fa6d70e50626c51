"""Eight emulated devices compute what one does: losses, gradients, and where everything lies."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import mmjax.losses
from mmjax.nn import Execution, parameter_specs
from mmjax.parallel import BATCH_AXES, batch_sharding, make_mesh, param_shardings, replicated
from tests.tiny import MODELS, random_batch, random_params

TOLERANCE = 1e-5
# Where everything lies is the same, and compiling takes half the time.
QUICK = {"xla_backend_optimization_level": 0}
ROWS = 8
LABELS = np.arange(ROWS) % 3


def contrastive(model, params, batch, **spread):
    out = model.apply({"params": params}, **batch)
    scale = jnp.exp(params["logit_scale"])
    if "logit_bias" in params:
        bias = params["logit_bias"]
        return mmjax.losses.sigmoid(out.image_embeds, out.text_embeds, scale, bias, **spread)
    return mmjax.losses.infonce(out.image_embeds, out.text_embeds, scale, **spread)


def classify(model, params, batch, **spread):
    """With dropout: its bits must not depend on the layout either."""
    noise = {"deterministic": False, "rngs": {"dropout": jax.random.key(5)}}
    logits = model.apply({"params": params}, batch["pixel_values"], **noise).logits
    return mmjax.losses.cross_entropy(logits, batch["labels"])


LOSSES = {"CLIPModel": contrastive, "SiglipModel": contrastive, "ViTForImageClassification": classify}


@functools.cache
def setting(name):
    """Parameters, a batch, and the loss and gradients of one device."""
    model = MODELS[name]
    params, batch = random_params(model), random_batch(model, ROWS)
    if name.startswith("ViT"):
        batch["labels"] = LABELS
    step = jax.jit(jax.value_and_grad(functools.partial(LOSSES[name], model)))
    loss, grads = step(params, batch)
    assert {x.sharding for x in jax.tree.leaves(grads)} == {
        jax.sharding.SingleDeviceSharding(jax.devices()[0])
    }
    return params, batch, float(loss), flatten_dict(grads, sep="/")


MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "data-tensor": {"data": 2, "tensor": 4},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
CASES = [(name, mesh, False, False) for name in LOSSES for mesh in MESHES]
CASES += [(name, "all", True, False) for name in LOSSES]
CASES += [("CLIPModel", "all", False, True), ("SiglipModel", "fsdp", True, True)]


@pytest.mark.parametrize(("name", "mesh", "scan", "ring"), CASES)
def test_eight_devices_equal_one(name, mesh, scan, ring):
    assert len(jax.devices()) == 8
    params, batch, expected_loss, expected = setting(name)
    mesh = make_mesh(MESHES[mesh])
    model = MODELS[name].clone(execution=Execution(scan_layers=scan))
    lay = param_shardings(mesh, parameter_specs(model))
    spread = {"mesh": mesh, "axis": BATCH_AXES} if ring else {}
    step = jax.jit(
        jax.value_and_grad(lambda p, b: LOSSES[name](model, p, b, **spread)),
        in_shardings=(lay, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), lay),
        compiler_options=QUICK,
    )
    params = jax.device_put(params, lay)
    batch = jax.device_put(batch, batch_sharding(mesh))
    loss, grads = step(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=TOLERANCE)
    grads, lay = flatten_dict(grads, sep="/"), flatten_dict(lay, sep="/")
    assert grads.keys() == expected.keys()
    for path, value in expected.items():
        assert grads[path].sharding == lay[path], path
        # A shift of all keys leaves the softmax as it is: that gradient is zero but for rounding.
        like = expected[path.replace("k_proj/bias", "q_proj/bias")]
        worst = np.abs(np.asarray(grads[path]) - value).max() / np.abs(like).max()
        assert worst <= TOLERANCE, f"{path}: {worst:.1e}"
