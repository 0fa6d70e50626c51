"""Metrics and probes: embeddings, zero-shot classification, linear probe, retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax.evaluation.answering import accuracy_by_kind, answer_questions, attention_to_images
    from mmjax.evaluation.embed import embed_images, embed_texts
    from mmjax.evaluation.linear_probe import LinearProbe, fit_linear_probe
    from mmjax.evaluation.metrics import accuracy, confusion_matrix, label_ranks, top_k_accuracy
    from mmjax.evaluation.reading import Reading, embed_examples, evaluate_retrieval
    from mmjax.evaluation.retrieval import RetrievalMetrics, retrieval_metrics
    from mmjax.evaluation.zero_shot import (
        TEMPLATES,
        ZeroShotAccuracy,
        ZeroShotScores,
        zero_shot_accuracy,
        zero_shot_classifier,
        zero_shot_classify,
    )

_HOMES = {
    "answering": ("accuracy_by_kind", "answer_questions", "attention_to_images"),
    "embed": ("embed_images", "embed_texts"),
    "linear_probe": ("LinearProbe", "fit_linear_probe"),
    "metrics": ("accuracy", "confusion_matrix", "label_ranks", "top_k_accuracy"),
    "reading": ("Reading", "embed_examples", "evaluate_retrieval"),
    "retrieval": ("RetrievalMetrics", "retrieval_metrics"),
    "zero_shot": (
        "TEMPLATES",
        "ZeroShotAccuracy",
        "ZeroShotScores",
        "zero_shot_accuracy",
        "zero_shot_classifier",
        "zero_shot_classify",
    ),
}

__getattr__, __dir__ = attach(__name__, _HOMES)

__all__ = [
    "TEMPLATES",
    "LinearProbe",
    "Reading",
    "RetrievalMetrics",
    "ZeroShotAccuracy",
    "ZeroShotScores",
    "accuracy",
    "accuracy_by_kind",
    "answer_questions",
    "attention_to_images",
    "confusion_matrix",
    "embed_examples",
    "embed_images",
    "embed_texts",
    "evaluate_retrieval",
    "fit_linear_probe",
    "label_ranks",
    "retrieval_metrics",
    "top_k_accuracy",
    "zero_shot_accuracy",
    "zero_shot_classifier",
    "zero_shot_classify",
]
