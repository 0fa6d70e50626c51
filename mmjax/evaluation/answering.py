"""Answers to questions about images, in batches, and what a model looked at while it answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.errors import DataError


def answer_questions(
    model: Any,
    params: Mapping[str, Any],
    processor: Any,
    images: Sequence[Any],
    questions: Sequence[str],
    *,
    max_new_tokens: int = 8,
    batch_size: int = 128,
) -> list[str]:
    """The greedy answers of a model that sees to questions, each about an image of its own.

    Each question is the first of a conversation, in the processor's chat template. Questions of about the
    same length are answered together, so that few programs are compiled.

    Args:
        model: as `Llava`.
        params: its parameters.
        processor: the model's.
        images: N of them, as the processor takes them.
        questions: N texts.
        max_new_tokens: of an answer; what is longer is cut.
        batch_size: questions that are answered together.

    Returns:
        N texts, without special tokens and white space around them.

    Raises:
        DataError: not as many images as questions, or what the processor refuses.
    """
    from mmjax.generation import generate

    _check_pairs(images, questions)
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda number: len(questions[number]))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        # The last batch is filled up, so that its program is the others'.
        rows = [numbers[min(place, len(numbers) - 1)] for place in range(batch_size)]
        batch = _prompts(processor, [images[row] for row in rows], [questions[row] for row in rows])
        tokens = np.asarray(generate(model, params, batch, max_new_tokens=max_new_tokens))
        said = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for number, text in zip(numbers, said, strict=False):
            answers[number] = text.strip()
    return answers


def attention_to_images(
    model: Any, params: Mapping[str, Any], processor: Any, images: Sequence[Any], questions: Sequence[str]
) -> list[np.ndarray]:
    """How much the token before an answer looked at each feature of the image.

    Args:
        model, params, processor: of a LLaVA model whose images are one tile.
        images: N of them, as the processor takes them.
        questions: N texts, each about an image of its own.

    Returns:
        For each question float32 [P], the mean over layers and heads, made to add up to 1.

    Raises:
        DataError: not as many images as questions, or a prompt has no feature of an image.
    """
    import jax

    _check_pairs(images, questions)
    batch = dict(_prompts(processor, images, questions))
    look = jax.jit(lambda params, batch: model.apply({"params": params}, **batch, output_attentions=True))
    layers = [np.asarray(layer, np.float32) for layer in look(params, batch).attentions]
    ends = batch["attention_mask"].shape[1] - 1 - np.argmax(batch["attention_mask"][:, ::-1], axis=1)
    found = []
    for row, end in enumerate(ends):
        here = np.flatnonzero(np.asarray(batch["image_index"])[row, :, 0] >= 0)
        if not len(here):
            raise DataError("attention_to_images: the prompt has no feature of an image")
        seen = np.mean([layer[row, :, end, here] for layer in layers], axis=(0, 2))
        found.append((seen / seen.sum()).astype(np.float32))
    return found


def accuracy_by_kind(kinds: Iterable[str], answers: Iterable[str], truths: Iterable[str]) -> dict[str, float]:
    """Share of right answers by kind of question, and of all questions.

    >>> accuracy_by_kind(["color", "color", "count"], ["red", "blue", "two"], ["red", "red", "two"])
    {'all': 0.6666666666666666, 'color': 0.5, 'count': 1.0}
    """
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for kind, answer, truth in zip(kinds, answers, truths, strict=True):
        right["all"].append(answer == truth)
        right[kind].append(answer == truth)
    return {kind: float(np.mean(found)) for kind, found in sorted(right.items())}


def _check_pairs(images: Sequence[Any], questions: Sequence[str]) -> None:
    if len(images) != len(questions):
        raise DataError(f"{len(images)} images for {len(questions)} questions: give one for each")


def _prompts(processor: Any, images: Sequence[Any], questions: Sequence[str]) -> Any:
    """A batch of questions, each with its image."""
    turns = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    return processor(
        messages=[[{"role": "user", "content": turn}] for turn in turns],
        images=[[image] for image in images],
        padding=True,
    )
