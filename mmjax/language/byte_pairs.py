"""Vocabularies of vocab.json and merges.txt, and what each class of transformers does around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mmjax.errors import CheckpointError
from mmjax.language.fast import add_tokens
from mmjax.language.tokenizer_config import (
    CLASS_DEFAULTS,
    CLIP_END,
    OTHER_TOKENIZER,
    class_of,
    content_of,
    read_json,
)

_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "CLIPTokenizer": CLASS_DEFAULTS["CLIPTokenizer"],
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}


def clip_model(vocab: dict[str, int], merges: list[tuple[str, str]]) -> models.BPE:
    """CLIP's byte-pair model: the last piece of a word carries a mark."""
    return models.BPE(
        vocab, merges, unk_token=CLIP_END, continuing_subword_prefix="", end_of_word_suffix="</w>"
    )


def clip_tokenizer(model: models.BPE, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """CLIP's steps around a byte-pair model: lower case, split, start and end (if the model has them)."""
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(tokenizers.Regex(_CLIP_SPLIT), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    start, end = content_of(config["bos_token"]), content_of(config["eos_token"])
    start_id, end_id = (token and tokenizer.token_to_id(token) for token in (start, end))
    if start and end and isinstance(start_id, int) and isinstance(end_id, int):
        tokenizer.post_processor = processors.RobertaProcessing(
            (end, end_id), (start, start_id), trim_offsets=False, add_prefix_space=False
        )
    return tokenizer


def _gpt2_tokenizer(model: models.BPE, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's, which OPT has too."""
    tokenizer = tokenizers.Tokenizer(model)
    spaced = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _qwen2_tokenizer(model: models.BPE, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN_SPLIT), behavior="isolated")
    spaced = bool(config.get("add_prefix_space"))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_ends(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], *, start: bool = False
) -> tokenizers.Tokenizer:
    """The tokenizer with the tokens around a text that `add_bos_token` and `add_eos_token` ask for.

    Args:
        tokenizer: changed, and returned; with all its added tokens.
        config: of the tokenizer.
        start: the value of `add_bos_token` where it is not in the config.
    """
    first = _known(tokenizer, config, "bos_token") if config.get("add_bos_token", start) else []
    last = _known(tokenizer, config, "eos_token") if config.get("add_eos_token", False) else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(first + last)],
    )
    return tokenizer


def _known(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], role: str) -> list[str]:
    """The token that has a role, if the vocabulary has it."""
    token = content_of(config.get(role))
    return [] if token is None or tokenizer.token_to_id(token) is None else [token]


_BYTE_LEVEL: Mapping[str, Callable[[models.BPE, Mapping[str, Any]], tokenizers.Tokenizer]] = {
    "GPT2Tokenizer": _gpt2_tokenizer,
    "Qwen2Tokenizer": _qwen2_tokenizer,
}


def open_byte_pairs(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Open vocab.json and merges.txt as the folder's class does, CLIP's where it names none.

    Args:
        folder: With both files.
        config: Of the tokenizer.

    Returns:
        The tokenizer, and the config with what the class assumes.

    Raises:
        CheckpointError: A file is damaged, they do not fit each other, or the class is not known.
    """
    kind = class_of(config) or "CLIPTokenizer"
    if kind not in _DEFAULTS:
        raise CheckpointError(
            f"{folder}/vocab.json: read for {', '.join(_DEFAULTS)}, not for {kind}; {OTHER_TOKENIZER}"
        )
    config = {**_DEFAULTS[kind], **config, "tokenizer_class": kind}
    vocab = read_json(folder / "vocab.json")
    if kind == "CLIPTokenizer" and CLIP_END not in vocab:
        raise CheckpointError(f"{folder}/vocab.json: no {CLIP_END}, which stands for what CLIP does not know")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        merges = [(left, right) for left, right in pairs]
        if kind == "CLIPTokenizer":  # has its start and end already, and more tokens may come behind them
            return clip_tokenizer(clip_model(vocab, merges), config), config
        tokenizer = _BYTE_LEVEL[kind](models.BPE(vocab, merges), config)
        add_tokens(tokenizer, config)
        return with_ends(tokenizer, config), config
    except Exception as error:  # the library raises plain exceptions
        raise CheckpointError(f"{folder}/merges.txt does not fit vocab.json ({error})") from error


def reads_byte_pairs(config: Mapping[str, Any]) -> bool:
    """Whether the class that a config names has vocab.json with merges.txt, if it names one."""
    return class_of(config) in ("", *_DEFAULTS)


__all__ = ["clip_model", "clip_tokenizer", "open_byte_pairs", "reads_byte_pairs", "with_ends"]
