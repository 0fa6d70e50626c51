"""sentencepiece's byte pairs (tokenizer.model of LLaMA, Vicuna, Mistral, InternLM2, Gemma) for `tokenizers`.

What comes of the pieces and settings in it is what a tokenizer.json would say, and is saved as one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mmjax.errors import CheckpointError
from mmjax.language.byte_pairs import with_ends
from mmjax.language.fast import add_tokens
from mmjax.language.spm_layout import BYTE_PAIRS, CONTROL, NORMAL, USER_DEFINED, SpmModel, read_spm
from mmjax.language.tokenizer_config import CLASS_DEFAULTS, OTHER_TOKENIZER, added_tokens, class_of

_SPACE = "\u2581"
_LLAMA = ("LlamaTokenizer", "CodeLlamaTokenizer")
_LONGEST = 512  # characters of a piece; sentencepiece's trainer makes none above 16 unless it is told to


def open_spm(path: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Open a tokenizer.model.

    A text begins with the model's first token unless the config says `add_bos_token: false`, as the classes
    do that such folders were made with.

    Args:
        path: The file.
        config: Of the tokenizer.

    Returns:
        The tokenizer, and the config with what its class and the model assume.

    Raises:
        CheckpointError: The file is damaged, or of another kind.
    """
    model = read_spm(path)
    if model.kind != BYTE_PAIRS:
        raise CheckpointError(f"{path}: its pieces are not of the kind BPE; {OTHER_TOKENIZER}")
    model = _renamed(model, config)
    kind = class_of(config) or "LlamaTokenizer"
    # LLaMA's class has no token for padding unless it is named.
    roles = [role for role in model.ids if role != "pad" or kind not in _LLAMA]
    named = {
        f"{role}_token": model.pieces[model.ids[role]].text
        for role in roles
        if 0 <= model.ids[role] < len(model.pieces)
    }
    config = {**CLASS_DEFAULTS.get(kind, {}), **named, **config, "tokenizer_class": kind}
    try:
        return _built(model, config, kind in _LLAMA, path), config
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain exceptions, and panics beside them
        raise CheckpointError(f"{path}: a damaged sentencepiece model ({error})") from None


def _renamed(model: SpmModel, config: Mapping[str, Any]) -> SpmModel:
    """The model with the names that the config gives to ids: what was unused has become a token."""
    names = {number: token.content for number, token in added_tokens(config)}
    kept = {piece.text for number, piece in enumerate(model.pieces) if number not in names}
    pieces = tuple(
        dataclasses.replace(piece, text=names[number])
        if number in names and names[number] not in kept
        else piece
        for number, piece in enumerate(model.pieces)
    )
    return dataclasses.replace(model, pieces=pieces)


def _built(model: SpmModel, config: Mapping[str, Any], llama: bool, path: Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(_byte_pairs(model, path, whole=not llama))
    (_as_llama if llama else _as_trained)(tokenizer, model, config)
    # LLaMA's class looks for what a trainer was told to keep whole as it does for special tokens.
    apart = (CONTROL, USER_DEFINED) if llama else (CONTROL,)
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, special=piece.kind == CONTROL, normalized=False)
            for piece in model.pieces
            if piece.kind in apart
        ]
    )
    add_tokens(tokenizer, config)
    return with_ends(tokenizer, config, start=True)


def _byte_pairs(model: SpmModel, path: Path, *, whole: bool) -> models.BPE:
    """The pieces with all ways to put one together of two others, the best piece's first."""
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    longest = max(map(len, vocab))
    if len(vocab) != len(model.pieces) or longest > _LONGEST:
        what = "a piece is there twice" if longest <= _LONGEST else f"a piece has {longest} characters"
        raise CheckpointError(f"{path}: {what}; {OTHER_TOKENIZER}")
    ranks = {
        piece.text: (-piece.score, number)
        for number, piece in enumerate(model.pieces)
        if piece.kind == NORMAL
    }
    merges = [
        (rank, cut, token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return models.BPE(
        vocab,
        [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=model.pieces[model.ids["unk"]].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        # What the trainer was told to keep whole is no sum of others.
        ignore_merges=whole and any(piece.kind == USER_DEFINED for piece in model.pieces),
    )


def _as_llama(tokenizer: tokenizers.Tokenizer, model: SpmModel, config: Mapping[str, Any]) -> None:
    """LLaMA's way: after a special token there is a space only where the config says that it is `legacy`."""
    spaced = config.get("add_prefix_space", True) in (True, None)
    scheme = ("always" if config.get("legacy") else "first") if spaced else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = _decoder(model, spaced)


def _as_trained(tokenizer: tokenizers.Tokenizer, model: SpmModel, config: Mapping[str, Any]) -> None:
    """What the model itself says about spaces, for each text between special tokens."""
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if model.escape_spaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    whole = sorted((p.text for p in model.pieces if p.kind == USER_DEFINED), key=len, reverse=True)
    if whole:
        # What stands between two of them is looked up as a whole first, but a typed "<0x41>" is no byte.
        apart = ("|".join(re.escape(piece) for piece in whole), r"\A<(?=0x[0-9A-F]{2}>\z)")
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in apart]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = _decoder(model, model.dummy_prefix)


def _decoder(model: SpmModel, spaced: bool) -> decoders.Decoder:
    steps: list[Any] = [decoders.Replace(_SPACE, " ")]
    steps += [decoders.ByteFallback()] if model.byte_fallback else []
    return decoders.Sequence([*steps, decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if spaced else [])])


__all__ = ["open_spm"]
