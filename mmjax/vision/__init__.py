"""Eyes: one vision transformer that the families configure, and image processing."""

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax.vision.config import VisionConfig
    from mmjax.vision.images import ImageError, open_image
    from mmjax.vision.processing import ImageProcessor
    from mmjax.vision.transformer import VisionOutput, VisionTransformer

_HOMES = {
    "config": ("VisionConfig",),
    "images": ("ImageError", "open_image"),
    "processing": ("ImageProcessor",),
    "transformer": ("VisionOutput", "VisionTransformer"),
}
__getattr__, __dir__ = attach(__name__, _HOMES)

__all__ = ["ImageError", "ImageProcessor", "VisionConfig", "VisionOutput", "VisionTransformer", "open_image"]
