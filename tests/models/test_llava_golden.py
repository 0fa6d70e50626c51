"""What transformers made of prompts with images, kept: ids, logits and greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmjax

FOLDER = Path(__file__).parents[1] / "golden" / "llava"
PROMPTS = ["USER: <image>\nWhat is this? ASSISTANT:", "No picture here.", "<image> and <image>? A cat"]
SIZES = [(50, 90), (31, 28), (120, 40)]


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_prompts_with_images(kind):
    model, params, processor = mmjax.load(FOLDER / kind)
    numbers = np.random.default_rng(3)
    pictures = [Image.fromarray(numbers.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in SIZES]
    images = [pictures[:1], [], pictures[1:]]
    batch = processor(images=images, text=PROMPTS, padding=True, padding_side="left")
    expected = np.load(FOLDER / kind / "expected.npz")
    np.testing.assert_array_equal(batch["input_ids"], expected["input_ids"])
    logits = model.apply({"params": params}, **batch, logits_to_keep=1).logits[:, 0]
    worst = np.abs(np.asarray(logits) - expected["last_logits"]).max()
    assert worst <= 1e-5 * np.abs(expected["last_logits"]).max()
    tokens = np.asarray(mmjax.generate(model, params, batch, 6, pad_id=0))
    np.testing.assert_array_equal(tokens[:, : expected["tokens"].shape[1]], expected["tokens"])
