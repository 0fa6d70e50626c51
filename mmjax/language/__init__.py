"""Brains and text encoders, tokenizers."""

from mmjax.language.config import TextConfig
from mmjax.language.text_encoder import TextOutput, TextTransformer

__all__ = ["TextConfig", "TextOutput", "TextTransformer"]
