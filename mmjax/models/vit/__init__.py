"""ViT (Dosovitskiy et al. 2021)."""

from mmjax.models.family import Family
from mmjax.models.vit.config import ViTConfig, read_config, write_config
from mmjax.models.vit.model import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
from mmjax.models.vit.rules import rules

FAMILY = Family(
    architectures={
        cls.__name__: cls for cls in (ViTModel, ViTForImageClassification, ViTForMaskedImageModeling)
    },
    read_config=read_config,
    write_config=write_config,
    rules=rules,
)

__all__ = ["FAMILY", "ViTConfig", "ViTForImageClassification", "ViTForMaskedImageModeling", "ViTModel"]
