"""Write the golden files of the image processor and the tokenizer; needs the parity extra.

    python -m tests.golden.make_processor_golden

The inputs are made here from whole numbers, so that the tests can make the same ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent
PIXELS = FOLDER / "processor_pixels.npz"
TOKENS = FOLDER / "processor_tokens.json"
TOKENIZER = FOLDER / "processor_clip_tokenizer"

# Pillow 13 filters tall images in another order than Pillow 12, which moves some values by one level of 255:
# the files show their geometry only, the live comparison their values.
NEAREST = {"resample": 0}

CORPUS = [
    "a photo of the digit seven, written by hand",
    "It's a red cat; don't you see?",
    "Zwölf naïve Ärzte, 12345!",
    "the number zero and the number one",
]
TEXTS = [
    "a photo of the digit seven",
    "IT'S a Cat",
    "",
    "unseen wörds 北京 🎉 \u212b \u00a0 x",
    "a <|endoftext|> in the middle <|startoftext|>",
    "written by hand " * 9,
]
CALLS: list[dict[str, Any]] = [
    {"padding": True},
    {"padding": "max_length", "truncation": True},
    {"padding": True, "truncation": True, "max_length": 8},
    {"padding": "max_length", "truncation": True, "max_length": 12, "padding_side": "left"},
    {"padding": True, "add_special_tokens": False, "pad_to_multiple_of": 8},
]


def pattern(height: int, width: int, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C] with edges and slopes, from whole numbers only."""
    row, column, channel = np.ogrid[:height, :width, :channels]
    return ((row * row * 7 + column * 31 + row * column * 3 + channel * 67) % 256).astype(np.uint8)


def image_cases() -> dict[str, tuple[dict[str, Any], Any]]:
    """Name to settings and image."""
    clip = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 7}, "crop_size": 6}
    vit = {"image_processor_type": "ViTImageProcessor", "size": {"height": 6, "width": 5}}
    siglip = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 6, "width": 6}}
    wide, tall, tiny = pattern(11, 23), pattern(29, 9), pattern(1, 1)
    cases: dict[str, tuple[dict[str, Any], Any]] = {
        f"filter_{number}": ({**vit, "resample": number}, Image.fromarray(wide)) for number in range(6)
    }
    cases |= {
        "clip_wide": (clip, Image.fromarray(wide)),
        "clip_tall": ({**clip, **NEAREST}, Image.fromarray(tall)),
        "clip_pixel": (clip, Image.fromarray(tiny)),
        "clip_row": (clip, Image.fromarray(pattern(1, 9))),
        "clip_pads": ({**clip, **NEAREST, "crop_size": {"height": 12, "width": 9}}, Image.fromarray(tall)),
        "clip_rgba": (clip, Image.fromarray(pattern(11, 13, 4))),
        "clip_gray_alpha": (clip, Image.fromarray(pattern(11, 13, 2))),
        "clip_palette": (clip, Image.fromarray(wide).quantize(16)),
        "clip_cmyk": (clip, Image.fromarray(wide).convert("CMYK")),
        "siglip_fractions": (siglip, wide.astype(np.float32) / 255),
        "siglip_floats": (siglip, wide.astype(np.float32)),
        "siglip_first": (siglip, np.ascontiguousarray(wide.transpose(2, 0, 1))),
        "siglip_rgba_array": (siglip, pattern(11, 13, 4)),
        "vit_edges": (
            {**vit, **NEAREST, "size": {"shortest_edge": 6, "longest_edge": 11}},
            Image.fromarray(tall),
        ),
        "vit_fits": ({**vit, **NEAREST, "size": {"max_height": 9, "max_width": 7}}, Image.fromarray(tall)),
        "vit_rescale_only": ({**vit, "do_normalize": False}, Image.fromarray(wide)),
        "vit_normalize_only": ({**vit, "do_rescale": False}, Image.fromarray(wide)),
        "vit_one_number": ({**vit, "image_mean": 0.4, "image_std": 0.3}, Image.fromarray(wide)),
    }
    return cases


def main() -> None:
    import transformers

    from mmjax.language.tokenizer import train_clip_tokenizer

    pixels = {}
    for name, (config, image) in image_cases().items():
        processor = getattr(transformers, config["image_processor_type"] + "Pil")(**config)
        pixels[name] = processor(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.savez_compressed(PIXELS, **pixels)
    train_clip_tokenizer(CORPUS, vocab_size=560, max_length=16).save(TOKENIZER)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    calls = [
        {name: ids.tolist() for name, ids in tokenizer(TEXTS, return_tensors="np", **call).items()}
        for call in CALLS
    ]
    rows = calls[0]["input_ids"]
    decoded = {str(skip): tokenizer.batch_decode(rows, skip_special_tokens=skip) for skip in (False, True)}
    TOKENS.write_text(json.dumps({"calls": calls, "decoded": decoded}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
