"""Writes tests/golden/llava: tiny random LLaVA folders, and what transformers makes of prompts with images.

Run as `python -m tests.golden.make_llava_golden` with the parity extra installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.parity import llava

FOLDER = Path(__file__).parent / "llava"
CASES = {
    "llava": ("llama", "clip"),
    "llava_next": ("mistral", "clip"),
    "llava_onevision": ("qwen2", "siglip"),
}
PROMPTS = ["USER: <image>\nWhat is this? ASSISTANT:", "No picture here.", "<image> and <image>? A cat"]
SIZES = [(50, 90), (31, 28), (120, 40)]


def main() -> None:
    for kind, (brain, eyes) in CASES.items():
        folder = FOLDER / kind
        folder.mkdir(parents=True, exist_ok=True)
        model = llava.make(kind, brain, eyes)
        processor = llava.save(folder, model, eyes)
        (folder / "generation_config.json").unlink(missing_ok=True)
        pictures = llava.pictures(*SIZES)
        images = [pictures[:1], [], pictures[1:]] if kind == "llava_onevision" else pictures
        batch = processor(
            images=images, text=list(PROMPTS), padding=True, padding_side="left", return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**batch).logits
            tokens = model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
        ids = batch["input_ids"]
        np.savez_compressed(
            folder / "expected.npz",
            input_ids=ids.numpy(),
            last_logits=logits[:, -1].numpy(),
            tokens=tokens[:, ids.shape[1] :].numpy(),
        )


if __name__ == "__main__":
    main()
