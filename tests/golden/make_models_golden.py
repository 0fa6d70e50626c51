"""Write the golden folders of ViT, CLIP and SigLIP; needs the parity extra.

    python -m tests.golden.make_models_golden

Each is a tiny reference model with every parameter random, as transformers saves it, and `expected.npz`:
inputs, outputs, a loss, and the loss's gradients under the parameters' names in the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.parity import reference as ref

FOLDER = Path(__file__).parent / "models"

VISION = dict(
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=13,
    patch_size=4,
)
TEXT = dict(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=24,
    max_position_embeddings=7,
    bos_token_id=1,
    pad_token_id=0,
)


def clip(act: str, eos: int) -> torch.nn.Module:
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={**VISION, "hidden_act": act, "layer_norm_eps": 1e-3},
            text_config={**TEXT, "hidden_act": act, "eos_token_id": eos},
            projection_dim=6,
        )
    )


MODELS = {
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(**{**VISION, "image_size": (8, 12)}, qkv_bias=False, pooler_output_size=5)
    ),
    "vit-classifier": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **VISION, id2label={0: "cat", 1: "dog", 2: "eel"}, label2id={"cat": 0, "dog": 1, "eel": 2}
        )
    ),
    "vit-masked": lambda: transformers.ViTForMaskedImageModeling(
        transformers.ViTConfig(**{**VISION, "image_size": 12}, encoder_stride=4)
    ),
    "clip-quick-gelu-largest-id": lambda: clip("quick_gelu", 2),
    "clip-gelu-named-id": lambda: clip("gelu", 19),
    "siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config=VISION, text_config={**TEXT, "projection_size": VISION["hidden_size"]}
        )
    ),
}


def texts(eos: int) -> dict[str, torch.Tensor]:
    """Three texts of different lengths. The end is 19 or, by the other rule, the largest id, 23."""
    ids = torch.randint(3, 19, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, length in enumerate((7, 5, 3)):
        ids[row, length - 1] = 23 if eos == 2 else 19
        ids[row, length:] = mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    batch = {
        "pixel_values": ref.random_pixels(3, *(size if isinstance(size, (list, tuple)) else (size, size)))
    }
    if hasattr(model.config, "text_config"):
        batch |= texts(model.config.text_config.eos_token_id)
    if isinstance(model, transformers.ViTForMaskedImageModeling):
        batch["bool_masked_pos"] = torch.rand(3, 9, generator=torch.Generator().manual_seed(3)) < 0.4
    return batch


LABELS = [2, 0, 1]


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(model, transformers.ViTModel):
        out = model(**batch)
        return out.last_hidden_state.square().mean() + out.pooler_output.square().mean()
    if isinstance(model, transformers.ViTForImageClassification):
        return model(**batch, labels=torch.tensor(LABELS)).loss
    if isinstance(model, transformers.ViTForMaskedImageModeling):
        return model(**batch).loss
    return model(**batch, return_loss=True).loss


def other_size(model: torch.nn.Module) -> torch.Tensor | None:
    """Images of another size, where the reference takes them: from a square table of positions, unmasked."""
    config = getattr(model.config, "vision_config", model.config)
    masked = isinstance(model, transformers.ViTForMaskedImageModeling)
    return None if masked or not isinstance(config.image_size, int) else ref.random_pixels(2, 9, 22, seed=5)


def outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs by name, hidden states of every layer, and the images' at another resolution."""
    out = model(**batch, output_hidden_states=True)
    names = ("logits", "reconstruction", "logits_per_image", "image_embeds", "text_embeds", "pooler_output")
    found = {name: out[name] for name in names if name in out}
    if "reconstruction" in found:
        found["reconstruction"] = found["reconstruction"].permute(0, 2, 3, 1)
    towers = {"": out}
    if "vision_model_output" in out:
        towers = {"vision.": out.vision_model_output, "text.": out.text_model_output}
    for prefix, tower in towers.items():
        if "last_hidden_state" in tower:
            found[f"{prefix}last_hidden_state"] = tower.last_hidden_state
        for layer, states in enumerate(tower.hidden_states):
            found[f"{prefix}hidden_states.{layer}"] = states
    pixels = other_size(model)
    if pixels is not None:
        resized = model(**{**batch, "pixel_values": pixels}, interpolate_pos_encoding=True)
        name = next(n for n in ("image_embeds", "logits", "last_hidden_state") if n in resized)
        found[f"resized.{name}"] = resized[name]
    return found


def make(name: str) -> None:
    model = ref.randomise(MODELS[name](), seed=sorted(MODELS).index(name))
    folder = FOLDER / name
    ref.save_reference(model, folder)
    batch = inputs(model)
    arrays: dict[str, Any] = {}
    for key, value in batch.items():
        pixels = key == "pixel_values"
        arrays[f"input.{key}"] = ref.channels_last(value) if pixels else value.numpy()
    resized = other_size(model)
    if resized is not None:
        arrays["resized.pixel_values"] = ref.channels_last(resized)
    with torch.no_grad():
        arrays |= {f"output.{key}": value.numpy() for key, value in outputs(model, batch).items()}
    loss = loss_of(model, batch)
    loss.backward()
    arrays["loss"] = loss.detach().numpy()
    # Through the folder's own names, which differ from those in memory.
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    ref.save_reference(model, folder / "gradients")
    (folder / "gradients" / "config.json").unlink()
    np.savez_compressed(folder / "expected.npz", **arrays)


if __name__ == "__main__":
    for golden in MODELS:
        make(golden)
