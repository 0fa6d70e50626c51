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

    if len(images) != len(questions):
        raise DataError(f"{len(images)} images for {len(questions)} questions: give one for each")
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda number: len(questions[number]))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        # The last batch is filled up, so that its program is the others'.
        rows = [numbers[min(place, len(numbers) - 1)] for place in range(batch_size)]
        batch = processor(
            messages=[_asked(questions[number]) for number in rows],
            images=[[images[number]] for number in rows],
            padding=True,
        )
        tokens = np.asarray(generate(model, params, batch, max_new_tokens=max_new_tokens))
        said = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for number, text in zip(numbers, said, strict=False):
            answers[number] = text.strip()
    return answers


def attention_to_image(
    model: Any, params: Mapping[str, Any], processor: Any, image: Any, question: str
) -> np.ndarray:
    """How much the token before the answer looked at each feature of the image.

    Args:
        model, params, processor: of a LLaVA model whose images are one tile.
        image, question: what is asked.

    Returns:
        float32 [P], the mean over layers and heads, made to add up to 1.

    Raises:
        DataError: the prompt has no feature of an image.
    """
    batch = processor(messages=[_asked(question)], images=[[image]])
    out = model.apply({"params": params}, **batch, output_attentions=True)
    here = np.flatnonzero(np.asarray(batch["image_index"])[0, :, 0] >= 0)
    if not len(here):
        raise DataError("attention_to_image: the prompt has no feature of an image")
    last = np.mean([np.asarray(layer, np.float32)[0, :, -1, here] for layer in out.attentions], axis=0)
    seen = last.reshape(len(here), -1).mean(axis=-1)
    return (seen / seen.sum()).astype(np.float32)


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


def _asked(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
