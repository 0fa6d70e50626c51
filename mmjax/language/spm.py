"""sentencepiece's byte pairs (tokenizer.model of LLaMA, Vicuna, Mistral, InternLM2, Gemma) for `tokenizers`.

What comes of the pieces and settings in it is what a tokenizer.json would say, and is saved as one.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mmjax.errors import CheckpointError
from mmjax.language.byte_pairs import with_ends
from mmjax.language.tokenizer_config import CLASS_DEFAULTS, OTHER_TOKENIZER, class_of

_SPACE = "\u2581"
_BYTE_PAIRS = 2
# Kinds of pieces.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


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
    proto = _read(path)
    pieces, trained = proto.pieces, proto.trainer_spec
    if trained.model_type != _BYTE_PAIRS:
        raise CheckpointError(f"{path}: its pieces are not of the kind BPE; {OTHER_TOKENIZER}")
    ids = dict(
        bos_token=trained.bos_id, eos_token=trained.eos_id, unk_token=trained.unk_id, pad_token=trained.pad_id
    )
    roles = {role: pieces[number].piece for role, number in ids.items() if 0 <= number < len(pieces)}
    kind = class_of(config) or "LlamaTokenizer"
    config = {**CLASS_DEFAULTS.get(kind, {}), **roles, **config, "tokenizer_class": kind}
    tokenizer = tokenizers.Tokenizer(_byte_pairs(proto, path))
    (_as_llama if kind in ("LlamaTokenizer", "CodeLlamaTokenizer") else _as_trained)(tokenizer, proto, config)
    special = [piece.piece for piece in pieces if piece.type == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return with_ends(tokenizer, config, start=True), config


def _read(path: Path) -> Any:
    # Imported where it is used: most folders have a tokenizer.json, and need not wait for it.
    layout: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = layout.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own kinds of errors differ between its versions
        raise CheckpointError(f"{path}: not a sentencepiece model, or a damaged one") from error
    if not proto.pieces:
        raise CheckpointError(f"{path}: not a sentencepiece model, or a damaged one: it has no pieces")
    return proto


def _byte_pairs(proto: Any, path: Path) -> models.BPE:
    """The pieces with all ways to put one together of two others, the best piece's first."""
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    if len(vocab) != len(proto.pieces):
        raise CheckpointError(f"{path}: a piece is there twice; {OTHER_TOKENIZER}")
    ranks = {
        piece.piece: (-piece.score, number)
        for number, piece in enumerate(proto.pieces)
        if piece.type == _NORMAL
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
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        # What the trainer was told to keep whole is no sum of others.
        ignore_merges=any(piece.type == _USER_DEFINED for piece in proto.pieces),
    )


def _as_llama(tokenizer: tokenizers.Tokenizer, proto: Any, config: Mapping[str, Any]) -> None:
    """LLaMA's way: after a special token there is a space only where the config says that it is `legacy`."""
    spaced = config.get("add_prefix_space", True) in (True, None)
    scheme = ("always" if config.get("legacy") else "first") if spaced else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = _decoder(proto, spaced)


def _as_trained(tokenizer: tokenizers.Tokenizer, proto: Any, config: Mapping[str, Any]) -> None:
    """What the model itself says about spaces, for each text between special tokens."""
    said = proto.normalizer_spec
    steps: list[Any] = []
    if said.precompiled_charsmap:
        steps.append(normalizers.Precompiled(said.precompiled_charsmap))
    if said.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if said.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if said.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    whole = sorted((p.piece for p in proto.pieces if p.type == _USER_DEFINED), key=len, reverse=True)
    if whole:
        # What stands between two of them is looked up as a whole first, but a typed "<0x41>" is no byte.
        apart = ("|".join(re.escape(piece) for piece in whole), r"\A<(?=0x[0-9A-F]{2}>\z)")
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in apart]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = _decoder(proto, said.add_dummy_prefix)


def _decoder(proto: Any, spaced: bool) -> decoders.Decoder:
    steps: list[Any] = [decoders.Replace(_SPACE, " ")]
    steps += [decoders.ByteFallback()] if proto.trainer_spec.byte_fallback else []
    return decoders.Sequence([*steps, decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if spaced else [])])


__all__ = ["open_spm"]
