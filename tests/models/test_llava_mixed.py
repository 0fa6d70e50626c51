"""Any of the library's eyes with any of its brains: forward, text, and a folder that goes back bitwise."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import mmjax
from mmjax.models import CLIPVisionConfig, Llava, LlavaConfig, SiglipVisionConfig, ViTConfig
from tests.models.folders import assert_same_params
from tests.models.test_decoders import FOLDER, NAMES
from tests.tiny import random_params

SIZES = dict(image_size=(8, 12), patch_size=4, hidden_size=8, intermediate_size=12, num_attention_heads=2)
# With and without a CLS token among the features, from one layer or several.
EYES = {
    "clip": (CLIPVisionConfig(num_hidden_layers=2, **SIZES), "default", -2),
    "clip-full": (CLIPVisionConfig(num_hidden_layers=3, **SIZES), "full", (0, -2)),
    "siglip": (SiglipVisionConfig(num_hidden_layers=2, pooling="none", **SIZES), "full", -1),
    "vit": (ViTConfig(num_hidden_layers=2, pooling="none", **SIZES), "default", (1, -1)),
}
NEW = 4


@pytest.mark.parametrize(("brain", "eyes"), [*zip(NAMES, itertools.cycle(EYES), strict=False)])
def test_eyes_and_brains(brain, eyes, tmp_path):
    vision, strategy, layers = EYES[eyes]
    text = dataclasses.replace(mmjax.load(FOLDER / brain)[0].config, eos_token_id=None)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=text.vocab_size - 1,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layers,
    )
    assert config.tile_rows == 6 + (eyes == "clip-full")
    model = Llava(config)
    params = random_params(model)
    numbers = np.random.default_rng(0)
    image = [text.vocab_size - 1] * config.tile_rows
    ids = np.array([[3, *image, 5, 4]], np.int32)
    inputs = {"input_ids": ids, "pixel_values": numbers.standard_normal((1, 8, 12, 3), np.float32)}
    whole = np.asarray(mmjax.generate(model, params, inputs, NEW, stop_ids=()))
    forward = jax.jit(lambda batch: model.apply({"params": params}, **batch).logits)
    read = {**inputs, "input_ids": np.concatenate([ids, whole], axis=1)}
    logits = np.asarray(forward(model.lay_out(read)))
    assert logits[0, ids.shape[1] - 1 : -1].argmax(-1).tolist() == whole[0].tolist()
    other = np.asarray(forward(model.lay_out({**read, "pixel_values": -inputs["pixel_values"]})))
    assert np.abs(other - logits)[:, 1:].max() > 1e-3 and (other[:, 0] == logits[:, 0]).all()
    mmjax.save(tmp_path / "first", model, params)
    again, back, _ = mmjax.load(tmp_path / "first")
    assert again.config == config
    assert_same_params(back, params)
    mmjax.save(tmp_path / "second", again, back)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
