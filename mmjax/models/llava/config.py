"""LLaVA's configuration: eyes, bridge and brain, and how images become tokens."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from mmjax.connectors import PROJECTORS
from mmjax.errors import ConfigError
from mmjax.language.config import DecoderConfig
from mmjax.models.clip.config import CLIPVisionConfig
from mmjax.nn import activation
from mmjax.nn.config import check_int
from mmjax.vision.config import VisionConfig, pair

ModelType = Literal["llava", "llava_next", "llava_onevision"]
VIT_L_336 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
    image_size=336,
    projection_dim=768,
)
_MOST = re.compile(r"anyres_max_(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """LLaVA 1.0, 1.5, NeXT and OneVision.

    Attributes:
        model_type: "llava": an image is one tile (1.0, 1.5). "llava_next": it is cut into tiles.
            "llava_onevision": features of many tiles are interpolated too, several images are one tile each,
            and there are videos.
        vision_config: the eyes; any vision transformer of the library.
        text_config: the brain; any decoder of the library.
        image_token_id, video_token_id: the ids that stand for one row of features.
        projector: kind of the bridge, "linear" (1.0) or "mlp2x".
        projector_hidden_act, projector_bias: its activation, and whether it has biases.
        vision_feature_layer: which layer's output is seen, counted as hidden states are (-2: that of the last
            layer but one); several are joined.
        vision_feature_select_strategy: "default" leaves out the first feature (CLS), "full" does not.
        image_grid_pinpoints: (height, width) of the resolutions that images are fitted into.
        vision_aspect_ratio: "anyres_max_n": more features than n tiles have are scaled down to so many.
        eos_token_id, pad_token_id: where the whole model's differ from the brain's.
        layout: names of the eyes' tensors in the folder: below "vision_tower.vision_model." as published, or
            "bare", below "vision_tower.".
        hub: the config.json that was read, for what changes nothing here but is written back.

    >>> LlavaConfig().tile_rows
    576
    """

    model_type: ModelType = "llava"
    vision_config: VisionConfig = VIT_L_336
    text_config: DecoderConfig = DecoderConfig(vocab_size=32064)
    image_token_id: int = 32000
    video_token_id: int | None = None
    projector: str = "mlp2x"
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True
    vision_feature_layer: int | tuple[int, ...] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    vision_aspect_ratio: str = "anyres"
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    layout: Literal["published", "bare"] = dataclasses.field(default="published", compare=False)
    hub: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.model_type not in ("llava", "llava_next", "llava_onevision"):
            raise ConfigError(f"model_type: {self.model_type!r} is not llava, llava_next or llava_onevision")
        if self.projector not in PROJECTORS:
            raise ConfigError(f"projector: unknown kind {self.projector!r}; known: {', '.join(PROJECTORS)}")
        activation(self.projector_hidden_act)
        check_int(self, "image_token_id", least=0)
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ConfigError(
                "vision_feature_select_strategy: "
                f"{self.vision_feature_select_strategy!r} is neither 'default' nor 'full'"
            )
        depth = self.vision_config.num_hidden_layers
        if not self.feature_layers:
            raise ConfigError("vision_feature_layer: name at least one layer")
        for layer in self.feature_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
                raise ConfigError(
                    f"vision_feature_layer: {layer!r} is none of the {depth + 1} hidden states of the eyes"
                )
        if self.tile_rows < 1:
            raise ConfigError("vision_feature_select_strategy: 'default' leaves nothing of one patch")
        if self.tiled:
            self._check_tiles()

    def _check_tiles(self) -> None:
        pinpoints = tuple(pair(list(p), "image_grid_pinpoints") for p in self.image_grid_pinpoints)
        object.__setattr__(self, "image_grid_pinpoints", pinpoints)
        if not pinpoints:
            raise ConfigError("image_grid_pinpoints: a model that cuts images into tiles needs at least one")
        height, width = self.tile
        for point in pinpoints:
            if point[0] % height or point[1] % width:
                raise ConfigError(
                    f"image_grid_pinpoints: {point} is not a multiple of image_size {self.tile}"
                )
        if self.tile_rows != self.patches[0] * self.patches[1]:
            raise ConfigError(
                f"vision_feature_select_strategy: with {self.vision_feature_select_strategy!r} a tile has "
                f"{self.tile_rows} features, but its grid has {self.patches[0]} x {self.patches[1]}; use "
                "'default' for eyes with a CLS token, else 'full'"
            )
        if self.model_type == "llava_onevision" and self.most_tiles is None:
            raise ConfigError(f"vision_aspect_ratio: {self.vision_aspect_ratio!r} is not 'anyres_max_n'")

    @property
    def tiled(self) -> bool:
        """Whether images are cut into tiles, so that there is an embedding that ends rows."""
        return self.model_type != "llava"

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The layers that are seen."""
        layers = self.vision_feature_layer
        return layers if isinstance(layers, tuple) else (layers,)

    @property
    def tile(self) -> tuple[int, int]:
        """(height, width) of a tile in pixels."""
        return pair(self.vision_config.image_size, "image_size")

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of a tile's patches."""
        return self.vision_config.grid

    @property
    def tile_rows(self) -> int:
        """P, how many features a tile has."""
        dropped = self.vision_feature_select_strategy == "default"
        return self.vision_config.num_patches + int(self.vision_config.class_token) - int(dropped)

    @property
    def tiles_per_image(self) -> int:
        """The most tiles that an image is cut into, the whole one included."""
        height, width = self.tile
        cells = [rows * columns // (height * width) for rows, columns in self.image_grid_pinpoints]
        return 1 + max(cells) if self.tiled else 1

    @property
    def most_tiles(self) -> int | None:
        """How many tiles' features a picture may have before they are scaled down; None: any number."""
        found = _MOST.fullmatch(self.vision_aspect_ratio)
        return int(found.group(1)) if found and self.model_type == "llava_onevision" else None

    @property
    def index_width(self) -> int:
        """K, how many rows are added up for a token."""
        return 4 if self.model_type == "llava_onevision" else 1


__all__ = ["LlavaConfig"]
