"""Vocabularies that the `tokenizers` library runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from mmjax.errors import CheckpointError
from mmjax.language.tokenizer_config import (
    CLASS_DEFAULTS,
    added_tokens,
    class_of,
    named_tokens,
)

# A noncharacter of Unicode: no vocabulary has a use for it.
_NO_TOKEN = "\ufdee"


class FastBackend:
    """The `tokenizers` object, without padding and truncation, which would be state."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        add_tokens(tokenizer, config)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        self._tokenizer = tokenizer
        self.is_byte_pair = isinstance(tokenizer.model, models.BPE)
        # CLIP's decoder leaves the mark of a word's end to be turned into a space.
        self._word_end = tokenizer.model.end_of_word_suffix if class_of(config) == "CLIPTokenizer" else None

    def encode(self, texts: Sequence[str], special: bool, limit: int | None, side: str) -> list[list[int]]:
        rows = [row.ids for row in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)]
        for i, row in enumerate(rows):
            if limit is not None and len(row) > limit:
                encoding = self._tokenizer.encode(texts[i], add_special_tokens=False)
                encoding.truncate(limit - (self.special_count() if special else 0), direction=side)
                rows[i] = self._tokenizer.post_process(encoding, None, special).ids
        return rows

    def copy(self, config: Mapping[str, Any]) -> FastBackend:
        """The same vocabulary with what another configuration names beyond it."""
        return FastBackend(tokenizers.Tokenizer.from_str(self._tokenizer.to_str()), config)

    def added(self) -> list[tuple[str, bool]]:
        """Added tokens: their text, and whether they are special."""
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        return [(token.content, token.special) for token in tokens]

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of the pieces of one text, and which of its characters each holds; none spans two pieces."""
        ids, places, done = [], [], 0
        for number, piece in enumerate(pieces):
            before, is_token = self._anchor if number else ("", False)
            encoding = self._tokenizer.encode(before + piece, add_special_tokens=False)
            first = 1 if is_token else sum(end <= len(before) for _, end in encoding.offsets) * bool(before)
            ids += encoding.ids[first:]
            shift = done - len(before)
            places += [(max(begin + shift, done), end + shift) for begin, end in encoding.offsets[first:]]
            done += len(piece)
        return ids, places

    @functools.cached_property
    def _anchor(self) -> tuple[str, bool]:
        """What is put before a piece that is not the first, and whether it is one token.

        What follows it is tokenized as the inside of a text and not as its beginning.
        """
        changes = self._tokenizer.normalizer
        # Where a space is put before what follows a special token, a character that no token holds serves.
        begins = changes is not None and not changes.normalize_str("x").startswith("x")
        for token in self._tokenizer.get_added_tokens_decoder().values():
            loose = token.rstrip or token.lstrip or token.single_word or token.normalized
            if token.special and not (loose or begins or self._tokenizer.encode_special_tokens):
                after = self._tokenizer.encode(token.content + "x", add_special_tokens=False).tokens
                spaced = "".join(after[1:2]).startswith("\u2581")
                return (_NO_TOKEN, False) if spaced else (token.content, True)
        return _NO_TOKEN, False

    @functools.cached_property
    def reader(self) -> FastReader | None:
        """How added tokens are found where texts are changed first; None where they are looked for as is."""
        tokens = self._tokenizer.get_added_tokens_decoder()
        if self._tokenizer.normalizer is None or not any(token.normalized for token in tokens.values()):
            return None
        return FastReader(self._tokenizer, self._anchor[0])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text.replace(self._word_end, " ").strip() if self._word_end else text

    def special_count(self) -> int:
        return self._tokenizer.num_special_tokens_to_add(False)

    def vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / "spiece.model").unlink(missing_ok=True)  # one vocabulary per folder


class FastReader:
    """What a tokenizer finds of its added tokens, without tokenizing the rest (a `marks.Reader`).

    Args:
        tokenizer: with a normalizer.
        anchor: what is put before a piece that is not the first.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, anchor: str) -> None:
        self._anchor = anchor
        # Of an empty vocabulary without an unknown token, nothing but added tokens comes out.
        self._finder = tokenizers.Tokenizer(models.BPE())
        # The normalizer first: tokens are changed by it when they are added.
        self._finder.normalizer = tokenizer.normalizer
        tokens = sorted(tokenizer.get_added_tokens_decoder().items(), key=lambda pair: pair[0])
        self._finder.add_tokens([token for _, token in tokens])
        self._finder.encode_special_tokens = tokenizer.encode_special_tokens
        self._contents = {n: t.content for n, t in self._finder.get_added_tokens_decoder().items()}

    def changed(self, text: str) -> str:
        """The text that tokens are looked for in."""
        return self._finder.normalizer.normalize_str(text)

    def find(self, text: str, inside: bool) -> list[tuple[str, int, int]]:
        """Added tokens in a text, each with its first character and one past its last."""
        before = self._anchor if inside else ""
        found = self._finder.encode(before + text, add_special_tokens=False)
        places = ((max(begin - len(before), 0), end - len(before)) for begin, end in found.offsets)
        named = ((self._contents[n], *place) for n, place in zip(found.ids, places, strict=True))
        return [(token, begin, end) for token, begin, end in named if end > 0]


def open_fast(path: Path, config: dict[str, Any]) -> tuple[FastBackend, dict[str, Any]]:
    """Open a tokenizer.json; what it says of padding goes into the configuration."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain exceptions
        raise CheckpointError(f"{path}: not a tokenizer file that can be read ({error})") from error
    # Sides and padding kept in tokenizer.json count where the configuration is silent.
    padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
    kept = {
        "pad_token": padding.get("pad_token"),
        "padding_side": padding.get("direction"),
        "truncation_side": truncation.get("direction"),
    }
    config = {**CLASS_DEFAULTS.get(class_of(config), {}), **{k: v for k, v in kept.items() if v}, **config}
    return FastBackend(tokenizer, config), config


def add_tokens(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Make known what the configuration names beyond tokenizer.json, in transformers' order."""
    present = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = [token for _, token in added_tokens(config) if repr(token) not in present]
    known = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *tokens)}
    # One token may have several roles with different flags; as in the reference the last one counts.
    tokens += [token for token in named_tokens(config) if token.content not in known]
    tokenizer.add_tokens(tokens)
