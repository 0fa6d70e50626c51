"""Answers about images in batches are those of each question alone, and so is what was looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mmjax
from mmjax.data import make_scene, scene_questions, scene_tokenizer
from mmjax.errors import DataError
from mmjax.evaluation import answer_questions, attention_to_images
from mmjax.language import DecoderConfig
from mmjax.models import CLIPVisionConfig, Llava, LlavaConfig
from mmjax.models.llava.layout import ImageTokens
from mmjax.models.llava.processor import LlavaProcessor
from mmjax.vision.tiles import SquareImageProcessor
from tests.tiny import random_params

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def asked() -> tuple[tuple[Any, Any, Any], list[Any], list[str]]:
    """A model's parts, images, and a question of another length about each."""
    tokenizer = scene_tokenizer(50)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, num_hidden_layers=2, **SIZES),
        text_config=DecoderConfig(vocab_size=tokenizer.vocab_size, num_hidden_layers=2, **SIZES),
        image_token_id=tokenizer.token_to_id("<image>"),
    )
    eyes: Any = SquareImageProcessor(size=8, crop_size=8)
    model = Llava(config)
    processor = LlavaProcessor(eyes, tokenizer, image_tokens=ImageTokens.of(config))
    scenes = [make_scene(number) for number in range(5)]
    texts = [scene_questions(scene)[0].text for scene in scenes]
    assert len({len(text.split()) for text in texts}) > 1
    return (model, random_params(model), processor), [scene.draw() for scene in scenes], texts


def prompt(processor: Any, image: Any, text: str) -> dict[str, Any]:
    turn = [{"type": "image"}, {"type": "text", "text": text}]
    return dict(processor(messages=[[{"role": "user", "content": turn}]], images=[[image]]))


def test_answers_do_not_depend_on_the_batch(asked: Any) -> None:
    (model, params, processor), images, texts = asked
    found = answer_questions(model, params, processor, images, texts, max_new_tokens=3, batch_size=2)
    for image, text, answer in zip(images, texts, found, strict=True):
        tokens = mmjax.generate(model, params, prompt(processor, image, text), 3)
        (alone,) = processor.tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
        assert answer == alone.strip()
    assert len(set(found)) > 1


def test_what_was_looked_at_does_not_depend_on_the_batch(asked: Any) -> None:
    (model, params, processor), images, texts = asked
    found = attention_to_images(model, params, processor, images, texts)
    for image, text, shares in zip(images, texts, found, strict=True):
        batch = prompt(processor, image, text)
        out: Any = model.apply({"params": params}, **batch, output_attentions=True)
        here = np.asarray(batch["image_index"])[0, :, 0] >= 0
        looked = np.mean(
            [np.asarray(layer)[0, :, -1, here].mean(axis=-1) for layer in out.attentions], axis=0
        )
        np.testing.assert_allclose(shares, looked / looked.sum(), atol=1e-6)
        assert shares.shape == (4,) and shares.dtype == np.float32
    assert not np.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("ask", [answer_questions, attention_to_images])
def test_each_question_has_its_image(asked: Any, ask: Any) -> None:
    parts, images, texts = asked
    with pytest.raises(DataError, match="4 images for 5 questions: give one for each"):
        ask(*parts, images[:4], texts)
