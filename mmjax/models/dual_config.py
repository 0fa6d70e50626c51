"""What the configs of dual encoders share: two sections, read and written through their tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import ConfigError
from mmjax.models.hub_config import ConfigTable, build, read_labels, write_labels
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
SECTIONS: Mapping[str, str] = {
    "vision_config": "read as a section",
    "text_config": "read as a section",
    "vision_config_dict": "read over its section",
    "text_config_dict": "read over its section",
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


@dataclasses.dataclass(frozen=True)
class DualTables:
    """A family's three config classes with their tables; makes both directions of `Family`.

    Attributes:
        model_type: of the joint model; its towers are <model_type>_vision_model and <model_type>_text_model.
        dual, vision, text: (config class, its table).
    """

    model_type: str
    dual: tuple[type, ConfigTable]
    vision: tuple[type, ConfigTable]
    text: tuple[type, ConfigTable]

    def read(self, hub: Mapping[str, Any], architecture: str, names: Set[str], where: str) -> Any:
        """The joint config, or one tower's for the tower architectures."""
        joint = hub["model_type"] == self.model_type
        for kind in ("vision", "text"):
            if kind.capitalize() in architecture:
                part = section(hub, f"{kind}_config", where) if joint else hub
                cls, table = getattr(self, kind)
                return build(cls, {**table.read(part, where), "hub": json.dumps(dict(part))}, where)
        towers = {}
        for kind in ("vision", "text"):
            (cls, table), name = getattr(self, kind), f"{kind}_config"
            place = f"{where} {name}"
            towers[name] = build(cls, table.read(section(hub, name, where), place), place)
        (cls, table), labels = self.dual, read_labels(hub, where)
        own = {"labels": labels, "num_labels": len(labels), "hub": json.dumps(dict(hub))}
        return build(cls, {**table.read(hub, where), **towers, **own}, where)

    def write(self, config: Any, architecture: str) -> dict[str, Any]:
        """Hub attributes of a joint or a tower's config."""
        towers = {}
        for kind in ("vision", "text"):
            cls, table = getattr(self, kind)
            tower = config if isinstance(config, cls) else getattr(config, f"{kind}_config", None)
            if tower is not None:
                towers[kind] = {**table.write(tower), "model_type": f"{self.model_type}_{kind}_model"}
        if not isinstance(config, self.dual[0]):
            return next(iter(towers.values()))
        hub = {**self.dual[1].write(config), "model_type": self.model_type}
        hub |= {f"{kind}_config": value for kind, value in towers.items()}
        return hub | (write_labels(getattr(config, "labels", ())) if "Classification" in architecture else {})
