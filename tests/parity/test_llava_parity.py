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


@pytest.mark.parametrize(
    ("kind", "brain", "eyes", "more"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
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


@pytest.mark.parametrize(("kind", "brain", "eyes"), [case[:3] for case in CASES[::2]])
def test_greedy_tokens(kind, brain, eyes, tmp_path):
    reference, theirs, model, params, ours = both(tmp_path, kind, brain, eyes, {})
    images = images_of(kind, llava.pictures(*SIZES))
    asked = theirs(images=images, text=list(PROMPTS), padding=True, padding_side="left", return_tensors="pt")
    batch = ours(images=images, text=PROMPTS, padding=True, padding_side="left")
    np.testing.assert_array_equal(batch["input_ids"], asked["input_ids"].numpy())
    with torch.no_grad():
        expected = reference.generate(**asked, max_new_tokens=6, do_sample=False, pad_token_id=0)
    found = np.asarray(mmjax.generate(model, params, batch, 6, pad_id=0))
    new = expected[:, asked["input_ids"].shape[1] :].numpy()
    np.testing.assert_array_equal(found[:, : new.shape[1]], new)


def test_conversations(tmp_path):
    """Ids and pixels of messages with images in them; the reference puts the start token before them too."""
    _, theirs, _, _, ours = both(tmp_path, "llava_next", "llama", "clip", {})
    first, second = llava.pictures((50, 90), (31, 28))
    talk = [
        {
            "role": "user",
            "content": [{"type": "image", "image": first}, {"type": "text", "text": "What is this?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A red cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "image": second}]},
    ]
    asked = theirs.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    batch = ours(messages=talk)
    np.testing.assert_array_equal(batch["input_ids"], asked["input_ids"].numpy())
    np.testing.assert_array_equal(batch["pixel_values"], transposed(asked["pixel_values"]))


def test_videos(tmp_path):
    reference = llava.make("llava_onevision", "qwen2", "siglip")
    llava.save(tmp_path, reference, "siglip")
    model, params, _ = mmjax.load(tmp_path)
    frames = torch.randn(2, 3, 3, llava.TILE, llava.TILE, generator=torch.Generator().manual_seed(1))
    ids = np.array([[5, *[llava.VIDEO] * 13, 6], [*[llava.VIDEO] * 13, 9, 7]])
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), pixel_values_videos=frames)
    found = model.apply({"params": params}, ids, pixel_values_videos=transposed(frames))
    ref.assert_close(found.logits, expected.logits, what="logits")


def test_processors_go_back(tmp_path):
    """What is saved opens in the reference and prepares the same."""
    import transformers

    _, theirs, model, params, ours = both(tmp_path, "llava_next", "llama", "clip", {})
    mmjax.save(tmp_path / "ours", model, params, ours)
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    images, text = llava.pictures((50, 90)), ["<image>a cat"]
    expected, found = (p(images=images, text=list(text), return_tensors="pt") for p in (theirs, again))
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


@pytest.mark.parametrize(
    "kind", ["LlavaImageProcessor", "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor"]
)
def test_pixels_of_many_images(kind):
    """Bit for bit, from one pixel to many times the tile, alone and (OneVision) among others."""
    import transformers

    from mmjax.vision.tiles import read_image_processor

    config = {
        "image_processor_type": kind,
        "size": {"height": 28, "width": 28},
        "image_mean": [0.4, 0.5, 0.6],
    }
    if kind == "LlavaImageProcessor":
        config |= {"do_pad": True, "crop_size": {"height": 28, "width": 28}}
    else:
        config |= {"image_grid_pinpoints": llava.POINTS}
    if kind == "LlavaNextImageProcessor":
        config |= {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    theirs = getattr(transformers, kind + "Pil")(**config)
    ours = read_image_processor(config)
    numbers = np.random.default_rng(7)
    for n in range(60):
        sizes = [tuple(int(x) for x in numbers.integers(1, 200, 2)) for _ in range(1 + n % 3)]
        images: Any = llava.pictures(*sizes, seed=n)
        images = [images] if kind == "LlavaOnevisionImageProcessor" else images
        expected, found = theirs(images, return_tensors="pt"), ours(images)
        np.testing.assert_array_equal(found["pixel_values"], transposed(expected["pixel_values"]))
        if "image_sizes" in expected:
            np.testing.assert_array_equal(found["image_sizes"], expected["image_sizes"])
