"""SigLIP (Zhai et al. 2023)."""

from mmjax.models.family import Family
from mmjax.models.siglip.config import (
    TABLES,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)
from mmjax.models.siglip.model import (
    SiglipForImageClassification,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
)
from mmjax.models.siglip.rules import rules

FAMILY = Family(
    architectures={
        cls.__name__: cls
        for cls in (SiglipModel, SiglipVisionModel, SiglipTextModel, SiglipForImageClassification)
    },
    read_config=TABLES.read,
    write_config=TABLES.write,
    rules=rules,
)

__all__ = [
    "FAMILY",
    "SiglipConfig",
    "SiglipForImageClassification",
    "SiglipModel",
    "SiglipTextConfig",
    "SiglipTextModel",
    "SiglipVisionConfig",
    "SiglipVisionModel",
]
