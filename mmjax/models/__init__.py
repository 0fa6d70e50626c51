"""The published systems: per family its config, its assembly, its checkpoint keys."""

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax.models.causal_lm import CausalLM, CausalLMOutput
    from mmjax.models.clip import (
        CLIPConfig,
        CLIPForImageClassification,
        CLIPModel,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
    )
    from mmjax.models.llava import ImageTokens, Llava, LlavaConfig, LlavaOutput, LlavaProcessor
    from mmjax.models.processor import Processor
    from mmjax.models.siglip import (
        SiglipConfig,
        SiglipForImageClassification,
        SiglipModel,
        SiglipTextConfig,
        SiglipTextModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )
    from mmjax.models.vit import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

__all__ = [
    "CLIPConfig",
    "CLIPForImageClassification",
    "CLIPModel",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionConfig",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CausalLM",
    "CausalLMOutput",
    "ImageTokens",
    "Llava",
    "LlavaConfig",
    "LlavaOutput",
    "LlavaProcessor",
    "Processor",
    "SiglipConfig",
    "SiglipForImageClassification",
    "SiglipModel",
    "SiglipTextConfig",
    "SiglipTextModel",
    "SiglipVisionConfig",
    "SiglipVisionModel",
    "ViTConfig",
    "ViTForImageClassification",
    "ViTForMaskedImageModeling",
    "ViTModel",
]
_FAMILIES = {
    "CLIP": "clip",
    "Causal": "causal_lm",
    "Llava": "llava",
    "ImageTokens": "llava",
    "Siglip": "siglip",
    "ViT": "vit",
}
_HOMES = {
    home: tuple(
        name for name in __all__ if any(p for p, h in _FAMILIES.items() if h == home and name.startswith(p))
    )
    for home in _FAMILIES.values()
}
__getattr__, __dir__ = attach(__name__, {**_HOMES, "processor": ("Processor",)})
