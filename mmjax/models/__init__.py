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
_FAMILIES = {"CLIP": "clip", "Causal": "causal_lm", "Siglip": "siglip", "ViT": "vit"}
_HOMES = {
    home: tuple(name for name in __all__ if name.startswith(prefix)) for prefix, home in _FAMILIES.items()
}
__getattr__, __dir__ = attach(__name__, {**_HOMES, "processor": ("Processor",)})
