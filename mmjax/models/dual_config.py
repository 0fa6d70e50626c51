"""What the configs of dual encoders share: two sections, read and written through their tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mmjax.errors import ConfigError
from mmjax.models.hub_config import ConfigTable, build, merge, read_labels
from mmjax.models.labels import check_labels

TEXT_FIELDS: Mapping[str, str] = {
    name: name
    for name in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "attention_dropout",
        "eos_token_id",
    ]
}
VISION_FIELDS: Mapping[str, str] = {
    name: name
    for name in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "image_size",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
        "attention_dropout",
    ]
}
LABELS: Mapping[str, str] = {
    "id2label": "read as labels where there is a classifier",
    "label2id": "the inverse of id2label",
    "num_labels": "read as labels where there is a classifier",
    "num_choices": "multiple choice only",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualConfig:
    """Fields that both CLIP and SigLIP have besides their towers.

    Attributes:
        projection_dim: E; None where the towers' outputs are the embeddings.
        logit_scale_init_value: initial logarithm of the multiplier.
        logit_bias_init_value: initial bias of the similarities, or None for no bias.
        initializer_factor: multiplies the standard deviations of fresh projections.
        num_labels, labels: of the image classifier.
        hub: the config.json that was read, for what changes nothing here but is written back.
    """

    projection_dim: int | None = None
    logit_scale_init_value: float = 2.6592
    logit_bias_init_value: float | None = None
    initializer_factor: float = 1.0
    num_labels: int = 2
    labels: tuple[str, ...] | None = None
    hub: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_labels(self)


def section(hub: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """A section such as vision_config; values of `<name>_dict`, where there is one, go before it.

    Raises:
        ConfigError: the section is not an object.
    """
    merged: dict[str, Any] = {}
    for key in (name, f"{name}_dict"):
        value = hub.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} should be an object, got {value!r}")
        merged.update(value or {})
    return merged


def read_sections(
    hub: Mapping[str, Any],
    where: str,
    *,
    dual: tuple[type, ConfigTable],
    vision: tuple[type, ConfigTable],
    text: tuple[type, ConfigTable],
) -> Any:
    """A dual encoder's config from its hub config."""
    cls, table = dual
    towers = {}
    for name, (tower_cls, tower_table) in (("vision_config", vision), ("text_config", text)):
        part = f"{where} {name}"
        towers[name] = build(tower_cls, tower_table.read(section(hub, name, where), part), part)
    labels = read_labels(hub, where)
    values = table.read(hub, where)
    return build(
        cls,
        {**values, **towers, "labels": labels, "num_labels": len(labels), "hub": json.dumps(dict(hub))},
        where,
    )


def write_section(config: Any, table: ConfigTable, model_type: str) -> dict[str, Any]:
    """A tower's section, with what was read and changes nothing."""
    return merge(config.hub, {**table.write(config), "model_type": model_type})
