"""What the configs of dual encoders share: two sections, read and written through their tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import ConfigError
from mmjax.models.hub_config import ConfigTable, build, read_labels, short, write_labels
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


def section(hub: Mapping[str, Any], name: str, where: str, table: ConfigTable) -> dict[str, Any]:
    """A section such as vision_config.

    Folders of 2022 may hold the same section as `<name>_dict` too. As in transformers, it then decides about
    every field: those it leaves out have their defaults, whatever the section says.

    Raises:
        ConfigError: the section is not an object.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for key in (name, f"{name}_dict"):
        value = hub.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} should be an object, got {short(value)}")
        found[key] = None if value is None else dict(value)
    plain, decisive = found[name] or {}, found[f"{name}_dict"]
    if decisive is None:
        return plain
    return {**{k: v for k, v in plain.items() if k not in table.fields}, **decisive}


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
                cls, table = getattr(self, kind)
                part = section(hub, f"{kind}_config", where, table) if joint else hub
                return build(cls, {**table.read(part, where), "hub": json.dumps(dict(part))}, where)
        (cls, table), labels = self.dual, read_labels(hub, where)
        values = {**table.read(hub, where), "labels": labels, "num_labels": len(labels)}
        # What is written back later has each section once.
        kept = {name: value for name, value in hub.items() if not name.endswith("_config_dict")}
        for kind in ("vision", "text"):
            (tower, tower_table), name = getattr(self, kind), f"{kind}_config"
            kept[name], place = section(hub, name, where, tower_table), f"{where} {name}"
            values[name] = build(tower, tower_table.read(kept[name], place), place)
        return build(cls, {**values, "hub": json.dumps(kept)}, where)

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
