"""SigLIP's sentencepiece vocabulary."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mmjax.errors import CheckpointError
from mmjax.language.tokenizer_config import (
    CLASS_DEFAULTS,
    OTHER_TOKENIZER,
    added_tokens,
    class_of,
    content_of,
    named_tokens,
)

_UNDERLINE = "\u2581"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SiglipPieces:
    """Text to ids as transformers' SiglipTokenizer: lower case, no punctuation, an end token.

    Args:
        path: The spiece.model.
        added: Tokens with the ids that the folder gives them.
        special: More special tokens; those that are no piece get ids behind the last.
        unk, eos: Contents of the unknown and the end token.
        lower_case: Lower-case the text.
        options: Keyword arguments of SentencePieceProcessor (`sp_model_kwargs`).

    Raises:
        CheckpointError: The file is damaged.
    """

    is_byte_pair = False

    def __init__(
        self,
        path: Path,
        added: Mapping[int, AddedToken],
        special: Sequence[str],
        *,
        unk: str,
        eos: str,
        lower_case: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        # Imported where it is used: most folders need not wait for it.
        import sentencepiece

        if (options or {}).get("enable_sampling"):
            raise CheckpointError(
                f"{path.parent}: sp_model_kwargs.enable_sampling is not supported: remove it"
            )
        self._model = path.read_bytes()
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._model, **(options or {}))
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{path}: not a sentencepiece model, or a damaged one") from error
        self._lower_case = lower_case
        self._unk, self._unk_length = unk, len(self._pieces.encode(unk))
        self._flags = {token.content: token for token in added.values()}
        self._ids = {token.content: number for number, token in added.items()}
        size = self._pieces.get_piece_size()
        for token in special:
            if token not in self._ids:
                known = self._pieces.piece_to_id(token)
                beyond = size + sum(number >= size for number in self._ids.values())
                self._ids[token] = known if self._pieces.id_to_piece(known) == token else beyond
        self._skip = {token for token, flags in self._flags.items() if flags.special} | set(special)
        self._eos_id = self._ids[eos]
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, texts: Sequence[str], special: bool, limit: int | None, side: str) -> list[list[int]]:
        """Ids of each text, cut to `limit` at `side` with the end token inside it."""
        return [self._encode(text, special, limit, side) for text in texts]

    def _encode(self, text: str, special: bool, limit: int | None, side: str) -> list[int]:
        known = self._ids
        ids = [known[t] if t in known else self._pieces.piece_to_id(t) for t in self._tokenize(text)]
        if limit is not None and len(ids) + special > limit:
            room = limit - special
            ids = ids[:room] if side == "right" else ids[len(ids) - room :]
        if special and ids[-1:] != [self._eos_id]:
            ids.append(self._eos_id)
        return ids

    def special_count(self) -> int:
        """Number of tokens that the encoder adds to a text."""
        return 1

    def vocab(self) -> dict[str, int]:
        """Every piece and added token with its id."""
        pieces = {self._pieces.id_to_piece(i): i for i in range(self._pieces.get_piece_size())}
        return {**pieces, **self._ids}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of the ids; special tokens stay as they are, or are left out."""
        contents = {number: token for token, number in self._ids.items()}
        text, after_special = "", False
        run: list[str] = []
        for number in ids:
            token = contents.get(number)
            if token is None or token not in self._skip:
                run.append(self._pieces.id_to_piece(number) if token is None else token)
                after_special = False
            elif not skip_special_tokens:
                text += ("" if after_special else " ") + self._pieces.decode(run) + token
                run, after_special = [], True
        return (text + self._pieces.decode(run)).strip()

    def save(self, folder: Path) -> None:
        """Write the vocabulary as it was read."""
        (folder / "spiece.model").write_bytes(self._model)
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):  # one vocabulary per folder
            (folder / name).unlink(missing_ok=True)

    def _tokenize(self, text: str) -> list[str]:
        parts = [part for part in self._split.split(_UNDERLINE + text.replace(_UNDERLINE, " ")) if part]
        for i, part in enumerate(parts):
            flags = self._flags.get(part)
            if flags is not None and flags.rstrip and i + 1 < len(parts):
                parts[i + 1] = parts[i + 1].lstrip()
            if flags is not None and flags.lstrip and i > 0:
                parts[i - 1] = parts[i - 1].rstrip()
        tokens: list[str] = []
        for part in filter(None, parts):
            tokens += [part] if part in self._ids else self._plain(part)
        leading = len(tokens) > 1 and tokens[0] == _UNDERLINE and tokens[1] in self._skip
        return tokens[1:] if leading else tokens

    def _plain(self, text: str) -> list[str]:
        text = text.lower() if self._lower_case else text
        text = re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()
        # The unknown token goes in front, and its pieces out again, so that a leading space survives.
        tokens = self._pieces.encode(self._unk + text, out_type=str)
        return tokens[self._unk_length :] if len(tokens) >= self._unk_length else tokens


def open_pieces(path: Path, config: Mapping[str, Any]) -> tuple[SiglipPieces, dict[str, Any]]:
    """Open a spiece.model; what SiglipTokenizer assumes goes into the configuration."""
    kind = class_of(config) or "SiglipTokenizer"
    if kind != "SiglipTokenizer":
        raise CheckpointError(f"{path}: read for SiglipTokenizer, not for {kind}; {OTHER_TOKENIZER}")
    config = {**CLASS_DEFAULTS[kind], **config, "tokenizer_class": kind}
    unk, eos = content_of(config["unk_token"]), content_of(config["eos_token"])
    if not unk or not eos:
        raise CheckpointError(f"{path.parent}/tokenizer_config.json: unk_token and eos_token are needed")
    pieces = SiglipPieces(
        path,
        dict(added_tokens(config)),
        [token.content for token in named_tokens(config)],
        unk=unk,
        eos=eos,
        lower_case=bool(config.get("do_lower_case", True)),
        options=config.get("sp_model_kwargs"),
    )
    return pieces, config
