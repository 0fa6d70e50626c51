"""`mmjax.score` against the model's own log-probabilities."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.errors import MmjaxError
from mmjax.generation import scoring
from tests.generation.seeing import make, picture
from tests.generation.tiny import BY_LENGTH, language_model, model_by_length, prompts, table

ANSWERS = [[[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, ids):
    return model.apply({"params": params}, ids).logits


def expected(model, params, prompt, answer):
    """Log-probabilities of an answer's tokens, the whole text computed at once without a cache."""
    ids = np.concatenate([prompt, answer])[None]
    likely = jax.nn.log_softmax(forward(model, params, ids)[0])
    return likely[np.arange(len(prompt) - 1, ids.size - 1), ids[0, len(prompt) :]]


def test_answers_of_several_lengths():
    model, params = language_model()
    batch = prompts((7, 4), "right")
    scores = mmjax.score(model, params, batch, ANSWERS)
    assert scores.tokens.shape == (2, 2, 4) and scores.mask.sum(axis=-1).tolist() == [[3, 1], [2, 4]]
    for row in range(2):
        prompt = batch["input_ids"][row][batch["attention_mask"][row] > 0]
        for column, answer in enumerate(ANSWERS[row]):
            found = scores.tokens[row, column]
            wanted = expected(model, params, prompt, answer)
            np.testing.assert_allclose(found[: len(answer)], wanted, atol=2e-5)
            assert not found[len(answer) :].any()
            np.testing.assert_allclose(scores.total[row, column], wanted.sum(), atol=5e-5)
            np.testing.assert_allclose(scores.mean[row, column], wanted.mean(), atol=2e-5)


@pytest.mark.parametrize("kind", BY_LENGTH)
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_whose_length_turns_their_tokens(kind, side, monkeypatch):
    """Beyond the original context, 8 tokens here, prompts are read again with each answer; up to it, once."""
    model, params = model_by_length(kind)
    batch = prompts((7, 4), side)
    run, wholes = scoring._score, []

    def watched(*arguments, whole, **options):
        wholes.append(whole)
        return run(*arguments, whole=whole, **options)

    monkeypatch.setattr(scoring, "_score", watched)
    for answers in ([[[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14, 15, 16]]], [[[5], [8]], [[9], [11]]]):
        scores = mmjax.score(model, params, batch, answers)
        for row in range(2):
            prompt = batch["input_ids"][row][batch["attention_mask"][row] > 0]
            for column, answer in enumerate(answers[row]):
                wanted = expected(model, params, prompt, answer)
                np.testing.assert_allclose(scores.tokens[row, column][: len(answer)], wanted, rtol=1e-5)
    assert wholes == [True, False]


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_images_in_texts_whose_length_turns_their_tokens(kind):
    model, params, processor = make("llava")
    batch = processor(images=[[picture(8, 8)]], text="<image>What is this?")
    start = batch["input_ids"].shape[1]
    # The prompt alone is not longer than the original context.
    scaling = dataclasses.replace(BY_LENGTH[kind], original_max_position_embeddings=start)
    text = dataclasses.replace(model.config.text_config, rope_scaling=scaling)
    model = model.clone(config=dataclasses.replace(model.config, text_config=text))
    answers = [[[5, 6, 7], [8]]]
    scores = mmjax.score(model, params, batch, answers)
    for column, answer in enumerate(answers[0]):
        ids = np.concatenate([batch["input_ids"], [answer]], axis=1)
        index = np.pad(batch["image_index"], ((0, 0), (0, len(answer)), (0, 0)), constant_values=-1)
        whole = {**batch, "input_ids": ids, "image_index": index, "attention_mask": np.ones_like(ids)}
        likely = jax.nn.log_softmax(model.apply({"params": params}, **whole).logits[0])
        wanted = likely[np.arange(start - 1, ids.size - 1), ids[0, start:]]
        np.testing.assert_allclose(scores.tokens[0, column][: len(answer)], wanted, rtol=1e-5)


def test_a_table_by_hand_and_answers_as_an_array():
    never = 1e-30
    rows = [[0.5, 0.25, 0.25, *[never] * 3], [0.1, 0.9, *[never] * 4], *[[1 / 6] * 6] * 4]
    model, params = table(np.log(rows))
    answers = np.array([[[1, 0, -100], [0, 0, 0], [3, -100, -100]]])
    scores = mmjax.score(model, params, {"input_ids": [[4, 0]]}, answers)
    np.testing.assert_allclose(np.exp(scores.total), [[0.25 * 0.1, 0.125, 0.0]], rtol=1e-5, atol=1e-20)
    assert scores.mask.tolist() == [[[True, True, False], [True] * 3, [True, False, False]]]


@pytest.mark.parametrize("length", [6, 300])
def test_preferences_can_be_learned(length):
    """The gradient through the cache is that of the plain forward, long prompts read in pieces included."""
    model, params = language_model()
    batch, answers = prompts((length,)), [[[5, 6, 7], [8, 9, 10]]]

    def margin(params):
        total = mmjax.score(model, params, batch, answers).total
        return total[0, 0] - total[0, 1]

    def plain(params):
        chosen, rejected = (expected(model, params, batch["input_ids"][0], a).sum() for a in answers[0])
        return chosen - rejected

    ours, theirs = (jax.jit(jax.grad(function))(params) for function in (margin, plain))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize(
    "answers, words",
    [
        (5, "answers: expected, for each prompt, a list"),
        ([[[5]]], "answers: 2 prompts need the same number of answers each, got [1]"),
        ([[[5]], [[5], [6]]], "answers: 2 prompts need the same number of answers each, got [1, 2]"),
        ([[], []], "answers: 2 prompts need"),
        ([[[5]], [[]]], "answers: answer 0 to prompt 1 is not a list of at least one token id"),
        ([[[5]], [[0.5]]], "answers: answer 0 to prompt 1"),
        ([[[5]], [[40]]], "answers: id 40 is outside the model's vocabulary of 40"),
        ([[[5]], [[5] * 5000]], "4 tokens and 5000 new ones are more than the model's 4096"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_refused(answers, words):
    model, params = language_model()
    with pytest.raises(MmjaxError) as caught:
        mmjax.score(model, params, prompts((4, 2)), answers)
    assert words in str(caught.value) and "\n" not in str(caught.value)
