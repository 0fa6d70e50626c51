"""Tokenizers of hub folders over the `tokenizers` library, and one trained in CLIP's way."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import pre_tokenizers, trainers

from mmjax.errors import CheckpointError, ConfigError, DataError
from mmjax.language.batching import Layout, checked_texts, max_length_of, side_of
from mmjax.language.byte_pairs import clip_model, clip_tokenizer
from mmjax.language.fast import FastBackend
from mmjax.language.tokenizer_config import (
    CLASS_DEFAULTS,
    CLIP_END,
    CLIP_START,
    ROLES,
    content_of,
    read_config,
    read_templates,
    write_templates,
)
from mmjax.language.vocabularies import open_vocabulary

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
        self._templates: dict[str, tuple[str, str]] = {}
        self._vocab = backend.vocab()
        self.vocab_size = 1 + max(self._vocab.values())
        for role in ROLES:
            token = content_of(config.get(role))
            if token is not None and token not in self._vocab:
                raise CheckpointError(f"tokenizer_config.json: {role} {token!r} is not in the vocabulary")
            setattr(self, role, token)
            setattr(self, f"{role}_id", None if token is None else self._vocab[token])
        self.padding_side, self.truncation_side = (
            side_of(config.get(name), f"tokenizer_config.json: {name}")
            for name in ("padding_side", "truncation_side")
        )
        self.model_max_length = max_length_of(config.get("model_max_length"))
        self.model_input_names = tuple(config.get("model_input_names") or ("input_ids", "attention_mask"))

    @classmethod
    def from_folder(cls, folder: str | Path, *, tokenizer_class: str | None = None) -> Tokenizer:
        """Open the tokenizer of a hub folder.

        Args:
            folder: Has tokenizer.json, or vocab.json and merges.txt (CLIP, GPT-2 and OPT, Qwen2), or
                spiece.model (SigLIP), or tokenizer.model (LLaMA and others: sentencepiece's byte pairs), and
                optionally tokenizer_config.json and special_tokens_map.json.
            tokenizer_class: transformers' class, where tokenizer_config.json does not name it.

        Raises:
            CheckpointError: A file is missing, damaged or contradicts another; the message names it.
        """
        folder = Path(folder)
        config = read_config(folder, tokenizer_class)
        templates = read_templates(folder, config)
        config.pop("chat_template", None)
        tokenizer = cls(*open_vocabulary(folder, config))
        tokenizer._templates = templates
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write files from which transformers' AutoTokenizer gets the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(folder)
        config = {**self._config, **{role: getattr(self, role) for role in ROLES if role in self._config}}
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        write_templates(folder, {name: text for name, (text, _) in self._templates.items()})
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
        texts = checked_texts(texts)
        layout = Layout.of(
            padding,
            truncation,
            max_length,
            self.model_max_length,
            multiple=pad_to_multiple_of,
            side=side_of(padding_side or self.padding_side, "padding_side"),
            pad_id=self.pad_token_id,
            reserved=self._backend.special_count() if add_special_tokens else 0,
        )
        rows = self._backend.encode(texts, add_special_tokens, layout.limit, self.truncation_side)
        return self._named(*layout.arrays(rows), return_attention_mask)

    def _named(self, ids: np.ndarray, mask: np.ndarray, wanted: bool | None = None) -> dict[str, np.ndarray]:
        wanted = "attention_mask" in self.model_input_names if wanted is None else wanted
        return {"input_ids": ids, "attention_mask": mask} if wanted else {"input_ids": ids}

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The folder's chat template; by name where it has others than "default"; None if it has none."""
        texts = {name: text for name, (text, _) in self._templates.items()}
        return (texts["default"] if set(texts) == {"default"} else texts) if texts else None

    def with_chat_template(self, chat_template: str) -> Tokenizer:
        """The same tokenizer with another chat template, which is saved with it."""
        other = copy.copy(self)
        other._templates = {"default": (chat_template, "chat_template")}
        return other

    def with_special_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """The same tokenizer with more special tokens; new ones get ids after all others."""
        if not isinstance(self._backend, FastBackend):
            raise DataError(
                "special tokens are added to a tokenizer.json: this folder has another vocabulary"
            )
        name = (
            "extra_special_tokens"
            if self._config.get("extra_special_tokens")
            else "additional_special_tokens"
        )
        known = self._config.get(name) or []
        known = list(known.values()) if isinstance(known, dict) else list(known)
        config = {**self._config, name: [*known, *(token for token in tokens if token not in known)]}
        made = Tokenizer(self._backend.copy(config), config)
        made._templates = self._templates
        return made

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
        return_assistant_tokens_mask: bool = False,
        padding: bool | str = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **variables: Any,
    ) -> Any:
        """Conversations to prompts, through the folder's chat template; what people typed stays text.

        Args:
            messages: One conversation, a list of {"role": ..., "content": ...}, or a list of conversations.
                A content is a text, or a list of {"type": "text", "text": ...} and {"type": "image"}.
            add_generation_prompt: End with what begins the assistant's next message.
            continue_final_message: End inside the last message, so that a model goes on with it.
            tokenize: Return arrays, else the text.
            chat_template: A template, or the name of one of the folder's, instead of its "default".
            return_assistant_tokens_mask: Return also where the assistant speaks.
            padding, truncation, max_length, pad_to_multiple_of, padding_side: As in a call.
            variables: For the template, such as `tools` and `documents`.

        Returns:
            What a call returns, with ``assistant_masks`` int32 [B, T] if asked for. Without `tokenize` the
            text of one conversation, or a list of texts; in a text a special token that was typed looks
            like one that the template wrote.

        Raises:
            DataError: The folder has no template, or it refuses the messages.
            CheckpointError: The template cannot be read.
        """
        from mmjax.language.chat import render_chat

        several = bool(messages) and isinstance(messages[0], list | tuple)
        template = self._template(chat_template, "tools" in variables)
        roles = {role: getattr(self, role) for role in ROLES if getattr(self, role) is not None}
        options = {
            **roles,
            **variables,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        chats = messages if several else [messages]
        if not tokenize:
            texts = [render_chat(template, chat, **options) for chat in chats]
            return texts if several else texts[0]
        layout = Layout.of(
            padding,
            truncation,
            max_length,
            self.model_max_length,
            multiple=pad_to_multiple_of,
            side=side_of(padding_side or self.padding_side, "padding_side"),
            pad_id=self.pad_token_id,
        )
        pairs = [self.encode_chat(chat, template, return_assistant_tokens_mask, options) for chat in chats]
        keep = slice(layout.limit) if self.truncation_side == "right" else slice(-(layout.limit or 0), None)
        batch = self._named(*layout.arrays([ids[keep] for ids, _ in pairs]))
        if return_assistant_tokens_mask:
            batch["assistant_masks"] = layout.arrays([answers[keep] for _, answers in pairs], fill=0)[0]
        return batch

    def encode_chat(
        self, chat: Any, template: Any, answers: bool, options: Mapping[str, Any]
    ) -> tuple[list[int], list[int]]:
        """Ids of one conversation and, if asked for, which of them the assistant says (1, else 0)."""
        from mmjax.language.chat import ControlTokens, answer_spans, chat_pieces, touching

        if not isinstance(self._backend, FastBackend):
            raise DataError("conversations need a tokenizer.json: this folder has another kind of vocabulary")
        added = self._backend.added()
        control = ControlTokens.of(added, template, self._backend.reader)
        pieces = chat_pieces(template, chat, control, **options)
        ids, places = self._backend.encode_pieces(pieces)
        if not answers:
            return ids, []
        ends = [text for text, special in added if special]
        # Marks that are cut away can change what a template writes; without any it has been rendered already.
        rendered = pieces[0] if len(pieces) == 1 else None
        spans = answer_spans(template, chat, ends, rendered=rendered, **options)
        # A token may begin with the space before an answer.
        return ids, touching(places, spans)

    def _template(self, name: str | None, has_tools: bool) -> Any:
        from mmjax.language.templates import ChatTemplate

        if name is not None and name not in self._templates:
            return ChatTemplate(name)
        name = name or ("tool_use" if has_tools and "tool_use" in self._templates else "default")
        if name not in self._templates:
            known = ", ".join(self._templates) or "none"
            raise DataError(
                f"the tokenizer has no chat template {name!r} (it has {known}): "
                "pass chat_template=, or put chat_template.jinja into its folder"
            )
        return ChatTemplate(*self._templates[name])

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


__all__ = ["Tokenizer", "train_clip_tokenizer"]
