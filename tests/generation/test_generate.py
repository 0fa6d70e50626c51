"""`mmjax.generate`: where texts end, what they depend on, what compiles, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.errors import MmjaxError
from mmjax.generation import BeamSearch, Greedy, Sampling
from mmjax.generation.loop import Controls, begin, generate_whole, resume, step
from mmjax.generation.prompts import prepare
from mmjax.models import ViTModel
from tests.generation.tiny import language_model, prompts, table
from tests.tiny import MODELS, random_params

KEY = jax.random.key(3)
# After 1 comes 2, then 3, 4, 5 (which ends texts); after 0 comes 0.
CHAIN = 9.0 * np.eye(6)[[0, 2, 3, 4, 5, 1]]


def row_of(batch, row, keep=slice(None)):
    """One row without its padding."""
    ids = batch["input_ids"][row][batch["attention_mask"][row] > 0]
    return {"input_ids": ids[None, keep]}


def test_texts_end_at_stop_ids():
    model, params = table(CHAIN)
    batch = {"input_ids": [[1, 3], [2, 1], [0, 0]]}
    tokens = mmjax.generate(model, params, batch, 7)
    assert tokens.dtype == jnp.int32
    assert tokens.tolist() == [[4, 5, 0, 0, 0, 0, 0], [2, 3, 4, 5, 0, 0, 0], [0] * 7]
    several = mmjax.generate(model, params, batch, 4, stop_ids=[4, 3], pad_id=1)
    assert several.tolist() == [[4, 1, 1, 1], [2, 3, 1, 1], [0] * 4]
    endless = mmjax.generate(model, params, batch, 4, stop_ids=())
    assert endless.tolist() == [[4, 5, 1, 2], [2, 3, 4, 5], [0] * 4]


def test_the_loop_stops_when_all_rows_have():
    """And no sooner: the state says how many steps there were, and the cache how many tokens."""
    model, params = table(CHAIN)
    inputs = {"input_ids": jnp.array([[2], [3]]), "attention_mask": jnp.ones((2, 1), jnp.int32)}
    controls = Controls(None, {}, jnp.array([5]), jnp.int32(0), jnp.int32(16))
    plan = Greedy().plan()
    logits = params["table"][inputs["input_ids"][:, 0]]
    cache = model.init_cache(2, 32, jnp.float32)
    state = resume(
        params,
        controls,
        begin(plan, controls, logits, cache, inputs, 1, 16),
        np.int32(16),
        model=model,
        plan=plan,
    )
    assert int(state.step) == 3 and bool(state.done.all())
    # Rows hold the new tokens they needed and never the last one: 3, 4 of the first, 4 of the second.
    assert state.cache.mask.sum(axis=1).tolist() == [2, 1] and int(state.cache.cursor) == 2
    assert state.token.tolist() == [5, 5]
    further = step(model, plan, params, controls, state)
    assert further.tokens.tolist() == state.tokens.tolist()


@pytest.mark.parametrize(
    "sampler",
    [Greedy(repetition_penalty=1.4), Sampling(temperature=1.5, top_k=20), BeamSearch(num_beams=3)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_text_does_not_depend_on_its_batch(sampler):
    """Nor on the side and the amount of padding."""
    model, params = language_model()
    lengths = (9, 3, 21)
    together = mmjax.generate(model, params, prompts(lengths), 12, sampler, KEY)
    right = mmjax.generate(model, params, prompts(lengths, "right"), 12, sampler, KEY)
    np.testing.assert_array_equal(together, right)
    for row in range(3):
        alone = mmjax.generate(model, params, row_of(prompts(lengths), row), 12, sampler, KEY)
        np.testing.assert_array_equal(alone[0], together[row])
    wide = {name: np.pad(value, ((0, 0), (40, 0))) for name, value in prompts(lengths).items()}
    np.testing.assert_array_equal(mmjax.generate(model, params, wide, 12, sampler, KEY), together)


def test_keys_and_samples():
    model, params = language_model()
    batch, sampler = prompts((4, 6)), Sampling(temperature=2.0)
    texts = np.asarray(
        mmjax.generate(model, params, batch, 10, sampler, KEY, num_return_sequences=3, stop_ids=())
    )
    assert texts.shape == (6, 10)
    # Sample 0 is what one sample would be, and the others are others.
    one = mmjax.generate(model, params, batch, 10, sampler, KEY, stop_ids=())
    np.testing.assert_array_equal(one, texts[::3])
    assert len({tuple(row) for row in texts.tolist()}) == 6
    again = mmjax.generate(model, params, batch, 10, sampler, jax.random.key(4), stop_ids=())
    assert (np.asarray(again) != np.asarray(one)).any(axis=1).all()
    # A longer text begins with the shorter one.
    longer = mmjax.generate(model, params, batch, 20, sampler, KEY, stop_ids=())
    np.testing.assert_array_equal(longer[:, :10], one)
    same = {"input_ids": np.repeat(batch["input_ids"][1:], 2, axis=0)}
    texts = np.asarray(
        mmjax.generate(model, params, same, 10, sampler, jax.random.split(KEY, 2), stop_ids=())
    )
    assert (texts[0] != texts[1]).any()


def test_samples_are_distributed_as_the_model_says():
    """First and second tokens against the table's probabilities, by chi-square at 0.1 %."""
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 1, (6, 6))
    model, params = table(rows)
    count, temperature = 4000, 1.3
    tokens = np.asarray(
        mmjax.generate(
            model,
            params,
            {"input_ids": [[1]]},
            2,
            Sampling(temperature=temperature, top_k=5),
            KEY,
            stop_ids=(),
            num_return_sequences=count,
        )
    )

    def expected(token):
        logits = np.where(rows[token] < np.sort(rows[token])[1], -np.inf, rows[token] / temperature)
        share = np.exp(logits - logits.max())
        return share / share.sum()

    for found, share in (
        (np.bincount(tokens[:, 0], minlength=6), expected(1)),
        *(
            (np.bincount(tokens[tokens[:, 0] == first, 1], minlength=6), expected(first))
            for first in np.unique(tokens[:, 0])
        ),
    ):
        kept = share > 0
        assert found[~kept].sum() == 0
        wanted = share[kept] * found.sum()
        # Four degrees of freedom: above 18.47 in one of a thousand cases.
        assert ((found[kept] - wanted) ** 2 / wanted).sum() < 18.47


def test_embeddings_in_place_of_ids():
    model, params = language_model()
    batch = prompts((5, 8))
    embeds = model.apply({"params": params}, batch["input_ids"], method="embed_tokens")
    tokens = mmjax.generate(
        model, params, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}, 8
    )
    np.testing.assert_array_equal(tokens, mmjax.generate(model, params, batch, 8))


def test_a_hundred_lengths_compile_few_programs():
    """And other numbers of a sampler, keys, stop ids and limits none at all."""
    model, params = table(CHAIN)
    lengths = np.random.default_rng(7).integers(1, 2000, 100)
    before = generate_whole._cache_size()
    for length in lengths:
        batch = {"input_ids": np.full((1, length), 3)}
        mmjax.generate(model, params, batch, 1, Sampling(temperature=0.5), KEY, stop_ids=())
    assert 6 <= generate_whole._cache_size() - before <= 8
    before = generate_whole._cache_size()
    for number in range(2, 5):
        batch, key = {"input_ids": np.full((1, 100 + number), 3)}, jax.random.key(number)
        mmjax.generate(
            model, params, batch, number, Sampling(temperature=0.1 * number), key, stop_ids=range(number)
        )
    assert generate_whole._cache_size() == before


def test_prompts_are_aligned_and_keep_what_is_between():
    batch = {
        "input_ids": np.array([[0, 4, 5, 6, 0], [7, 8, 9, 0, 0]]),
        "attention_mask": np.array([[0, 1, 0, 1, 0], [1, 1, 1, 0, 0]]),
        "token_type_ids": np.array([[0, 1, 2, 3, 0], [1, 1, 0, 0, 0]]),
        "pixel_values": np.ones((2, 5, 3)),
    }
    prompts = prepare(batch)
    assert prompts.length == 3 and prompts.inputs["input_ids"].shape == (2, 16)
    assert prompts.inputs["input_ids"][:, :4].tolist() == [[4, 5, 6, 0], [7, 8, 9, 0]]
    assert prompts.inputs["attention_mask"][:, :4].tolist() == [[1, 0, 1, 0], [1, 1, 1, 0]]
    assert prompts.inputs["token_type_ids"][:, :4].tolist() == [[1, 2, 3, 0], [1, 1, 0, 0]]
    assert prompts.inputs["pixel_values"] is batch["pixel_values"]


IDS = {"input_ids": [[3, 4]]}
SAMPLE = Sampling()


@pytest.mark.parametrize(
    "batch, options, words",
    [
        ({}, {}, "batch: give input_ids or inputs_embeds"),
        ({"input_ids": np.zeros((1, 0), int)}, {}, "input_ids: expected rows of at least one token"),
        ({"input_ids": [3, 4]}, {}, "input_ids: expected rows"),
        ({"input_ids": [[0.5]]}, {}, "input_ids: expected whole numbers, got float64"),
        ({"input_ids": [[40]]}, {}, "input_ids: id 40 is outside the model's vocabulary of 40"),
        ({**IDS, "attention_mask": [[0, 0]]}, {}, "attention_mask: row 0 has no token"),
        ({**IDS, "attention_mask": [[1]]}, {}, "attention_mask: shape (1, 1), but input_ids has (1, 2)"),
        ({**IDS, "token_type_ids": [[1]]}, {}, "token_type_ids: shape (1, 1)"),
        ({**IDS, "position_ids": [[0, 1]]}, {}, "position_ids: positions are counted here"),
        (IDS, {"max_new_tokens": 0}, "max_new_tokens: 0 is not a whole number of at least 1"),
        (IDS, {"max_new_tokens": 5000}, "2 tokens and 5000 new ones are more than the model's 4096"),
        (IDS, {"sampler": "greedy"}, "sampler: 'greedy' is not Greedy, Sampling or BeamSearch"),
        (IDS, {"sampler": SAMPLE}, "key: sampling needs one"),
        (IDS, {"sampler": SAMPLE, "key": 3}, "key: not a PRNG key"),
        (IDS, {"sampler": SAMPLE, "key": jax.random.split(KEY, 3)}, "key: shape (3,)"),
        (IDS, {"stop_ids": [-1]}, "stop_ids: -1 is not a token id"),
        (IDS, {"num_return_sequences": 2}, "num_return_sequences: a greedy text has no others"),
        (IDS, {"num_return_sequences": 0}, "num_return_sequences: 0 is not a whole number"),
        (
            IDS,
            {"num_return_sequences": 3, "sampler": BeamSearch(num_beams=2)},
            "num_return_sequences: 3 of only 2 beams",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_refused(batch, options, words):
    model, params = language_model()
    with pytest.raises(MmjaxError) as caught:
        mmjax.generate(model, params, batch, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Sampling(temperature=0), "temperature: 0 is not a number above 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature: nan"),
        (lambda: Sampling(temperature=None), "temperature: None"),
        (lambda: Sampling(top_p=0.0), "top_p: 0.0 is not a number above 0 and at most 1"),
        (lambda: Sampling(top_p=1.1), "top_p: 1.1"),
        (lambda: Sampling(min_p=-0.1), "min_p: -0.1"),
        (lambda: Sampling(top_k=0), "top_k: 0 is not a whole number of at least 1"),
        (lambda: Sampling(top_k=2.0), "top_k: 2.0"),
        (lambda: Greedy(repetition_penalty=0), "repetition_penalty: 0"),
        (lambda: Greedy(repetition_penalty=float("inf")), "repetition_penalty: inf"),
        (lambda: BeamSearch(num_beams=0), "num_beams: 0"),
        (lambda: BeamSearch(length_penalty="1"), "length_penalty: '1'"),
        (lambda: BeamSearch(early_stopping="always"), "early_stopping: 'always'"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_samplers_check_their_numbers(make, words):
    with pytest.raises(MmjaxError) as caught:
        make()
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_model_without_a_cache():
    model = MODELS["ViTModel"]
    assert isinstance(model, ViTModel)
    with pytest.raises(MmjaxError, match="model: a ViTModel does not generate text"):
        mmjax.generate(model, random_params(model), IDS)
