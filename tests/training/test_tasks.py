"""Tasks on tiny real models: each is the loss it says it is, and trains."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import losses
from mmjax.models import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
)
from mmjax.models.clip import CLIPTextConfig, CLIPVisionConfig
from mmjax.models.siglip import SiglipTextConfig, SiglipVisionConfig
from mmjax.nn import parameter_specs
from mmjax.training import Classification, Constant, Contrastive, MaskedImage, Sigmoid, create_state
from mmjax.training.optimizer import make_optimizer
from mmjax.training.state import flatten, merge
from mmjax.training.step import make_train_step

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGE: dict[str, Any] = {**SIZES, "image_size": (8, 12), "patch_size": 4}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 20, "max_position_embeddings": 5}


def clip() -> CLIPModel:
    text = CLIPTextConfig(**TEXT, eos_token_id=19)
    return CLIPModel(CLIPConfig(vision_config=CLIPVisionConfig(**IMAGE), text_config=text, projection_dim=8))


def siglip() -> SiglipModel:
    vision = SiglipVisionConfig(**IMAGE)
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=SiglipTextConfig(**TEXT)))


def batch_for(model: Any, size: int = 6) -> dict[str, jax.Array]:
    generator = np.random.default_rng(0)
    pixels = 1.0 + generator.standard_normal((size, 8, 12, 3))
    batch: dict[str, Any] = {"pixel_values": pixels.astype(np.float32)}
    if "input_ids" in model.example_batch():
        ids = generator.integers(0, 19, (size, 5))
        ids[:, -1] = 19
        batch["input_ids"] = ids.astype(np.int32)
        batch["attention_mask"] = np.ones((size, 5), np.int32)
    else:
        batch["labels"] = generator.integers(0, 3, size).astype(np.int32)
    return {name: jnp.asarray(x) for name, x in batch.items()}


def params_of(model: Any) -> dict[str, Any]:
    """Random parameters from the specs alone: compiling the initialisers would take longer than the tests."""
    generator = np.random.default_rng(1)
    flat = {}
    for path, spec in flatten(parameter_specs(model)).items():
        centre = 1.0 if path.endswith("scale") else 0.0
        flat[path] = jnp.asarray(centre + 0.2 * generator.standard_normal(spec.shape), spec.dtype)
    return merge(flat)


def run(task: Any, model: Any, params: Any, batch: Any) -> dict[str, jax.Array]:
    return jax.jit(lambda *inputs: task(model, *inputs))(params, batch, jax.random.key(0))


def test_contrastive_is_infonce_of_the_embeddings() -> None:
    model = clip()
    params, batch = params_of(model), batch_for(model)
    terms = run(Contrastive(), model, params, batch)
    out = jax.jit(model.apply)({"params": params}, **batch)
    wanted = losses.infonce(out.image_embeds, out.text_embeds, jnp.exp(params["logit_scale"]))
    assert list(terms) == ["contrastive"]
    np.testing.assert_allclose(terms["contrastive"], wanted, rtol=1e-6)


def test_the_scale_stops_at_one_hundred() -> None:
    model = clip()
    params, batch = params_of(model), batch_for(model)
    at, above = ({**params, "logit_scale": jnp.float32(math.log(100) + more)} for more in (0.0, 3.0))
    task = Contrastive()
    found, wanted = (run(task, model, tree, batch)["contrastive"] for tree in (above, at))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    projected = task.project(flatten(above))
    np.testing.assert_allclose(projected["logit_scale"], math.log(100), rtol=1e-6)
    for path, value in flatten(params).items():
        if path != "logit_scale":
            assert projected[path] is value


def test_sigmoid_is_the_pairwise_loss_of_the_embeddings() -> None:
    model = siglip()
    params, batch = params_of(model), batch_for(model)
    terms = run(Sigmoid(), model, params, batch)
    out = jax.jit(model.apply)({"params": params}, **batch)
    scale, bias = jnp.exp(params["logit_scale"]).reshape(()), params["logit_bias"].reshape(())
    wanted = losses.sigmoid(out.image_embeds, out.text_embeds, scale, bias)
    np.testing.assert_allclose(terms["sigmoid"], wanted, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_is_cross_entropy_of_the_logits(smoothing: float) -> None:
    model = ViTForImageClassification(ViTConfig(**IMAGE, num_labels=3))
    params, batch = params_of(model), batch_for(model)
    terms = run(Classification(label_smoothing=smoothing), model, params, batch)
    logits = jax.jit(model.apply)({"params": params}, pixel_values=batch["pixel_values"]).logits
    wanted = losses.cross_entropy(logits, batch["labels"], label_smoothing=smoothing)
    np.testing.assert_allclose(terms["cross_entropy"], wanted, rtol=1e-6)


def test_masked_image_hides_the_share_and_counts_only_what_was_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ViTForMaskedImageModeling(ViTConfig(**IMAGE, mask_token=True, encoder_stride=4))
    params, batch = params_of(model), batch_for(model)
    seen: list[tuple[Any, Any]] = []
    real = losses.masked_l1

    def remember(reconstruction: jax.Array, pixels: jax.Array, hidden: jax.Array) -> jax.Array:
        seen.append((np.asarray(reconstruction), np.asarray(hidden)))
        return real(reconstruction, pixels, hidden)

    monkeypatch.setattr(losses, "masked_l1", remember)
    terms = MaskedImage(share=0.5)(model, params, batch, jax.random.key(0))
    [(reconstruction, hidden)] = seen
    assert hidden.shape == (6, 6)
    assert hidden.sum(axis=1).tolist() == [3] * 6
    assert len({row.tobytes() for row in hidden}) > 1
    pixels = np.asarray(batch["pixel_values"])
    mask = hidden.reshape(6, 2, 3).repeat(4, axis=1).repeat(4, axis=2)
    wanted = np.abs(pixels - reconstruction)[mask].mean()
    np.testing.assert_allclose(terms["reconstruction"], wanted, rtol=1e-5)


CASES = {
    "clip": (clip, Contrastive()),
    "siglip": (siglip, Sigmoid()),
    "classification": (
        lambda: ViTForImageClassification(ViTConfig(**IMAGE, num_labels=3, attention_dropout=0.1)),
        Classification(),
    ),
    "masked": (
        lambda: ViTForMaskedImageModeling(ViTConfig(**IMAGE, mask_token=True, encoder_stride=4)),
        MaskedImage(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_task_trains_its_model(case: str) -> None:
    make, task = CASES[case]
    model = make()
    batch = batch_for(model)
    params = flatten(params_of(model))
    optimizer = make_optimizer(
        dict.fromkeys(params, 0),
        {0: Constant(value=0.01).build(10)},
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    state = create_state(params, frozenset(params), optimizer, jax.random.key(0))
    step = jax.jit(make_train_step(model, task, optimizer))
    history = []
    for _ in range(12):
        state, metrics = step(state, batch)
        history.append(float(metrics["loss"]))
    assert np.mean(history[-3:]) < 0.9 * np.mean(history[:3]), history
    assert int(state.bad_step) == -1
    assert jax.tree.structure(merge(state.params)) == jax.tree.structure(merge(params))
