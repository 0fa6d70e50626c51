"""ViT's configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import ConfigError
from mmjax.models.hub_config import ConfigTable, build, read_labels, write_labels
from mmjax.models.labels import check_labels
from mmjax.nn import ACTIVATIONS
from mmjax.nn.config import check_positive
from mmjax.vision.config import Pooling, VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(VisionConfig):
    """A ViT with transformers' defaults (Dosovitskiy et al. 2021, ViT-B/16).

    Attributes:
        num_labels: classes of ViTForImageClassification.
        labels: their names in order; None means LABEL_0, LABEL_1, ...
        encoder_stride: pixels per patch side that ViTForMaskedImageModeling paints.
        hub: the config.json that was read, for attributes that change nothing here but are written back.
    """

    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    pooling: Pooling = "tanh"
    num_labels: int = 2
    labels: tuple[str, ...] | None = None
    encoder_stride: int = 16
    hub: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self)
        check_positive(self, "encoder_stride")
        if self.pooler_size is not None:
            check_positive(self, "pooler_size")
        if self.pooler_act not in ACTIVATIONS:
            raise ConfigError(
                f"pooler_act: unknown activation {self.pooler_act!r}; known: {', '.join(ACTIVATIONS)}"
            )

    @property
    def vision_config(self) -> ViTConfig:
        """The tower's config below a head: this one without the pooler, which no head reads."""
        return dataclasses.replace(self, pooling="none")


TABLE = ConfigTable(
    fields={
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "hidden_act": "hidden_act",
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "initializer_range",
        "layer_norm_eps": "layer_norm_eps",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "num_channels": "num_channels",
        "qkv_bias": "qkv_bias",
        "encoder_stride": "encoder_stride",
        "pooler_output_size": "pooler_size",
        "pooler_act": "pooler_act",
    },
    ignored={
        "id2label": "read as labels",
        "label2id": "the inverse of id2label",
        "num_labels": "read as labels",
    },
)


def read_config(hub: Mapping[str, Any], architecture: str, names: Set[str], where: str) -> ViTConfig:
    """ViTConfig from a hub config; the pooler exists if the folder has its weights."""
    labels = read_labels(hub, where)
    values = TABLE.read(hub, where)
    has_pooler = architecture == "ViTModel" and any(name.endswith("pooler.dense.weight") for name in names)
    config = build(
        ViTConfig,
        {
            **values,
            "labels": labels,
            "num_labels": len(labels),
            "pooling": "tanh" if has_pooler else "none",
            "mask_token": any(name.endswith("embeddings.mask_token") for name in names),
            "hub": json.dumps(dict(hub)),
        },
        where,
    )
    same = config.pooler_size == config.hidden_size
    return dataclasses.replace(config, pooler_size=None) if same else config


def write_config(config: ViTConfig, architecture: str) -> dict[str, Any]:
    """Hub attributes of a ViTConfig."""
    hub = {**TABLE.write(config), "model_type": "vit"}
    hub["pooler_output_size"] = config.pooler_size or config.hidden_size
    if architecture == "ViTForImageClassification":
        hub |= write_labels(config.labels or ())
    return hub
