"""CLIP's models: configurations of the shared assemblies."""

from __future__ import annotations

from mmjax.models.assemblies import (
    ImageClassifier,
    ProjectedTextModel,
    ProjectedVisionModel,
    TextModel,
    VisionModel,
)
from mmjax.models.clip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from mmjax.models.dual_encoder import DualEncoder


class CLIPModel(DualEncoder):
    """CLIP (Radford et al. 2021).

    >>> import jax
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    >>> config = CLIPConfig(
    ...     vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **sizes),
    ...     text_config=CLIPTextConfig(vocab_size=20, max_position_embeddings=6, eos_token_id=19, **sizes),
    ...     projection_dim=4,
    ... )
    >>> model = CLIPModel(config)
    >>> batch = model.example_batch(3)
    >>> params = model.init(jax.random.key(0), **batch)["params"]
    >>> model.apply({"params": params}, **batch).logits_per_image.shape
    (3, 3)
    >>> model.apply({"params": params}, batch["pixel_values"], method="encode_image").shape
    (3, 4)
    """

    config: CLIPConfig
    model_type = "clip"


class CLIPVisionModel(VisionModel):
    """CLIP's image tower; pooler_output is the CLS token after the final norm."""

    config: CLIPVisionConfig
    model_type = "clip_vision_model"


class CLIPTextModel(TextModel):
    """CLIP's text tower; pooler_output is the end-of-text token after the final norm."""

    config: CLIPTextConfig
    model_type = "clip_text_model"


class CLIPVisionModelWithProjection(ProjectedVisionModel):
    """CLIP's image tower and projection."""

    config: CLIPVisionConfig
    model_type = "clip_vision_model"


class CLIPTextModelWithProjection(ProjectedTextModel):
    """CLIP's text tower and projection."""

    config: CLIPTextConfig
    model_type = "clip_text_model"


class CLIPForImageClassification(ImageClassifier):
    """A linear classifier on the mean of CLIP's patch tokens before the final norm."""

    config: CLIPConfig
    head_pooling = "mean"
    model_type = "clip"
