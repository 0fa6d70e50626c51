"""Classification metrics against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from mmjax.errors import DataError
from mmjax.evaluation.metrics import accuracy, class_labels, confusion_matrix, label_ranks, top_k_accuracy


def test_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 7)), rng.integers(0, 7, 200)
    predicted = scores.argmax(axis=1)
    assert accuracy(predicted, labels) == reference.accuracy_score(labels, predicted)
    for k, value in top_k_accuracy(scores, labels, (1, 2, 5)).items():
        assert value == reference.top_k_accuracy_score(labels, scores, k=k)
    wanted = reference.confusion_matrix(labels, predicted, labels=range(7))
    np.testing.assert_array_equal(confusion_matrix(predicted, labels, 7), wanted)


def test_ties_count_against_the_sample():
    scores = np.zeros((3, 4))
    np.testing.assert_array_equal(label_ranks(scores, [0, 1, 3]), [3, 3, 3])
    assert top_k_accuracy(scores, [0, 1, 3], (1, 3)) == {1: 0.0, 3: 0.0}


def test_k_of_every_class_always_holds_the_label():
    assert top_k_accuracy(np.zeros((2, 3)), [0, 2], (3, 10)) == {3: 1.0, 10: 1.0}


def test_classes_without_samples_keep_their_row():
    np.testing.assert_array_equal(confusion_matrix([2], [0], 3), [[0, 0, 1], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy([], []), "no samples"),
        (lambda: accuracy([1, 2], [1]), "one length"),
        (lambda: accuracy([[1]], [[1]]), "vectors"),
        (lambda: class_labels([0.5], 2), "integers"),
        (lambda: class_labels([[0]], 2), "vector"),
        (lambda: class_labels([0, 2], 2), r"0\.\.1, got values from 0 to 2"),
        (lambda: class_labels([-1], 2), "0..1"),
        (lambda: label_ranks([1.0], [0]), r"\[samples, classes\]"),
        (lambda: label_ranks([[1.0, 2.0]], [0, 1]), "1 rows of scores but 2 labels"),
        (lambda: label_ranks([[np.nan, 2.0]], [0]), "1 rows of scores hold NaN"),
        (lambda: top_k_accuracy([[1.0, 2.0]], [0], (0,)), "at least 1"),
        (lambda: top_k_accuracy(np.zeros((0, 2)), np.zeros(0, int)), "no samples"),
        (lambda: confusion_matrix([0], [0, 1], 2), "1 predictions but 2 labels"),
        (lambda: confusion_matrix([5], [0], 2), "predictions must lie"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(DataError, match=message):
        call()
