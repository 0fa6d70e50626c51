"""Classification metrics on the host, in numpy: accuracy, top-k accuracy and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmjax.errors import DataError


def class_labels(labels: ArrayLike, num_classes: int, what: str = "labels") -> NDArray[np.int64]:
    """Check that labels are a vector of class numbers.

    Args:
        labels: [N] integers.
        num_classes: C; every label must lie in 0..C-1.
        what: the name to use in an error.

    Returns:
        [N] int64.

    Raises:
        DataError: the labels are not integers, not a vector, or out of range.
    """
    array = np.asarray(labels)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"{what} must be a vector of integers, got shape {array.shape} and dtype {array.dtype}"
        )
    if array.size and (array.min() < 0 or array.max() >= num_classes):
        raise DataError(
            f"{what} must lie in 0..{num_classes - 1}, got values from {array.min()} to {array.max()}"
        )
    return array.astype(np.int64)


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The share of predictions that equal their labels.

    Args:
        predictions: [N] class numbers.
        labels: [N] class numbers.

    Returns:
        A number in 0..1.

    Raises:
        DataError: the shapes differ, or there is nothing to count.

    Example:
        >>> accuracy([0, 1, 2, 2], [0, 1, 1, 2])
        0.75
    """
    predicted, wanted = np.asarray(predictions), np.asarray(labels)
    if predicted.shape != wanted.shape or predicted.ndim != 1:
        raise DataError(
            f"predictions {predicted.shape} and labels {wanted.shape} must be vectors of one length"
        )
    if not predicted.size:
        raise DataError("accuracy of no samples is undefined")
    return float(np.mean(predicted == wanted))


def label_ranks(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """How many other classes score at least as high as each sample's own class.

    Ties count against the sample, so a model that gives every class the same score gets nothing right.

    Args:
        scores: [N, C] float.
        labels: [N] class numbers.

    Returns:
        [N] int64; 0 means that the label has the highest score alone.

    Raises:
        DataError: shapes do not fit, labels are out of range, or a score is NaN.

    Example:
        >>> label_ranks([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]], [1, 0]).tolist()
        [0, 1]
    """
    matrix = np.asarray(scores)
    if matrix.ndim != 2:
        raise DataError(f"scores must be [samples, classes], got shape {matrix.shape}")
    wanted = class_labels(labels, matrix.shape[1])
    if len(wanted) != len(matrix):
        raise DataError(f"{len(matrix)} rows of scores but {len(wanted)} labels")
    if np.isnan(matrix).any():
        raise DataError(f"{int(np.isnan(matrix).any(axis=1).sum())} rows of scores hold NaN")
    own = np.take_along_axis(matrix, wanted[:, None], axis=1)
    return (matrix >= own).sum(axis=1).astype(np.int64) - 1


def top_k_accuracy(scores: ArrayLike, labels: ArrayLike, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """The share of samples whose label is among the k highest scores, for several k.

    Args:
        scores: [N, C] float.
        labels: [N] class numbers.
        ks: each at least 1; a k of C or more gives 1.0.

    Returns:
        k -> a number in 0..1; ties count against the sample (see label_ranks).

    Raises:
        DataError: as label_ranks; also when there are no samples or a k is below 1.

    Example:
        >>> top_k_accuracy([[0.1, 0.7, 0.2], [0.5, 0.4, 0.1]], [2, 0], ks=(1, 2))
        {1: 0.5, 2: 1.0}
    """
    if any(k < 1 for k in ks):
        raise DataError(f"top-k needs k of at least 1, got {list(ks)}")
    ranks = label_ranks(scores, labels)
    if not ranks.size:
        raise DataError("accuracy of no samples is undefined")
    classes = np.asarray(scores).shape[1]
    return {k: float(np.mean(ranks < k)) if k < classes else 1.0 for k in ks}


def confusion_matrix(predictions: ArrayLike, labels: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Count samples by label (rows) and prediction (columns).

    Args:
        predictions: [N] class numbers.
        labels: [N] class numbers.
        num_classes: C.

    Returns:
        [C, C] int64; row i, column j: samples of class i that were taken for class j.

    Raises:
        DataError: lengths differ or a class number is out of range.

    Example:
        >>> confusion_matrix([0, 1, 1], [0, 0, 1], num_classes=2).tolist()
        [[1, 1], [0, 1]]
    """
    predicted = class_labels(predictions, num_classes, "predictions")
    wanted = class_labels(labels, num_classes)
    if len(predicted) != len(wanted):
        raise DataError(f"{len(predicted)} predictions but {len(wanted)} labels")
    counts = np.bincount(wanted * num_classes + predicted, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes).astype(np.int64)
