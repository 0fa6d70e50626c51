"""CLIP's configuration."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mmjax.language.config import TextConfig
from mmjax.models.dual_config import LABELS, SECTIONS, TEXT_FIELDS, VISION_FIELDS, DualConfig, DualTables
from mmjax.models.hub_config import ConfigTable
from mmjax.nn.config import check_positive
from mmjax.vision.config import Pooling, VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(VisionConfig):
    """CLIP's image tower with transformers' defaults (ViT-B/32).

    Attributes:
        projection_dim: E of CLIPVisionModelWithProjection.
        hub: the config.json that was read.
    """

    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    patch_size: int | tuple[int, int] = 32
    patch_bias: bool = False
    pre_norm: bool = True
    post_norm: Literal["sequence", "pooled"] = "pooled"
    pooling: Pooling = "cls"
    initializer: Literal["normal", "clip", "xavier"] = "clip"
    projection_dim: int = 512
    hub: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "projection_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(TextConfig):
    """CLIP's text tower with transformers' defaults.

    Attributes:
        projection_dim: E of CLIPTextModelWithProjection.
        hub: the config.json that was read.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    causal: bool = True
    pooling: Literal["eos", "last"] = "eos"
    eos_token_id: int = 49407
    initializer: Literal["normal", "clip", "xavier"] = "clip"
    projection_dim: int = 512
    hub: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "projection_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(DualConfig):
    """CLIP: two towers and projections to E = projection_dim.

    >>> CLIPConfig().projection_dim
    512
    """

    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    text_config: CLIPTextConfig = CLIPTextConfig()
    projection_dim: int | None = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "projection_dim")


_INIT = {"initializer_range": "initializer_range", "initializer_factor": "initializer_factor"}
_TOWER_IGNORED = {**LABELS, "dropout": "never read by the reference either"}
VISION = ConfigTable(
    fields={**VISION_FIELDS, **_INIT, "projection_dim": "projection_dim"}, ignored=_TOWER_IGNORED
)
TEXT = ConfigTable(
    fields={**TEXT_FIELDS, **_INIT, "projection_dim": "projection_dim"}, ignored=_TOWER_IGNORED
)
DUAL = ConfigTable(
    fields={
        "projection_dim": "projection_dim",
        "logit_scale_init_value": "logit_scale_init_value",
        "initializer_factor": "initializer_factor",
    },
    ignored={
        **LABELS,
        **SECTIONS,
        "vision_config_dict": "read with its section",
        "text_config_dict": "read with its section",
    },
)


TABLES = DualTables(
    "clip",
    dual=(CLIPConfig, DUAL),
    vision=(CLIPVisionConfig, VISION),
    text=(CLIPTextConfig, TEXT),
)
