"""SigLIP's configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from mmjax.errors import ConfigError
from mmjax.language.config import TextConfig
from mmjax.models.dual_config import LABELS, SECTIONS, TEXT_FIELDS, VISION_FIELDS, DualConfig, DualTables
from mmjax.models.hub_config import ConfigTable
from mmjax.vision.config import Pooling, VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig(VisionConfig):
    """SigLIP's image tower with transformers' defaults (B/16).

    Attributes:
        hub: the config.json that was read.
    """

    hidden_act: str = "gelu_pytorch_tanh"
    class_token: bool = False
    pooling: Pooling = "map"
    initializer: Literal["normal", "clip", "xavier"] = "xavier"
    hub: str = dataclasses.field(default="{}", compare=False, repr=False)

    @property
    def vision_use_head(self) -> bool:
        """Whether features are pooled, under the hub's name."""
        return self.pooling == "map"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipTextConfig(TextConfig):
    """SigLIP's text tower with transformers' defaults.

    Attributes:
        projection_size: width of the head; None means hidden_size.
        hub: the config.json that was read.
    """

    hidden_act: str = "gelu_pytorch_tanh"
    initializer: Literal["normal", "clip", "xavier"] = "xavier"
    hub: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.projection_size is None:
            object.__setattr__(self, "projection_size", self.hidden_size)
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig(DualConfig):
    """SigLIP: two towers whose outputs are the embeddings, a scale and a bias.

    The initial scale and bias are the paper's (log 10 and -10), not zero as in transformers.

    >>> SiglipConfig().logit_bias_init_value
    -10.0
    """

    vision_config: SiglipVisionConfig = SiglipVisionConfig()
    text_config: SiglipTextConfig = SiglipTextConfig()
    logit_scale_init_value: float = math.log(10.0)
    logit_bias_init_value: float | None = -10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_config.projection_size != self.vision_config.hidden_size:
            raise ConfigError(
                f"projection_size: the text tower gives {self.text_config.projection_size} features, "
                f"the image tower {self.vision_config.hidden_size}; they must agree"
            )


class _VisionTable(ConfigTable):
    """vision_use_head chooses the pooling."""

    def read(self, hub: Mapping[str, Any], where: str) -> dict[str, Any]:
        values = super().read(hub, where)
        use_head = values.pop("vision_use_head", True)
        if not isinstance(use_head, bool):
            raise ConfigError(f"{where}: vision_use_head should be true or false, got {use_head!r}")
        return {**values, "pooling": "map" if use_head else "none"}


_IGNORED = {**LABELS, "initializer_range": "never read by the reference either"}
VISION = _VisionTable(fields={**VISION_FIELDS, "vision_use_head": "vision_use_head"}, ignored=_IGNORED)
TEXT = ConfigTable(
    fields={
        **{k: v for k, v in TEXT_FIELDS.items() if k != "eos_token_id"},
        "projection_size": "projection_size",
    },
    ignored=_IGNORED,
)
DUAL = ConfigTable(
    fields={"initializer_factor": "initializer_factor"},
    ignored={
        **_IGNORED,
        **SECTIONS,
    },
)


TABLES = DualTables(
    "siglip",
    dual=(SiglipConfig, DUAL),
    vision=(SiglipVisionConfig, VISION),
    text=(SiglipTextConfig, TEXT),
)
