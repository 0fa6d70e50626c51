"""CLIP (Radford et al. 2021)."""

from mmjax.models.clip.config import TABLES, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from mmjax.models.clip.model import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from mmjax.models.clip.rules import rules
from mmjax.models.family import Family

FAMILY = Family(
    architectures={
        cls.__name__: cls
        for cls in (
            CLIPModel,
            CLIPVisionModel,
            CLIPTextModel,
            CLIPVisionModelWithProjection,
            CLIPTextModelWithProjection,
            CLIPForImageClassification,
        )
    },
    read_config=TABLES.read,
    write_config=TABLES.write,
    rules=rules,
)

__all__ = [
    "FAMILY",
    "CLIPConfig",
    "CLIPForImageClassification",
    "CLIPModel",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionConfig",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
]
