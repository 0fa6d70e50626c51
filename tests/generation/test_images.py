"""Text out of models that see: batches, streams, conversations, programs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mmjax
from mmjax.errors import ConfigError, DataError
from mmjax.generation import loop, stream
from mmjax.generation.prompts import bucket
from mmjax.generation.tiles import look
from tests.generation.seeing import IMAGE, make, picture, said
from tests.generation.tiny import language_model

KINDS = ("llava", "llava_next", "llava_onevision")


def one_by_one(model, params, batch, new):
    """Greedy tokens of one row by whole forwards, the text grown by hand."""
    tokens = []
    ids = batch["input_ids"]
    run = jax.jit(lambda b: model.apply({"params": params}, **b).logits)
    width = batch["image_index"].shape[-1]
    # One program: the text's end is padded from the beginning.
    room = np.zeros((1, new), np.int32)
    batch = {**batch, "input_ids": np.concatenate([ids, room], axis=1)}
    batch["image_index"] = np.concatenate(
        [batch["image_index"], np.full((1, new, width), -1, np.int32)], axis=1
    )
    if "image_weights" in batch:
        batch["image_weights"] = np.pad(batch["image_weights"], ((0, 0), (0, new), (0, 0)))
    batch = {name: value for name, value in batch.items() if name != "attention_mask"}
    for n in range(new):
        place = ids.shape[1] + n
        tokens.append(int(np.argmax(run(batch)[0, place - 1])))
        batch["input_ids"][0, place] = tokens[-1]
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_images_and_without_are_what_they_are_alone(kind):
    model, params, processor = make(kind)
    prompts = ["<image>What is this?", "A cat", "red <image> and <image>"]
    images = [[picture(9, 20)], [], [picture(30, 10), picture(8, 8)]]
    batch = processor(images=images, text=prompts, padding=True)
    tokens = np.asarray(mmjax.generate(model, params, batch, 4, stop_ids=()))
    for row, (prompt, shown) in enumerate(zip(prompts, images, strict=True)):
        alone = processor(images=[shown] if shown else None, text=prompt)
        assert tokens[row].tolist() == one_by_one(model, params, alone, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_with_images(kind):
    """They are read in pieces; here an image is in the first half and one in a piece."""
    model, params, processor = make(kind, longest=1024)
    words = "a cat " * 90
    shown = [picture(9, 20), picture(30, 10)]
    batch = processor(images=[shown], text=f"<image>{words}<image>{words}What?")
    assert 320 < batch["input_ids"].shape[1] < 512
    tokens = np.asarray(mmjax.generate(model, params, batch, 3, stop_ids=()))
    assert tokens[0].tolist() == one_by_one(model, params, batch, 3)


def test_ids_and_sizes_are_enough():
    model, params, processor = make("llava_next")
    batch = processor(
        images=[picture(9, 20), picture(30, 10)], text=["<image>a", "<image>a cat"], padding=True
    )
    named = {name: value for name, value in batch.items() if name not in ("image_index", "image_weights")}
    expected = mmjax.generate(model, params, batch, 3, stop_ids=())
    np.testing.assert_array_equal(mmjax.generate(model, params, named, 3, stop_ids=()), expected)


def test_scores_with_images():
    model, params, processor = make()
    batch = processor(
        images=[picture(9, 20), picture(30, 10)], text=["<image>a", "<image>a cat"], padding=True
    )
    scores = mmjax.score(model, params, batch, [[[5, 6], [7]], [[8], [9]]])
    alone = processor(images=picture(30, 10), text="<image>a cat")
    single = mmjax.score(model, params, alone, [[[8], [9]]])
    np.testing.assert_allclose(scores.total[1], single.total[0], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_with_new_images(kind):
    """Later turns, and images on them, cost only themselves, and the tokens are those of the whole text."""
    model, params, processor = make(kind)
    first, second, other = picture(9, 20), picture(30, 10), picture(9, 20, seed=5)
    turns = [said("Hi", first)]
    conversation, lengths = None, []
    for question in (said("What?"), said("And this ", second), said("a cat")):
        batch = processor(messages=turns)
        tokens = stream(model, params, batch, 3, stop_ids=(), conversation=conversation)
        answer = [int(token[0]) for token in tokens]
        assert answer == np.asarray(mmjax.generate(model, params, batch, 3, stop_ids=()))[0].tolist()
        lengths.append((tokens.reused, batch["input_ids"].shape[1]))
        conversation = tokens.conversation
        turns = [*turns, said("red", role="assistant"), question]
    assert lengths[0][0] == 0
    # What was read before, with its images, is not read again; but in OneVision an image that is no longer
    # alone is shown in another way.
    assert lengths[1][0] >= lengths[0][1]
    assert (lengths[2][0] >= lengths[1][1]) == (kind != "llava_onevision")
    # Another image at the same place is another text from there on.
    turns[0] = said("Hi", other)
    batch = processor(messages=turns)
    tokens = stream(model, params, batch, 3, stop_ids=(), conversation=conversation)
    answer = [int(token[0]) for token in tokens]
    assert tokens.reused <= int(np.argmax(batch["input_ids"][0] == IMAGE))
    assert answer == np.asarray(mmjax.generate(model, params, batch, 3, stop_ids=()))[0].tolist()


def test_images_of_sixty_sizes_are_few_programs():
    model, params, processor = make("llava_next")
    numbers = np.random.default_rng(0)
    before = loop.generate_whole._cache_size()
    for n in range(60):
        height, width = (int(x) for x in numbers.integers(1, 120, 2))
        words = "cat " * int(numbers.integers(1, 12))
        batch = processor(images=picture(height, width, seed=n), text=f"<image>{words}")
        mmjax.generate(model, params, batch, 2)
    assert loop.generate_whole._cache_size() - before <= 8


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_size_are_one_program_within_a_bucket(kind):
    model, params, processor = make(kind)
    numbers, buckets, before = np.random.default_rng(1), set(), loop.generate_whole._cache_size()
    tiles = set()
    for n in range(25):
        height, width = (int(x) for x in numbers.integers(1, 120, 2))
        batch = processor(images=picture(height, width, seed=n), text="<image>cat")
        tiles.add(batch["pixel_values"].shape[1] if kind != "llava" else 1)
        buckets.add(bucket(batch["input_ids"].shape[1]))
        mmjax.generate(model, params, batch, 70)  # as no other test does
    assert len(tiles) > 1 or kind == "llava"
    assert loop.generate_whole._cache_size() - before == len(buckets)


def test_tiles_that_no_token_is_made_of_are_not_looked_at():
    model, params, processor = make("llava_next")
    batch = processor(images=[picture(8, 16), picture(16, 16)], text="<image>a<image>")
    spoiled = {**batch, "pixel_values": np.array(batch["pixel_values"])}
    assert not batch["pixel_values"][0, 3:].any() and batch["pixel_values"][1, 3:].any()
    spoiled["pixel_values"][0, 3:] = np.nan
    seen = jax.jit(lambda batch: look(model, params, batch))(spoiled)
    assert "pixel_values" not in seen and not np.asarray(seen["image_features"][0, 3:]).any()
    plain = model.apply({"params": params}, batch["pixel_values"], method="vision_features")
    used = np.ones(plain.shape[:2], bool)
    used[0, 3:] = False
    np.testing.assert_allclose(seen["image_features"][used], plain[used], rtol=1e-5, atol=1e-6)


def test_a_context_that_overflows_is_refused():
    model, params, processor = make("llava", longest=16)
    batch = processor(images=[[picture(9, 20)] * 4], text="<image>" * 4)
    with pytest.raises(ConfigError, match="17 tokens and 3 new ones are more than the model's 16"):
        mmjax.generate(model, params, batch, 3)
    with pytest.raises(DataError, match="max_length: 8 of 17 tokens would cut an image"):
        processor(images=[[picture(9, 20)] * 4], text="<image>" * 4, truncation=True, max_length=8)


def test_places_for_images_without_images_are_refused():
    model, params, _ = make("llava")
    for run in (mmjax.generate, lambda *arguments: next(iter(stream(*arguments)))):
        with pytest.raises(DataError, match="2 tokens are places for images, but there are no pixel_values"):
            run(model, params, {"input_ids": [[IMAGE, 5, IMAGE]]}, 2)


def test_images_for_a_model_of_text_are_refused():
    model, params = language_model()
    batch = {"input_ids": [[1, 2]], "pixel_values": np.zeros((1, 8, 8, 3))}
    with pytest.raises(DataError, match="pixel_values: a CausalLM reads text only"):
        mmjax.generate(model, params, batch)
