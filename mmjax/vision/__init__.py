"""Eyes: one vision transformer that the families configure, and image processing."""

from mmjax.vision.config import VisionConfig
from mmjax.vision.transformer import VisionOutput, VisionTransformer

__all__ = ["VisionConfig", "VisionOutput", "VisionTransformer"]
