"""Brains and text encoders, tokenizers."""

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax.language.chat_formats import CHAT_FORMATS, chat_format
    from mmjax.language.config import DecoderConfig, ExpertsConfig, TextConfig
    from mmjax.language.decoder import Decoder, DecoderOutput
    from mmjax.language.learned import train_bpe_tokenizer
    from mmjax.language.text_encoder import TextOutput, TextTransformer
    from mmjax.language.tokenizer import Tokenizer, train_clip_tokenizer

_HOMES = {
    "chat_formats": ("CHAT_FORMATS", "chat_format"),
    "config": ("DecoderConfig", "ExpertsConfig", "TextConfig"),
    "decoder": ("Decoder", "DecoderOutput"),
    "learned": ("train_bpe_tokenizer",),
    "text_encoder": ("TextOutput", "TextTransformer"),
    "tokenizer": ("Tokenizer", "train_clip_tokenizer"),
}
__getattr__, __dir__ = attach(__name__, _HOMES)

__all__ = [
    "CHAT_FORMATS",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "ExpertsConfig",
    "TextConfig",
    "TextOutput",
    "TextTransformer",
    "Tokenizer",
    "chat_format",
    "train_bpe_tokenizer",
    "train_clip_tokenizer",
]
