"""Tiny LLaVA models with random parameters, their processors, and pictures."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from mmjax.language import DecoderConfig, train_bpe_tokenizer
from mmjax.models import CLIPVisionConfig, ImageTokens, Llava, LlavaConfig, LlavaProcessor, SiglipVisionConfig
from mmjax.vision.processing import ImageProcessor
from mmjax.vision.tiles import TileImageProcessor
from tests.tiny import random_params

TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: {% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% elif p.type == 'video' %}<video>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TOKENIZER = train_bpe_tokenizer(
    ["What is this? A red cat and a blue dog. USER: ASSISTANT:"],
    290,
    special_tokens=("<image>", "<video>", "<pad>"),
    pad_token="<pad>",
    bos_token="<s>",
    eos_token="</s>",
    chat_template=TEMPLATE,
)
POINTS = ((8, 16), (16, 8), (16, 16), (24, 8), (8, 24))
SIZES: dict[str, Any] = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
IMAGE, VIDEO = (int(TOKENIZER.token_to_id(name) or 0) for name in ("<image>", "<video>"))


@functools.cache
def make(kind: str = "llava", longest: int = 512) -> tuple[Any, Any, LlavaProcessor]:
    """A model, its parameters and its processor."""
    onevision = kind == "llava_onevision"
    eyes = SiglipVisionConfig if onevision else CLIPVisionConfig
    more: dict[str, Any] = {"pooling": "none"} if onevision else {}
    config = LlavaConfig(
        model_type=kind,  # type: ignore[arg-type]
        vision_config=eyes(image_size=8, patch_size=4, **SIZES, **more),
        text_config=DecoderConfig(
            vocab_size=TOKENIZER.vocab_size,
            max_position_embeddings=longest,
            pad_token_id=0,
            num_key_value_heads=2,
            **SIZES,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO if onevision else None,
        vision_feature_select_strategy="full" if onevision else "default",
        image_grid_pinpoints=() if kind == "llava" else POINTS,
        vision_aspect_ratio="anyres_max_2" if onevision else "anyres",
    )
    model = Llava(config)
    if kind == "llava":
        pixels: Any = ImageProcessor(size=8, crop_size=8)
    else:
        name = "LlavaOnevisionImageProcessor" if onevision else "LlavaNextImageProcessor"
        pixels = TileImageProcessor(
            image_processor_type=name, size=8, default_to_square=onevision, do_center_crop=not onevision,
            crop_size=None if onevision else 8, image_grid_pinpoints=POINTS,
        )  # fmt: skip
    processor = LlavaProcessor(pixels, TOKENIZER, image_tokens=ImageTokens.of(config))
    return model, random_params(model), processor


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    numbers = np.random.default_rng(seed + 1000 * height + width)
    return Image.fromarray(numbers.integers(0, 256, (height, width, 3), dtype=np.uint8))


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    """A message of texts and images."""
    return {
        "role": role,
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ],
    }
