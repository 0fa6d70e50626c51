"""The configuration of the text encoders."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mmjax.nn import TransformerConfig
from mmjax.nn.config import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
    """A text transformer with learned positions.

    Attributes:
        vocab_size: V.
        max_position_embeddings: longest sequence.
        causal: whether a token sees only those before it.
        pooling: "eos": the token at the end-of-text id; "last": the last position, padding or not.
        eos_token_id: the end-of-text id. The value 2 stands for "the largest id of the row", as in configs
            written before the field was right.
        projection_size: width of a linear layer with bias on the pooled token, or None for no such layer.
    """

    vocab_size: int = 32000
    max_position_embeddings: int = 64
    causal: bool = False
    pooling: Literal["eos", "last"] = "last"
    eos_token_id: int = 1
    projection_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "vocab_size", "max_position_embeddings")
        if self.projection_size is not None:
            check_positive(self, "projection_size")
