"""SigLIP's models: configurations of the shared assemblies."""

from __future__ import annotations

from mmjax.models.assemblies import ImageClassifier, TextModel, VisionModel
from mmjax.models.dual_encoder import DualEncoder
from mmjax.models.siglip.config import SiglipConfig, SiglipTextConfig, SiglipVisionConfig


class SiglipModel(DualEncoder):
    """SigLIP (Zhai et al. 2023).

    >>> import jax
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    >>> config = SiglipConfig(
    ...     vision_config=SiglipVisionConfig(image_size=8, patch_size=4, **sizes),
    ...     text_config=SiglipTextConfig(vocab_size=20, max_position_embeddings=6, **sizes),
    ... )
    >>> model = SiglipModel(config)
    >>> batch = model.example_batch(3)
    >>> params = model.init(jax.random.key(0), **batch)["params"]
    >>> model.apply({"params": params}, **batch).logits_per_text.shape
    (3, 3)
    """

    config: SiglipConfig
    model_type = "siglip"


class SiglipVisionModel(VisionModel):
    """SigLIP's image tower; pooler_output by attention pooling."""

    config: SiglipVisionConfig
    model_type = "siglip_vision_model"


class SiglipTextModel(TextModel):
    """SigLIP's text tower; pooler_output is the head's output at the last position."""

    config: SiglipTextConfig
    model_type = "siglip_text_model"


class SiglipForImageClassification(ImageClassifier):
    """A linear classifier on the mean of SigLIP's patch tokens after the final norm."""

    config: SiglipConfig
    head_pooling = "mean"
    model_type = "siglip"
