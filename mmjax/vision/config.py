"""The configuration of the one vision transformer."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mmjax.errors import ConfigError
from mmjax.nn import TransformerConfig
from mmjax.nn.config import check_positive

Pooling = Literal["none", "cls", "tanh", "map"]


def pair(value: int | tuple[int, int] | list[int], name: str) -> tuple[int, int]:
    """(height, width) from one number or two.

    >>> pair(224, "image_size"), pair([224, 336], "image_size")
    ((224, 224), (224, 336))
    """
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
    if len(numbers) != 2 or not whole:
        raise ConfigError(f"{name}: expected a positive integer or a (height, width) pair, got {value!r}")
    return numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(TransformerConfig):
    """A vision transformer over patches.

    Attributes:
        image_size: (height, width) in pixels that the position table is made for; one number means a square.
        patch_size: (height, width) in pixels, likewise. A remainder of the image is dropped.
        num_channels: C.
        patch_bias: whether the patch projection has a bias.
        class_token: whether a learned CLS token comes first.
        mask_token: whether a learned token can replace masked patches.
        pre_norm: a layer norm between embeddings and layers (CLIP).
        post_norm: where the final norm acts: on the whole sequence, or on the pooled token alone (CLIP).
        pooling: "cls": the CLS token; "tanh": a dense layer and `pooler_act` on it; "map": attention with a
            learned query (SigLIP); "none".
        pooler_act, pooler_size: activation and width of the "tanh" pooling; None means hidden_size.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    patch_bias: bool = True
    class_token: bool = True
    mask_token: bool = False
    pre_norm: bool = False
    post_norm: Literal["sequence", "pooled"] = "sequence"
    pooling: Pooling = "none"
    pooler_act: str = "tanh"
    pooler_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "image_size", pair(self.image_size, "image_size"))
        object.__setattr__(self, "patch_size", pair(self.patch_size, "patch_size"))
        check_positive(self, "num_channels")
        if 0 in self.grid:
            raise ConfigError(f"image_size: {self.image_size} is smaller than one patch of {self.patch_size}")
        if self.pooling in ("cls", "tanh") and not self.class_token:
            raise ConfigError(f"pooling: {self.pooling!r} needs class_token=True")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of `image_size`."""
        return self.grid_of(*pair(self.image_size, "image_size"))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of height x width pixels."""
        patch = pair(self.patch_size, "patch_size")
        return height // patch[0], width // patch[1]

    @property
    def num_patches(self) -> int:
        """P for an image of `image_size`."""
        return self.grid[0] * self.grid[1]
