"""Which of a folder's files has its vocabulary, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.errors import CheckpointError
from mmjax.language.byte_pairs import open_byte_pairs, reads_byte_pairs
from mmjax.language.fast import FastBackend, open_fast
from mmjax.language.spiece import SiglipPieces, open_pieces
from mmjax.language.spm import open_spm
from mmjax.language.tokenizer_config import OTHER_TOKENIZER, added_tokens


def open_vocabulary(
    folder: Path, config: dict[str, Any]
) -> tuple[FastBackend | SiglipPieces, Mapping[str, Any]]:
    """Open a folder's vocabulary.

    Args:
        folder: The hub folder.
        config: Contents of its tokenizer_config.json, which may name a class.

    Returns:
        What turns text into ids, and the config with what the class and the vocabulary assume.

    Raises:
        CheckpointError: There is none, it is damaged, or of a class that is not known.
    """
    if (folder / "tokenizer.json").is_file():
        return open_fast(folder / "tokenizer.json", config)
    pieces = [name for name in ("spiece.model", "tokenizer.model") if (folder / name).is_file()]
    pairs = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if pairs and (reads_byte_pairs(config) or not pieces):
        return _checked(*open_byte_pairs(folder, config))
    if "spiece.model" in pieces:
        return open_pieces(folder / "spiece.model", config)
    if pieces:
        return _checked(*open_spm(folder / "tokenizer.model", config))
    wanted = "tokenizer.json, vocab.json with merges.txt, spiece.model, or tokenizer.model"
    raise CheckpointError(f"{folder}: no tokenizer in this folder: expected {wanted}")


def _checked(tokenizer: Any, config: Mapping[str, Any]) -> tuple[FastBackend, Mapping[str, Any]]:
    """A vocabulary that was put together; its tokens have the ids that the configuration gives."""
    made = FastBackend(tokenizer, config)
    for number, token in added_tokens(config):
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise CheckpointError(
                f"tokenizer_config.json: {token.content!r} has id {number} there and {found} in the "
                f"vocabulary; {OTHER_TOKENIZER}"
            )
    return made, config


__all__ = ["open_vocabulary"]
