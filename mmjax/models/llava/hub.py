"""LLaVA's hub configs: llava-hf's layout in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Any

from mmjax.errors import ConfigError
from mmjax.models.assemblies import Model
from mmjax.models.family import Family, family_of_type
from mmjax.models.hub_config import ConfigTable, build, short
from mmjax.models.llava.config import VIT_L_336, LlavaConfig
from mmjax.vision.config import VisionConfig

# model_type of the eyes to the architecture that is a tower alone.
EYES: Mapping[str, str] = MappingProxyType(
    {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel", "vit": "ViTModel"}
)
_SAME = (
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "image_grid_pinpoints",
    "vision_aspect_ratio",
    "eos_token_id",
    "pad_token_id",
)
TABLE = ConfigTable(
    fields={
        **{name: name for name in _SAME},
        "image_token_index": "image_token_id",
        "image_token_id": "image_token_id",
        "video_token_index": "video_token_id",
        "video_token_id": "video_token_id",
        "multimodal_projector_bias": "projector_bias",
        "mm_projector_type": "projector",
    },
    fixed={"use_image_newline_parameter": (True,)},
    ignored={
        "vision_config": "read as a section",
        "text_config": "read as a section",
        "image_seq_length": "counted from the eyes' patches",
        "ignore_index": "the losses' matter",
        "vocab_size": "the brain's section decides",
        "tie_word_embeddings": "read with the brain's section",
        "hidden_size": "the brain's section decides",
        "id2label": "classifiers only",
        "label2id": "classifiers only",
    },
)
_ONEVISION = tuple((h, w) for h in range(384, 2305, 384) for w in range(384, 2305, 384))
# What a config.json of each type leaves unsaid, where that differs from llava's.
DEFAULTS: Mapping[str, dict[str, Any]] = {
    "llava": {},
    "llava_next": {
        "image_grid_pinpoints": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    },
    "llava_onevision": {
        "image_token_id": 151646,
        "video_token_id": 151647,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": _ONEVISION,
        "vision_aspect_ratio": "anyres_max_9",
    },
}
_EYES_OF_ONEVISION: dict[str, Any] = dict(
    model_type="siglip_vision_model",
    hidden_size=1152,
    intermediate_size=4304,
    patch_size=14,
    image_size=384,
    num_hidden_layers=26,
    num_attention_heads=16,
    vision_use_head=False,
)
PROJECTORS = {"linear": "linear", "mlp2x_gelu": "mlp2x", "mlp2x": "mlp2x"}


def eyes_family(config: VisionConfig) -> tuple[Family, str, type[Model]]:
    """The family, the architecture and the model class of eyes, from their config.

    Raises:
        ConfigError: eyes of a family that no LLaVA folder can name.
    """
    for model_type, architecture in EYES.items():
        family = family_of_type(model_type, "vision_config")
        cls = family.architectures[architecture]
        if type(config) is _config_class(cls):
            return family, architecture, cls
    raise ConfigError(f"vision_config: a {type(config).__name__} is none of {', '.join(EYES)}")


def _config_class(cls: type[Model]) -> Any:
    import typing

    return typing.get_type_hints(cls)["config"]


def _section(hub: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    section = hub.get(name)
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"{where}: {name} should be an object, got {short(section)}")
    return dict(section or {})


def read_eyes(hub: Mapping[str, Any], model_type: str, names: Set[str], where: str) -> VisionConfig:
    """The eyes' config of a LLaVA config."""
    section, place = _section(hub, "vision_config", where), f"{where} vision_config"
    if not section:
        if model_type != "llava_onevision":
            return VIT_L_336
        section = dict(_EYES_OF_ONEVISION)
    default = "siglip_vision_model" if model_type == "llava_onevision" else "clip_vision_model"
    kind = section.setdefault("model_type", default)
    if kind not in EYES:
        raise ConfigError(f"{place}: model_type {short(kind)} is none of {', '.join(EYES)}")
    # Some folders have a text model's size among the eyes'.
    section.pop("vocab_size", None)
    below = {name.split("vision_tower.", 1)[1] for name in names if "vision_tower." in name}
    return family_of_type(kind, place).read_config(section, EYES[kind], below, place)


def read_config(hub: Mapping[str, Any], architecture: str, names: Set[str], where: str) -> LlavaConfig:
    """LlavaConfig from a llava-hf config."""
    model_type = hub["model_type"]
    if model_type not in DEFAULTS:
        raise ConfigError(
            f"{where}: model_type {short(model_type)} without mm_vision_tower; a folder of the original "
            "repository names the eyes there"
        )
    values = {**DEFAULTS[model_type], **TABLE.read(hub, where)}
    # Some configs write null where another's default is meant.
    for name in ("image_grid_pinpoints", "vision_aspect_ratio"):
        if values.get(name, 0) is None:
            values.pop(name)
            values |= {k: v for k, v in DEFAULTS[model_type].items() if k == name}
    if "projector" in values:
        kind = values["projector"]
        if kind not in PROJECTORS:
            raise ConfigError(f"{where}: mm_projector_type {short(kind)} is none of {', '.join(PROJECTORS)}")
        values["projector"] = PROJECTORS[kind]
    points = values.get("image_grid_pinpoints", ())
    if not isinstance(points, (list, tuple)) or not all(isinstance(p, (list, tuple)) for p in points):
        raise ConfigError(
            f"{where}: image_grid_pinpoints should be a list of [height, width], got {short(points)}"
        )
    values["image_grid_pinpoints"] = tuple(tuple(point) for point in points)
    if isinstance(values.get("vision_feature_layer"), list):
        values["vision_feature_layer"] = tuple(values["vision_feature_layer"])
    if model_type == "llava":
        values.pop("image_grid_pinpoints")
    default = "qwen2" if model_type == "llava_onevision" else "llama"
    section, place = _section(hub, "text_config", where), f"{where} text_config"
    kind = section.setdefault("model_type", default)
    tied = bool(hub.get("tie_word_embeddings", False))
    if model_type != "llava_next":
        tied = tied or bool(section.get("tie_word_embeddings", False))
    section["tie_word_embeddings"] = tied
    text = family_of_type(kind, place).read_config(section, "", frozenset(), place)
    published = any("vision_tower.vision_model." in name for name in names) or not names
    return build(
        LlavaConfig,
        {
            **values,
            "model_type": model_type,
            "vision_config": read_eyes(hub, model_type, names, where),
            "text_config": text,
            "layout": "published" if published else "bare",
            "hub": json.dumps(dict(hub)),
        },
        where,
    )


def write_config(config: LlavaConfig, architecture: str) -> dict[str, Any]:
    """llava-hf attributes of a LlavaConfig."""
    family, tower, _ = eyes_family(config.vision_config)
    brain = config.text_config
    layer = config.vision_feature_layer
    hub: dict[str, Any] = {
        "model_type": config.model_type,
        "image_token_index": config.image_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": list(layer) if isinstance(layer, tuple) else layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": brain.tie_word_embeddings,
        "vision_config": family.write_config(config.vision_config, tower),
        "text_config": family_of_type(brain.model_type, "text_config").write_config(brain, ""),
    }
    if config.projector != "mlp2x":
        hub["mm_projector_type"] = config.projector
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        if value is not None:
            hub[name] = list(value) if isinstance(value, tuple) else value
    if config.tiled:
        hub["image_grid_pinpoints"] = [list(point) for point in config.image_grid_pinpoints]
    if config.model_type == "llava_onevision":
        hub["vision_aspect_ratio"] = config.vision_aspect_ratio
        if config.video_token_id is not None:
            hub["video_token_index"] = config.video_token_id
    else:
        hub["image_seq_length"] = config.tile_rows
    return hub


__all__ = ["EYES", "eyes_family", "read_config", "write_config"]
