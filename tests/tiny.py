"""Tiny models with every parameter random, and batches for them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict

from mmjax.language import DecoderConfig, ExpertsConfig
from mmjax.models import (
    CausalLM,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

SIZES: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.1
)
IMAGES: dict[str, Any] = dict(image_size=(8, 12), patch_size=4)
TEXTS: dict[str, Any] = dict(vocab_size=32, max_position_embeddings=8)

VIT = ViTConfig(**SIZES, **IMAGES, hidden_dropout=0.1, num_labels=3, encoder_stride=4)
MASKED = ViTConfig(**SIZES, **IMAGES, pooling="none", mask_token=True, encoder_stride=4)
CLIP = CLIPConfig(
    vision_config=CLIPVisionConfig(**SIZES, **IMAGES, projection_dim=6),
    text_config=CLIPTextConfig(**SIZES, **TEXTS, eos_token_id=31, projection_dim=6),
    projection_dim=6,
)
SIGLIP = SiglipConfig(
    vision_config=SiglipVisionConfig(**SIZES, **IMAGES), text_config=SiglipTextConfig(**SIZES, **TEXTS)
)

MODELS = {
    type(model).__name__: model
    for model in (
        ViTModel(VIT),
        ViTForImageClassification(VIT),
        ViTForMaskedImageModeling(MASKED),
        CLIPModel(CLIP),
        CLIPVisionModel(CLIP.vision_config),
        CLIPTextModel(CLIP.text_config),
        CLIPVisionModelWithProjection(CLIP.vision_config),
        CLIPTextModelWithProjection(CLIP.text_config),
        CLIPForImageClassification(CLIP),
        SiglipModel(SIGLIP),
        SiglipVisionModel(SIGLIP.vision_config),
        SiglipTextModel(SIGLIP.text_config),
        SiglipForImageClassification(SIGLIP),
    )
}

DECODER: dict[str, Any] = dict(
    **TEXTS, **SIZES, num_key_value_heads=2, head_dim=6, hidden_dropout=0.1, eos_token_id=31
)
# Between them: grouped queries, a window in every other layer, both norms around, caps, experts.
DECODERS = {
    "plain": CausalLM(DecoderConfig(**DECODER)),
    "many": CausalLM(
        DecoderConfig(
            **DECODER,
            model_type="gemma2",
            norm_order="both",
            norm_offset=1.0,
            sliding_window=3,
            layer_types=("sliding_attention", "full_attention"),
            attention_softcap=5.0,
            logits_softcap=3.0,
            scale_embeddings=True,
            qkv_bias=True,
            tie_word_embeddings=True,
        )
    ),
    "experts": CausalLM(
        DecoderConfig(
            **DECODER,
            model_type="qwen3_moe",
            qk_norm=True,
            experts=ExpertsConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=8),
        )
    ),
}


def random_params(model: Any, seed: int = 0, dtype: str = "float32") -> Any:
    """Every parameter random: kernels by their fan-in, scales around one, the rest around zero."""
    from mmjax.nn import parameter_specs
    from mmjax.parallel import ParamSpec

    rng = np.random.default_rng(seed)

    def fresh(path: Any, spec: ParamSpec) -> jax.Array:
        noise = rng.standard_normal(spec.shape)
        name = path[-1].key
        if name == "kernel":
            value = noise / np.prod(spec.shape[:-1]) ** 0.5
        else:
            value = 0.2 * noise + (name == "scale")
        return jax.numpy.asarray(value, dtype)

    specs = parameter_specs(model)
    assert not isinstance(specs, FrozenDict)
    return jax.tree.map_with_path(fresh, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def random_batch(model: Any, batch_size: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
    """Random inputs, texts of several lengths ending in the end-of-text id 31."""
    rng = np.random.default_rng(seed)
    batch = model.example_batch(batch_size)
    if "pixel_values" in batch:
        batch["pixel_values"] = rng.standard_normal(batch["pixel_values"].shape).astype(np.float32)
    if "bool_masked_pos" in batch:
        batch["bool_masked_pos"] = rng.random(batch["bool_masked_pos"].shape) < 0.5
    if "input_ids" in batch:
        ids = rng.integers(2, 31, batch["input_ids"].shape).astype(np.int32)
        mask = np.ones_like(ids)
        for row in range(batch_size):
            ids[row, 4 + row % 4 :] = 31
            mask[row, 5 + row % 4 :] = 0
        batch |= {"input_ids": ids, "attention_mask": mask}
    return batch
