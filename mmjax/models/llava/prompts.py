"""Prompts of models that see: conversations to ids, and texts that are cut without cutting images."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mmjax.errors import DataError

Sample = dict[str, np.ndarray]


def chat_ids(
    tokenizer: Any, messages: Any, answers: bool, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids of a conversation as one prompt.

    Args:
        tokenizer: with a chat template.
        messages: without images; their places are parts {"type": "image"}.
        answers: whether to say also what the assistant says.
        options: of `Tokenizer.apply_chat_template`.

    Returns:
        int32 [T], with one id for each image, and int32 [T] or None.
    """
    messages = _shaped(tokenizer, messages, options.get("chat_template"))
    batch = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=answers, **options)
    ids = batch["input_ids"][0]
    mask = batch["assistant_masks"][0] if answers else None
    # The template's text is a prompt like any other: it gets what the tokenizer puts around texts.
    if tokenizer.bos_token_id is None or not len(ids) or ids[0] != tokenizer.bos_token_id:
        before, after = _around(tokenizer)
        ids = np.concatenate([before, ids, after]).astype(np.int32)
        if mask is not None:
            mask = np.pad(mask, (len(before), len(after)))
    return ids, mask


@functools.lru_cache(maxsize=32)
def _around(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The special tokens that a tokenizer puts before and after texts."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    whole = tokenizer("a")["input_ids"][0]
    for start in range(len(whole) - len(plain) + 1):
        if (whole[start : start + len(plain)] == plain).all():
            return whole[:start], whole[start + len(plain) :]
    return whole[:0], whole[:0]


def _shaped(tokenizer: Any, messages: Any, template: str | None) -> Any:
    """Messages whose texts are parts, where the template reads nothing else."""
    if not _wants_parts(tokenizer, template):
        return messages
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message, dict) and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


@functools.lru_cache(maxsize=32)
def _wants_parts(tokenizer: Any, template: str | None) -> bool:
    """Whether a chat template shows texts that are parts of a content, and not a content that is a text."""
    probe = "\u00b6probe\u00b6"

    def reads(content: Any) -> bool:
        chat = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
        except DataError:
            return False
        return probe in text and "'type'" not in text

    return not reads(probe) and reads([{"type": "text", "text": probe}])


def cut(sample: Sample, limit: int, side: str) -> Sample:
    """The first or last tokens of a sample; images stay whole.

    >>> sample = {"input_ids": np.arange(3), "image_index": np.full((3, 1), -1)}
    >>> cut(sample, 2, "right")["input_ids"].tolist()
    [0, 1]
    """
    length = len(sample["input_ids"])
    if length <= limit:
        return sample
    keep = slice(0, limit) if side == "right" else slice(length - limit, length)
    lost = np.ones(length, bool)
    lost[keep] = False
    if (sample["image_index"][lost, 0] >= 0).any():
        raise DataError(
            f"max_length: {limit} of {length} tokens would cut an image; give a longer max_length, fewer or "
            "smaller images"
        )
    return {
        name: value[keep]
        if name in ("input_ids", "image_index", "image_weights", "assistant_masks")
        else value
        for name, value in sample.items()
    }


__all__ = ["chat_ids", "cut"]
