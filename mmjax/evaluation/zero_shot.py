"""Zero-shot classification: class names become text embeddings, and images go to the nearest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmjax.errors import DataError
from mmjax.evaluation.embed import embed_texts
from mmjax.evaluation.metrics import class_labels, confusion_matrix, top_k_accuracy

# Prompt templates by name. One good prompt helps most; several, averaged, even out how photos differ.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "general": (
        "a photo of a {}.",
        "a close-up of a {}.",
        "a dark photo of a {}.",
        "a bright photo of a {}.",
        "a blurry photo of a {}.",
        "a cropped photo of a {}.",
        "a drawing of a {}.",
        "the {} in a photo.",
    ),
    "scene": ("a photo of a {}.", "a view of a {}.", "a {} seen from above."),
    "texture": ("a photo of a {} texture.", "a {} surface.", "something {}."),
}


@dataclass(frozen=True, kw_only=True)
class ZeroShotScores:
    """What a classifier says about N images.

    Attributes:
        logits: [N, C] float32: scaled (and for a pairwise model shifted) cosine similarities.
        probabilities: [N, C] float32: a softmax over the classes, or for a pairwise model an independent
            sigmoid per class.
        pairwise: whether classes were scored independently.
    """

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    pairwise: bool


def fill_templates(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template, classes outermost.

    Args:
        class_names: C names; none may be empty or given twice.
        templates: K texts that hold "{}".

    Returns:
        C * K texts.

    Raises:
        DataError: no name, no template, a name twice, an empty name, or a template without "{}".

    Example:
        >>> fill_templates(["cat", "dog"], ["a {}.", "the {}."])
        ['a cat.', 'the cat.', 'a dog.', 'the dog.']
    """
    if isinstance(class_names, str) or isinstance(templates, str):
        raise DataError("class names and templates are lists of texts, not one text")
    if not class_names or not templates:
        raise DataError("zero-shot classification needs at least one class name and one template")
    if any(not name.strip() for name in class_names):
        raise DataError("a class name is empty")
    seen: set[str] = set()
    for name in class_names:
        if name in seen:
            raise DataError(f"class name {name!r} is given twice")
        seen.add(name)
    for template in templates:
        if "{}" not in template:
            raise DataError(f"template {template!r} has no {{}} for the class name")
    # replace, not format: class names and templates may hold other braces.
    return [template.replace("{}", name) for name in class_names for template in templates]


def text_length(model: Any) -> int | None:
    """The number of text positions of a model with a text tower, None when its config does not say."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length is not None else None


def text_batches(
    processor: Any, texts: Sequence[str], batch_size: int, max_length: int | None
) -> Iterator[dict[str, Any]]:
    """Tokenize texts in batches of one shape, cut and padded to max_length.

    Args:
        processor: a callable with transformers' tokenizer arguments.
        texts: N texts.
        batch_size: rows of a batch; the last may have fewer.
        max_length: T; None leaves it to the tokenizer.

    Yields:
        {"input_ids": [B, T]} and what else the processor returns.
    """
    length = {} if max_length is None else {"max_length": max_length}
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        yield processor(text=batch, padding="max_length", truncation=True, **length)


def zero_shot_classifier(
    model: Any,
    params: Any,
    processor: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES["photo"],
    *,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """One embedding per class: the mean over templates of normalised text embeddings, normalised again.

    Args:
        model: a Linen module with `encode_text`.
        params: its parameters.
        processor: tokenizes (`processor(text=[...], padding=..., truncation=..., max_length=...)`).
        class_names: C names.
        templates: K texts that hold "{}".
        batch_size: texts per step.

    Returns:
        [C, E] float32, rows of length 1.

    Raises:
        DataError: as fill_templates and embed_texts.

    Source: CLIP (Radford et al., 2021), section 3.1.4, ensembling over the embedding space.

    Example:
        >>> from flax import linen as nn
        >>> class Ids(nn.Module):
        ...     def encode_text(self, input_ids, attention_mask=None, normalize=False):
        ...         return input_ids
        >>> def letters(text, **options):
        ...     return {"input_ids": np.array([[line.count("a"), line.count("b")] for line in text])}
        >>> zero_shot_classifier(Ids(), {}, letters, ["a", "b"], ["{}"]).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    texts = fill_templates(class_names, templates)
    size = min(batch_size, len(texts))
    embeds = embed_texts(model, params, text_batches(processor, texts, size, text_length(model)))
    mean = embeds.reshape(len(class_names), len(templates), -1).mean(axis=1)
    length = np.linalg.norm(mean, axis=-1, keepdims=True)
    return (mean / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)


def zero_shot_classify(params: Any, image_embeds: ArrayLike, classifier: ArrayLike) -> ZeroShotScores:
    """Score images against class embeddings with the model's own scale.

    A model with `logit_bias` (SigLIP) was trained on pairs, so each class has its own probability and they
    need not sum to one; without it (CLIP) they are a softmax over the classes.

    Args:
        params: the model's parameters; `logit_scale` is the logarithm of the multiplier.
        image_embeds: [N, E], rows of length 1.
        classifier: [C, E], rows of length 1.

    Returns:
        ZeroShotScores with [N, C] arrays.

    Raises:
        DataError: widths differ, a number is not finite, or the parameters hold no logit_scale.

    Example:
        >>> scores = zero_shot_classify({"logit_scale": np.log(2.0)}, [[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
        >>> scores.logits.round(3).tolist(), scores.probabilities.sum().round(3).item()
        ([[2.0, 0.0]], 1.0)
    """
    images, classes = np.asarray(image_embeds, np.float32), np.asarray(classifier, np.float32)
    if images.ndim != 2 or classes.ndim != 2 or images.shape[1] != classes.shape[1]:
        raise DataError(
            f"image embeddings {images.shape} and classifier {classes.shape} must share their width"
        )
    for what, embeds in (("image embeddings", images), ("class embeddings", classes)):
        broken = int((~np.isfinite(embeds).all(axis=1)).sum())
        if broken:
            raise DataError(f"{broken} of {len(embeds)} {what} are not finite")
    if "logit_scale" not in params:
        raise DataError("the parameters hold no logit_scale: zero-shot needs a model of images and texts")
    scale = np.exp(np.asarray(params["logit_scale"], np.float32)).reshape(())
    logits = scale * (images @ classes.T)
    if "logit_bias" not in params:
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return ZeroShotScores(
            logits=logits, probabilities=shifted / shifted.sum(axis=1, keepdims=True), pairwise=False
        )
    logits = logits + np.asarray(params["logit_bias"], np.float32).reshape(())
    # exp of a negative number only: neither branch overflows.
    small = np.exp(-np.abs(logits))
    return ZeroShotScores(
        logits=logits, probabilities=np.where(logits >= 0, 1, small) / (1 + small), pairwise=True
    )


@dataclass(frozen=True, kw_only=True)
class ZeroShotAccuracy:
    """How often the label was among the best classes.

    Attributes:
        accuracy: k -> share of images with their label among the k best classes.
        per_class: [C] float64: top-1 accuracy within each class, NaN for a class without images.
        confusion: [C, C] int64: rows are labels, columns predictions.
    """

    accuracy: dict[int, float]
    per_class: NDArray[np.float64]
    confusion: NDArray[np.int64]


def zero_shot_accuracy(logits: ArrayLike, labels: ArrayLike, ks: Sequence[int] = (1, 5)) -> ZeroShotAccuracy:
    """Top-k accuracy, accuracy per class, and the confusion matrix of zero-shot scores.

    Args:
        logits: [N, C].
        labels: [N] class numbers.
        ks: each at least 1.

    Returns:
        ZeroShotAccuracy.

    Raises:
        DataError: as top_k_accuracy.

    Example:
        >>> result = zero_shot_accuracy([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]], [0, 1, 1], ks=(1,))
        >>> round(result.accuracy[1], 4), result.per_class.tolist()
        (0.6667, [1.0, 0.5])
    """
    scores = np.asarray(logits)
    top = top_k_accuracy(scores, labels, ks)
    classes = scores.shape[1]
    confusion = confusion_matrix(scores.argmax(axis=1), class_labels(labels, classes), classes)
    counts = confusion.sum(axis=1)
    hits = np.diag(confusion).astype(np.float64)
    per_class = np.divide(hits, counts, out=np.full(classes, np.nan), where=counts > 0)
    return ZeroShotAccuracy(accuracy=top, per_class=per_class, confusion=confusion)
