"""LLaVA against transformers: logits, tokens, processors, and folders there and back."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="live comparison needs the parity extra: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="live comparison needs the parity extra: pip install -e '.[parity]'"
)

import jax
import numpy as np
import torch

import mmjax
from tests.parity import llava
from tests.parity import reference as ref
from tests.parity.test_models_parity import assert_same_folder

# The reference remarks on slow processors.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PROMPTS = ["USER: <image>\nWhat is this? ASSISTANT:", "No picture here.", "<image> and <image>? A cat"]
SIZES = [(50, 90), (31, 28), (120, 40)]
CASES = [
    ("llava", "llama", "clip", {}),
    ("llava", "mistral", "siglip", dict(vision_feature_layer=-1)),
    ("llava", "qwen2", "clip", dict(vision_feature_layer=[-2, 1], multimodal_projector_bias=False)),
    ("llava_next", "llama", "clip", {}),
    ("llava_next", "mistral", "clip", dict(projector_hidden_act="relu")),
    ("llava_next", "qwen2", "siglip", dict(vision_feature_layer=-1)),
    ("llava_onevision", "qwen2", "siglip", {}),
    ("llava_onevision", "llama", "siglip", dict(vision_feature_layer=-2)),
    ("llava_onevision", "mistral", "clip", {}),
]


def transposed(pixels: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(pixels), -3, -1)


def both(tmp_path, kind: str, brain: str, eyes: str, more: dict[str, Any]) -> tuple[Any, ...]:
    reference = llava.make(kind, brain, eyes, **more)
    theirs = llava.save(tmp_path / "reference", reference, eyes)
    return reference, theirs, *mmjax.load(tmp_path / "reference")


def images_of(kind: str, images: list[Any]) -> Any:
    """OneVision counts the images of each text."""
    return [images[:1], [], images[1:]] if kind == "llava_onevision" else images


@pytest.mark.parametrize(("kind", "brain", "eyes", "more"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_whole_system(kind, brain, eyes, more, tmp_path):
    reference, theirs, model, params, ours = both(tmp_path, kind, brain, eyes, more)
    images = images_of(kind, llava.pictures(*SIZES))
    asked = theirs(images=images, text=list(PROMPTS), padding=True, return_tensors="pt")
    batch = ours(images=images, text=PROMPTS, padding=True)
    np.testing.assert_array_equal(batch["input_ids"], asked["input_ids"].numpy())
    np.testing.assert_array_equal(batch["attention_mask"], asked["attention_mask"].numpy())
    np.testing.assert_array_equal(batch["pixel_values"], transposed(asked["pixel_values"]))
    for name in ("image_sizes", "batch_num_images"):
        assert (name in batch) == (name in asked), name
        if name in batch:
            np.testing.assert_array_equal(batch[name], np.asarray(asked[name]))
    with torch.no_grad():
        expected = reference(**asked)
    mask = batch["attention_mask"] > 0
    out = jax.jit(model.apply)({"params": params}, **batch)
    ref.assert_close(np.asarray(out.logits)[mask], expected.logits.numpy()[mask], what="logits")
    # As the reference gives it, without index arrays.
    named = {name: np.asarray(value) for name, value in asked.items()}
    named["pixel_values"] = transposed(asked["pixel_values"])
    plain = model.apply({"params": params}, **named)
    ref.assert_close(np.asarray(plain.logits)[mask], expected.logits.numpy()[mask], what="logits")
    assert_same_folder(tmp_path, reference, model, params, type(reference))
