"""Long prompts are read in pieces: the same logits and cache as in one, and no more than they need."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.generation.prefill import read_prompt
from mmjax.generation.prompts import prepare
from mmjax.language import DecoderConfig
from mmjax.models import CausalLM
from mmjax.nn.rope import DynamicScaling
from tests.generation.tiny import SIZES
from tests.tiny import random_params


def model_of(**changes):
    model = CausalLM(DecoderConfig(**{**SIZES, "max_position_embeddings": 4096, **changes}))
    return model, random_params(model)


def batch_of(*lengths):
    numbers = np.random.default_rng(0)
    mask = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    ids = numbers.integers(3, SIZES["vocab_size"], mask.shape)
    return {"input_ids": ids * mask, "attention_mask": mask.astype(np.int32)}


@pytest.mark.parametrize("lengths", [(257, 40), (384, 383), (513, 129), (601, 600), (1024, 1)])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("fresh", [True, False])
def test_pieces_are_the_whole(lengths, window, fresh):
    model, params = model_of(sliding_window=window)
    batch = batch_of(*lengths)
    inputs = prepare(batch).inputs
    cache = model.init_cache(2, inputs["attention_mask"].shape[1] + 16)
    logits, cache = read_prompt(model, params, cache, inputs, jnp.int32(max(lengths)), fresh=fresh)
    whole = model.apply({"params": params}, **batch, cache=model.init_cache(2, cache.length))
    np.testing.assert_allclose(logits, whole.logits[:, -1], atol=2e-5, rtol=0)
    assert int(cache.cursor) == max(lengths) == int(whole.cache.cursor)
    held = np.asarray(whole.cache.mask)
    np.testing.assert_array_equal(np.asarray(cache.mask), held)
    for pieces, one in zip(cache.keys + cache.values, whole.cache.keys + whole.cache.values, strict=True):
        keep = held[:, None, :, None]
        np.testing.assert_allclose(np.where(keep, pieces, 0), np.where(keep, one, 0), atol=2e-5, rtol=0)


def test_texts_after_pieces_go_on_as_without_a_cache():
    model, params = model_of()
    batch = batch_of(530, 300)
    made = np.asarray(mmjax.generate(model, params, batch, 5, stop_ids=()))
    for row, tokens in zip(batch["input_ids"], made, strict=True):
        ids = row[row > 0].tolist()
        for token in tokens:
            logits = model.apply({"params": params}, np.array([ids])).logits[0, -1]
            assert int(token) == int(jnp.argmax(logits))
            ids.append(int(token))


def test_padding_is_not_computed():
    """Of 1,024 columns with 513 tokens, 640 are read: shown by what the others leave in the cache."""
    model, params = model_of()
    inputs = {"input_ids": np.ones((1, 1024), np.int32), "attention_mask": np.ones((1, 1024), np.int32)}
    _, cache = read_prompt(model, params, model.init_cache(1, 1024), inputs, jnp.int32(513))
    used = np.asarray(cache.keys[0] != 0).any(axis=(0, 1, 3))
    assert used.tolist() == [True] * 640 + [False] * 384


def test_positions_that_depend_on_the_whole_text_are_read_at_once():
    model, params = model_of(rope_scaling=DynamicScaling(factor=2.0, original_max_position_embeddings=64))
    batch = batch_of(300)
    inputs = prepare(batch).inputs
    logits, _ = read_prompt(model, params, model.init_cache(1, 512), inputs, jnp.int32(300))
    whole = model.apply({"params": params}, **batch, cache=model.init_cache(1, 512)).logits[:, -1]
    np.testing.assert_allclose(logits, whole, atol=2e-5, rtol=0)


def test_arguments_that_the_model_does_not_know_are_refused():
    model, params = model_of()
    batch = {**batch_of(600), "token_type_ids": np.zeros((1, 600), np.int32)}
    with pytest.raises(TypeError, match="token_type_ids"):
        mmjax.generate(model, params, batch, 1)
