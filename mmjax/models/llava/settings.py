"""What processor files say about the tokens of images, in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmjax.errors import ConfigError
from mmjax.models.llava.layout import ImageTokens
from mmjax.vision.processing import ImageProcessor
from mmjax.vision.sizes import Size
from mmjax.vision.tiles import TileImageProcessor

CLASSES = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}


def _tile(images: ImageProcessor, where: str) -> tuple[int, int]:
    if isinstance(images, TileImageProcessor):
        return images.tile
    for size in (images.crop_size if images.do_center_crop else None, images.size):
        if isinstance(size, Size) and size.height and size.width:
            return size.height, size.width
    raise ConfigError(f"{where}: images of one size need a crop_size, or a size of height and width")


def read_image_tokens(
    kind: str, images: ImageProcessor, settings: Mapping[str, Any], model: Mapping[str, Any], where: str
) -> ImageTokens:
    """How many tokens images have, from a folder's files.

    Args:
        kind: model_type.
        images: the folder's image processor.
        settings: contents of processor_config.json.
        model: contents of config.json, for what the first leaves unsaid, as early folders do.
        where: the folder, for messages.
    """
    tile = _tile(images, where)
    eyes = model.get("vision_config") if isinstance(model.get("vision_config"), Mapping) else {}
    strategy = settings.get("vision_feature_select_strategy") or model.get("vision_feature_select_strategy")
    dropped = int((strategy or ("full" if kind == "llava_onevision" else "default")) == "default")
    has_cls = "siglip" not in str(eyes.get("model_type", "clip"))  # type: ignore[union-attr]
    if kind == "llava_onevision" and settings.get("num_image_tokens"):
        count = _whole(settings, "num_image_tokens", where)
        side = math.isqrt(count)
        patches, extra = (side, side), count - side * side
    else:
        known = settings if settings.get("patch_size") else eyes
        patch = _whole(known or {"patch_size": 14}, "patch_size", where)
        patches = (tile[0] // patch, tile[1] // patch)
        named: Any = settings.get("num_additional_image_tokens")
        # Early folders count on the CLS token without naming it.
        extra = int(dropped and has_cls) if named is None or "patch_size" not in settings else named
        if isinstance(extra, bool) or not isinstance(extra, int):
            raise ConfigError(f"{where}: num_additional_image_tokens should be a number, got {extra!r}")
    most = None
    if kind == "llava_onevision":
        ratio = settings.get("vision_aspect_ratio") or model.get("vision_aspect_ratio") or "anyres_max_9"
        if not isinstance(ratio, str) or not ratio.removeprefix("anyres_max_").isdigit():
            raise ConfigError(f"{where}: vision_aspect_ratio {ratio!r} is not 'anyres_max_n'")
        most = int(ratio.removeprefix("anyres_max_"))
    points = images.image_grid_pinpoints if isinstance(images, TileImageProcessor) else ()
    return ImageTokens(
        kind=kind,
        tile=tile,
        patches=patches,
        rows=patches[0] * patches[1] + extra - dropped,
        pinpoints=tuple((int(h), int(w)) for h, w in points),
        most_tiles=most,
    )


def _whole(settings: Mapping[str, Any], name: str, where: str) -> int:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {name} should be a whole number above 0, got {value!r}")
    return value


def written_settings(tokens: ImageTokens, image_token: str, video_token: str | None) -> dict[str, Any]:
    """Contents of a processor_config.json that say the same, without those of the image processor."""
    settings: dict[str, Any] = {"processor_class": CLASSES[tokens.kind], "image_token": image_token}
    if tokens.kind == "llava_onevision":
        return settings | {
            "num_image_tokens": tokens.rows,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": f"anyres_max_{tokens.most_tiles}",
            "video_token": video_token or "<video>",
        }
    # Only the difference counts: a CLS token that is left out, or none of both.
    extra = tokens.rows - tokens.patches[0] * tokens.patches[1] + 1
    return settings | {
        "patch_size": tokens.tile[0] // tokens.patches[0],
        "num_additional_image_tokens": extra,
        "vision_feature_select_strategy": "default",
    }


__all__ = ["CLASSES", "read_image_tokens", "written_settings"]
