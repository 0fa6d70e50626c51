"""Zero-shot classification against the formulas written out."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mmjax.errors import DataError
from mmjax.evaluation import TEMPLATES, zero_shot_accuracy, zero_shot_classifier, zero_shot_classify
from mmjax.evaluation.zero_shot import fill_templates, text_length
from tests.evaluation.fakes import Letters, TwoTowers, unit

NAMES = ["cat", "dog", "red fox"]
TEMPLATE_LIST = ["a {}.", "the {}", "{}!"]


@pytest.fixture(scope="module")
def params():
    pixels, ids = np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 8), np.int32)
    return TwoTowers().init(jax.random.key(0), pixels, ids)["params"]


def test_classifier_is_the_normalised_mean_of_normalised_embeddings(params):
    found = zero_shot_classifier(TwoTowers(), params, Letters(), NAMES, TEMPLATE_LIST, batch_size=4)
    table = np.asarray(params["words"]["embedding"], np.float64)
    for name, row in zip(NAMES, found, strict=True):
        texts = [template.replace("{}", name)[:8] for template in TEMPLATE_LIST]
        wanted = unit(np.mean([unit(table[[ord(c) for c in text]].sum(axis=0)) for text in texts], axis=0))
        np.testing.assert_allclose(row, wanted, atol=1e-6)


def test_texts_are_cut_and_padded_to_one_length(params):
    letters = Letters()
    zero_shot_classifier(TwoTowers(), params, letters, NAMES, TEMPLATE_LIST, batch_size=4)
    assert [len(call[0]) for call in letters.calls] == [4, 4, 1]
    assert {call[1:3] for call in letters.calls} == {("max_length", True)}


def test_text_length_comes_from_the_text_tower():
    class Config:
        max_position_embeddings = 77

    class Joint:
        text_config = Config()

    assert text_length(type("Model", (), {"config": Joint()})()) == 77
    assert text_length(type("Model", (), {"config": Config()})()) == 77
    assert text_length(TwoTowers()) is None


def test_softmax_over_classes_without_a_bias():
    rng = np.random.default_rng(0)
    images, classes = unit(rng.normal(size=(4, 5))), unit(rng.normal(size=(3, 5)))
    scores = zero_shot_classify({"logit_scale": np.float32(np.log(100.0))}, images, classes)
    logits = 100 * images @ classes.T
    wanted = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(scores.logits, logits, atol=1e-4)
    np.testing.assert_allclose(scores.probabilities, wanted / wanted.sum(1, keepdims=True), atol=1e-5)
    assert not scores.pairwise and scores.probabilities.dtype == np.float32


def test_independent_sigmoids_with_a_bias():
    rng = np.random.default_rng(0)
    images, classes = unit(rng.normal(size=(4, 5))), unit(rng.normal(size=(3, 5)))
    params = {"logit_scale": np.full(1, np.log(100.0)), "logit_bias": np.full(1, -12.0)}
    scores = zero_shot_classify(params, images, classes)
    logits = 100 * images @ classes.T - 12
    np.testing.assert_allclose(scores.logits, logits, atol=1e-4)
    np.testing.assert_allclose(scores.probabilities, 1 / (1 + np.exp(-logits)), atol=1e-5)
    assert scores.pairwise and scores.probabilities.dtype == np.float32


def test_extreme_logits_neither_overflow_nor_warn():
    same, opposite = np.eye(2), -np.eye(2)
    for extra in ({}, {"logit_bias": np.zeros(1)}):
        params = {"logit_scale": np.log(1e4), **extra}
        for classes in (same, opposite):
            assert np.isfinite(zero_shot_classify(params, same, classes).probabilities).all()


def test_accuracy_by_class_with_a_class_that_has_no_image():
    result = zero_shot_accuracy([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 0.5]], [0, 1, 1], ks=(1, 2))
    assert result.accuracy == {1: pytest.approx(2 / 3), 2: 1.0}
    np.testing.assert_array_equal(result.per_class, [1.0, 0.5, np.nan])
    np.testing.assert_array_equal(result.confusion, [[1, 0, 0], [1, 1, 0], [0, 0, 0]])


def test_every_named_template_set_can_be_filled():
    for templates in TEMPLATES.values():
        assert len(set(fill_templates(["x"], templates))) == len(templates)


def test_braces_in_names_and_templates_are_only_text():
    assert fill_templates(["{a}", "%s"], ["{0} {} \\"]) == ["{0} {a} \\", "{0} %s \\"]


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "at least one"),
        (["a"], [], "at least one"),
        (["a", " "], ["{}"], "empty"),
        (["a", "b", "a"], ["{}"], "'a' is given twice"),
        (["a"], ["a photo"], "'a photo' has no {}"),
        ("ab", ["{}"], "lists of texts"),
        (["a"], "{}", "lists of texts"),
    ],
)
def test_bad_names_and_templates(names, templates, message):
    with pytest.raises(DataError, match=message):
        fill_templates(names, templates)


def test_bad_scores():
    with pytest.raises(DataError, match="share their width"):
        zero_shot_classify({"logit_scale": 0.0}, np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(DataError, match="1 of 2 class embeddings are not finite"):
        zero_shot_classify({"logit_scale": 0.0}, np.zeros((2, 3)), [[0, 0, 0], [0, np.nan, 0]])
    with pytest.raises(DataError, match="no logit_scale"):
        zero_shot_classify({}, np.zeros((2, 3)), np.zeros((2, 3)))
