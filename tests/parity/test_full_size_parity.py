"""The published sizes with random weights: rounding grows with depth and width, mistakes more so."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="live comparison needs the parity extra: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="live comparison needs the parity extra: pip install -e '.[parity]'"
)

import jax
import numpy as np
import torch
import transformers

import mmjax
from tests.parity import reference as ref

CLIP_L = dict(
    vision_config=dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=336,
        patch_size=14,
    ),
    text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    projection_dim=768,
)
SIGLIP = dict(vision_config=dict(image_size=256), text_config={})

CASES = {
    "vit-b16": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)),
    "clip-b32": lambda: transformers.CLIPModel(transformers.CLIPConfig()),
    "clip-l14-336": lambda: transformers.CLIPModel(transformers.CLIPConfig(**CLIP_L)),
    "siglip-b16-256": lambda: transformers.SiglipModel(transformers.SiglipConfig(**SIGLIP)),
}


@pytest.mark.parametrize("name", CASES)
def test_full_size(name, tmp_path):
    with torch.device("meta"):
        reference = CASES[name]()
    reference = ref.randomise(reference.to_empty(device="cpu"))
    for module in reference.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1]).expand(1, -1)
    ref.save_reference(reference, tmp_path)
    model, params, _ = mmjax.load(tmp_path)
    vision = model.config.vision_config
    pixels = ref.random_pixels(1, *vision.image_size)
    batch = {"pixel_values": ref.channels_last(pixels)}
    inputs = {"pixel_values": pixels}
    names = ("logits",)
    if hasattr(model.config, "text_config"):
        text = model.config.text_config
        ids = torch.randint(3, text.vocab_size - 9, (2, text.max_position_embeddings))
        ids[0, 5:] = ids[1, -1] = text.eos_token_id
        batch["input_ids"] = ids.numpy()
        inputs["input_ids"] = ids
        names = ("logits_per_image", "image_embeds", "text_embeds")
    with torch.no_grad():
        expected = reference(**inputs)
    out = jax.jit(model.apply)({"params": params}, **batch)
    for part in names:
        ref.assert_close(np.asarray(out[part]), expected[part], ref.FULL_SIZE, part)
