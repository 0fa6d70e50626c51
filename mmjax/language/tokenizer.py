"""Tokenizers of hub folders over the `tokenizers` library, and one trained in CLIP's way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import pre_tokenizers, trainers

from mmjax.errors import CheckpointError, ConfigError, DataError
from mmjax.language.fast import FastBackend, clip_model, clip_tokenizer, open_clip_files, open_fast
from mmjax.language.spiece import open_pieces
from mmjax.language.tokenizer_config import (
    CLASS_DEFAULTS,
    CLIP_END,
    CLIP_START,
    ROLES,
    content_of,
    read_config,
)

_NO_LIMIT = 10**20  # the number that transformers writes for "no limit" lies above

_CLEAN_UP = {" ' ": "'"} | {
    f" {mark}": mark for mark in (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")
}


class _Backend(Protocol):
    """What turns text into ids: `tokenizers`, or sentencepiece."""

    def encode(
        self, texts: Sequence[str], special: bool, limit: int | None, side: str
    ) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    @property
    def is_byte_pair(self) -> bool: ...
    def special_count(self) -> int: ...
    def vocab(self) -> dict[str, int]: ...
    def save(self, folder: Path) -> None: ...


class Tokenizer:
    """Texts to ids as transformers does, with the special tokens, sides and lengths of a folder.

    Made by `Tokenizer.from_folder` or `train_clip_tokenizer`; nothing in it changes afterwards.

    Attributes:
        vocab_size: Number of ids, added tokens included.
        model_max_length: Longest text that the model takes, in tokens; None if the folder names none.
        padding_side, truncation_side: "left" or "right".
        model_input_names: Which arrays a call returns.
        bos_token, eos_token, unk_token, pad_token, ..., and each with ``_id``: None if there is none.

    Example:
        >>> tokenizer = train_clip_tokenizer(["a red cat", "a red dog"], vocab_size=530)
        >>> batch = tokenizer(["a cat", "a"], padding=True)
        >>> batch["attention_mask"].tolist()
        [[1, 1, 1, 1], [1, 1, 1, 0]]
        >>> tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
        'a cat'
    """

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    sep_token: str | None
    sep_token_id: int | None
    cls_token: str | None
    cls_token_id: int | None
    mask_token: str | None
    mask_token_id: int | None

    def __init__(self, backend: _Backend, config: Mapping[str, Any]) -> None:
        self._backend = backend
        self._config = dict(config)
        self._vocab = backend.vocab()
        self.vocab_size = 1 + max(self._vocab.values())
        for role in ROLES:
            token = content_of(config.get(role))
            if token is not None and token not in self._vocab:
                raise CheckpointError(f"tokenizer_config.json: {role} {token!r} is not in the vocabulary")
            setattr(self, role, token)
            setattr(self, f"{role}_id", None if token is None else self._vocab[token])
        self.padding_side, self.truncation_side = (
            _side(config.get(name), f"tokenizer_config.json: {name}")
            for name in ("padding_side", "truncation_side")
        )
        self.model_max_length = _max_length(config.get("model_max_length"))
        self.model_input_names = tuple(config.get("model_input_names") or ("input_ids", "attention_mask"))

    @classmethod
    def from_folder(cls, folder: str | Path, *, tokenizer_class: str | None = None) -> Tokenizer:
        """Open the tokenizer of a hub folder.

        Args:
            folder: Has tokenizer.json, or vocab.json and merges.txt (CLIP), or spiece.model (SigLIP), and
                optionally tokenizer_config.json and special_tokens_map.json.
            tokenizer_class: transformers' class, where tokenizer_config.json does not name it.

        Raises:
            CheckpointError: A file is missing, damaged or contradicts another; the message names it.
        """
        folder = Path(folder)
        config = read_config(folder, tokenizer_class)
        if (folder / "tokenizer.json").is_file():
            return cls(*open_fast(folder / "tokenizer.json", config))
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            config = {**CLASS_DEFAULTS["CLIPTokenizer"], **config, "tokenizer_class": "CLIPTokenizer"}
            return cls(FastBackend(open_clip_files(folder, config), config), config)
        if (folder / "spiece.model").is_file():
            config = {**CLASS_DEFAULTS["SiglipTokenizer"], **config, "tokenizer_class": "SiglipTokenizer"}
            return cls(open_pieces(folder / "spiece.model", config), config)
        wanted = "tokenizer.json, vocab.json with merges.txt, or spiece.model"
        raise CheckpointError(f"{folder}: no tokenizer in this folder: expected {wanted}")

    def save(self, folder: str | Path) -> None:
        """Write files from which transformers' AutoTokenizer gets the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(folder)
        config = {**self._config, **{role: getattr(self, role) for role in ROLES if role in self._config}}
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        for name in ("special_tokens_map.json", "added_tokens.json"):  # what they say is in the others
            (folder / name).unlink(missing_ok=True)

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, np.ndarray]:
        """Tokenize finished prompts: special tokens in them count.

        Args:
            texts: One text or several.
            padding: False, True or "longest" (of the batch), or "max_length" (longer texts need truncation).
            truncation: Cut longer texts to `max_length`, special tokens kept. By default only if
                `max_length` is given without padding, as transformers does.
            max_length: In tokens; by default the model's.
            add_special_tokens: Put the model's start and end around each text.
            pad_to_multiple_of: Round the padded length up.
            padding_side: "left" or "right" instead of the folder's.
            return_attention_mask: Instead of what the folder asks for.

        Returns:
            ``input_ids`` int32 [B, T], and ``attention_mask`` int32 [B, T] if the folder asks for it.

        Raises:
            DataError: Texts of different length without padding, or something that is no text.
        """
        texts = _checked_texts(texts)
        if padding not in (False, True, "longest", "max_length", "do_not_pad"):
            raise DataError(f"padding: expected True, False, 'longest' or 'max_length', got {padding!r}")
        if truncation not in (None, False, True):
            raise DataError(f"truncation: expected True or False, got {truncation!r}")
        strategy = {True: "longest", False: "", "do_not_pad": ""}.get(padding, str(padding))
        cut = bool(truncation) or (truncation is None and max_length is not None and not strategy)
        length = self.model_max_length if max_length is None else max_length
        if strategy == "max_length" and length is None:
            raise DataError("padding='max_length' needs max_length: the tokenizer's folder names none")
        if strategy and self.pad_token_id is None:
            raise DataError("the tokenizer has no pad_token to pad with: name one in tokenizer_config.json")
        reserved = self._backend.special_count() if add_special_tokens else 0
        if cut and length is not None and length < max(reserved, 1):
            raise DataError(f"max_length {length} leaves no room for the {reserved} special tokens")
        if cut and strategy and pad_to_multiple_of and length is not None and length % pad_to_multiple_of:
            raise DataError(
                f"max_length {length} is not a multiple of pad_to_multiple_of {pad_to_multiple_of}"
            )
        rows = self._backend.encode(texts, add_special_tokens, length if cut else None, self.truncation_side)
        width = _width([len(row) for row in rows], strategy, length, pad_to_multiple_of)
        side = _side(padding_side or self.padding_side, "padding_side")
        ids = np.full((len(rows), width), self.pad_token_id or 0, np.int32)
        mask = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, place] = row
            mask[i, place] = 1
        wanted = (
            "attention_mask" in self.model_input_names
            if return_attention_mask is None
            else return_attention_mask
        )
        return {"input_ids": ids, "attention_mask": mask} if wanted else {"input_ids": ids}

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """Text of one sequence of ids, int [T]."""
        numbers = [int(number) for number in np.asarray(ids).reshape(-1)]
        wrong = [number for number in numbers if not 0 <= number < self.vocab_size]
        if wrong:
            raise DataError(f"id {wrong[0]} is outside the vocabulary of {self.vocab_size}")
        text = self._backend.decode(numbers, skip_special_tokens)
        if self._config.get("clean_up_tokenization_spaces") and not self._backend.is_byte_pair:
            for spaced, tight in _CLEAN_UP.items():
                text = text.replace(spaced, tight)
        return text

    def batch_decode(self, ids: Iterable[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """Texts of several sequences of ids, int [B, T]."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in ids]

    def token_to_id(self, token: str) -> int | None:
        """Id of a token of the vocabulary, None if it is not one."""
        return self._vocab.get(token)


def train_clip_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int = 77) -> Tokenizer:
    """Learn a byte-level, lower-cased BPE vocabulary laid out as CLIP's.

    Args:
        texts: What to learn from. The same texts give the same vocabulary.
        vocab_size: Number of ids: 512 for bytes (inside and at the end of a word), the merges, and 2 for
            start and end, which come last. Fewer if the texts have no more pairs to merge.
        max_length: Longest text in tokens.

    Returns:
        A tokenizer whose saved folder transformers' CLIPTokenizer opens.

    Example:
        >>> tokenizer = train_clip_tokenizer(["two cats", "two dogs"], vocab_size=520)
        >>> tokenizer.vocab_size, tokenizer.eos_token_id
        (520, 519)
    """
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*bytes_, *(byte + "</w>" for byte in bytes_)]
    room = vocab_size - len(alphabet) - 2
    if room < 0:
        raise ConfigError(f"vocab_size: bytes and special tokens need {len(alphabet) + 2}, got {vocab_size}")
    config = {
        **CLASS_DEFAULTS["CLIPTokenizer"],
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
    }
    learner = clip_tokenizer(clip_model({}, []), config)
    # Ties between pairs are decided by id, and word ends that are not known before get ids in random order.
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + room,
        show_progress=False,
        special_tokens=alphabet,
        end_of_word_suffix="</w>",
    )
    learner.train_from_iterator(texts, trainer)
    merges: list[tuple[str, str]] = []
    learned: dict[str, None] = {}
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        if len(learned) < room or left + right in learned:
            merges.append((left, right))
            learned[left + right] = None
    # The learner knows only the word ends it has seen; with all of them any text can be written.
    tokens = [*alphabet, *learned, CLIP_START, CLIP_END]
    vocab = {token: number for number, token in enumerate(tokens)}
    return Tokenizer(FastBackend(clip_tokenizer(clip_model(vocab, merges), config), config), config)


def _side(value: Any, name: str) -> str:
    if value not in (None, "left", "right"):
        raise ConfigError(f"{name}: expected 'left' or 'right', got {value!r}")
    return value or "right"


def _max_length(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
        raise ConfigError(
            f"tokenizer_config.json: model_max_length must be a number of tokens, got {value!r}"
        )
    return None if value > _NO_LIMIT else int(value)


def _checked_texts(texts: Any) -> list[str]:
    rows = [texts] if isinstance(texts, str) else list(texts)
    if not rows:
        raise DataError("no texts given: pass at least one")
    for i, text in enumerate(rows):
        if not isinstance(text, str):
            raise DataError(f"text {i} is a {type(text).__name__}: pass a string or a list of strings")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(
                f"text {i} has half a surrogate pair, which is no character: decode it as UTF-8 first"
            )
    return rows


def _width(lengths: list[int], padding: str, length: int | None, multiple: int | None) -> int:
    longest = max(lengths)
    if not padding and min(lengths) != longest:
        raise DataError(
            f"the texts have from {min(lengths)} to {longest} tokens: pass padding=True for one array"
        )
    width = length if padding == "max_length" and length is not None else longest
    if padding and multiple:
        width = -(-width // multiple) * multiple
    if longest > width and min(lengths) != longest:
        raise DataError(f"a text has {longest} tokens, more than {width}: pass truncation=True")
    return max(width, longest)


__all__ = ["Tokenizer", "train_clip_tokenizer"]
