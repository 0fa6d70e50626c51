"""Tiny random LLaVA models of the reference's, their processors, and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from mmjax.language import train_bpe_tokenizer
from tests.language.chats import TEMPLATES
from tests.parity import reference as ref

TILE = 28
EYES: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=TILE,
    patch_size=7,
)  # fmt: skip
BRAIN: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024,
)  # fmt: skip
POINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
MANY = [[28 * h, 28 * w] for h in range(1, 5) for w in range(1, 5)]
TOKENIZER = train_bpe_tokenizer(
    ["What is this? A red cat and a blue dog. USER: ASSISTANT: user assistant"],
    300,
    special_tokens=("<image>", "<video>", "<|im_start|>", "<|im_end|>", "<pad>"),
    pad_token="<pad>",
    bos_token="<s>",
    eos_token="</s>",
    chat_template=TEMPLATES["images"],
)
IMAGE, VIDEO = (int(TOKENIZER.token_to_id(name) or 0) for name in ("<image>", "<video>"))

BRAINS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "mistral": lambda **sizes: transformers.MistralConfig(**sizes, sliding_window=40),
    "qwen2": transformers.Qwen2Config,
}


class OnevisionProcessor(transformers.LlavaOnevisionProcessor):
    """The reference's without its videos, for which it needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def eyes_config(eyes: str, cut: bool) -> Any:
    if eyes == "clip":
        return transformers.CLIPVisionConfig(**EYES, projection_dim=8)
    return transformers.SiglipVisionConfig(**EYES, vision_use_head=not cut)


def make(kind: str, brain: str = "llama", eyes: str = "clip", **more: Any) -> Any:
    """A model of the reference's, every parameter random."""
    text = BRAINS[brain](**BRAIN, vocab_size=TOKENIZER.vocab_size + 3, pad_token_id=0)
    common: dict[str, Any] = dict(
        vision_config=eyes_config(eyes, kind != "llava"), text_config=text, image_token_index=IMAGE,
        vision_feature_select_strategy="default" if eyes == "clip" else "full",
    ) | more  # fmt: skip
    if kind == "llava":
        patches = (TILE // EYES["patch_size"]) ** 2
        config = transformers.LlavaConfig(**common, image_seq_length=patches)
        model = transformers.LlavaForConditionalGeneration(config)
    elif kind == "llava_next":
        config = transformers.LlavaNextConfig(**{"image_grid_pinpoints": POINTS} | common)
        model = transformers.LlavaNextForConditionalGeneration(config)
    else:
        config = transformers.LlavaOnevisionConfig(
            **{"image_grid_pinpoints": MANY, "vision_aspect_ratio": "anyres_max_4"} | common,
            video_token_index=VIDEO,
        )
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    return ref.randomise(model)


def save(folder: Path, model: Any, eyes: str = "clip", **more: Any) -> Any:
    """Write a model's folder with its processor's files, and open the processor as the reference does."""
    model.save_pretrained(folder)
    TOKENIZER.save(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = model.config.model_type
    size = {"height": TILE, "width": TILE}
    pixels: dict[str, Any] = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
    strategy = model.config.vision_feature_select_strategy
    counts = dict(patch_size=EYES["patch_size"], num_additional_image_tokens=int(eyes == "clip"))
    common = dict(tokenizer=tokenizer, vision_feature_select_strategy=strategy)
    if kind == "llava":
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size=size, **pixels)
        processor = transformers.LlavaProcessor(image_processor=images, **common, **counts)
    elif kind == "llava_next":
        images = transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE}, crop_size=size, **pixels,
            image_grid_pinpoints=model.config.image_grid_pinpoints,
        )  # fmt: skip
        processor = transformers.LlavaNextProcessor(image_processor=images, **common, **counts)
    else:
        images = transformers.LlavaOnevisionImageProcessorPil(
            size=size, image_grid_pinpoints=model.config.image_grid_pinpoints, **pixels
        )
        processor = OnevisionProcessor(
            image_processor=images, num_image_tokens=(TILE // EYES["patch_size"]) ** 2 + int(eyes == "clip"),
            vision_aspect_ratio=model.config.vision_aspect_ratio, **common,
        )  # fmt: skip
    processor.chat_template = TEMPLATES["images"]
    processor.save_pretrained(folder)
    return processor


def pictures(*sizes: tuple[int, int], seed: int = 3) -> list[Image.Image]:
    """Random images of (height, width) pixels."""
    numbers = np.random.default_rng(seed)
    return [Image.fromarray(numbers.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def tensors(batch: Any) -> dict[str, Any]:
    """The reference's batch as torch tensors of what its models take."""
    return {
        name: value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, value in batch.items()
    }
