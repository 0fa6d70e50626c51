"""Write the golden folders of transformers' Flax classes, which its version 5 no longer has.

    pip install --no-deps --target older transformers==4.57.3 huggingface_hub==0.36.0 tokenizers==0.22.1
    pip install --target older requests
    USE_TORCH=0 PYTHONPATH=older:. python tests/golden/make_flax_golden.py

Each is a tiny model with every parameter random, as `save_pretrained` leaves it, and `expected.npz`: inputs
and outputs. They were made with jax 0.10.2 and flax 0.12.8.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

FOLDER = Path(__file__).parent / "flax"
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(vocab_size=40, max_position_embeddings=20)
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
IDS = np.random.default_rng(1).integers(3, 30, (2, 7)).astype(np.int32)


def write(name: str, model: Any, run: Callable[[Any], dict[str, Any]]) -> None:
    """A model with other parameters, and what it says."""
    numbers = np.random.default_rng(2)
    flat = flatten_dict(model.params)
    model.params = unflatten_dict(
        {key: jnp.asarray(0.3 * numbers.standard_normal(x.shape), x.dtype) for key, x in flat.items()}
    )
    model.save_pretrained(FOLDER / name)
    np.savez_compressed(FOLDER / name / "expected.npz", pixels=PIXELS, ids=IDS, **run(model))


def logits(model: Any) -> dict[str, Any]:
    """Of a language model."""
    return {"logits": model(IDS).logits}


def both(model: Any) -> dict[str, Any]:
    """Of a CLIP."""
    out = model(IDS, PIXELS)
    return {"image_embeds": out.image_embeds, "text_embeds": out.text_embeds}


def main() -> None:
    """Write all folders."""
    eyes = dict(image_size=8, patch_size=4)
    clip = transformers.CLIPConfig(
        text_config={**SMALL, **TEXT, "eos_token_id": 39, "bos_token_id": 0},
        vision_config={**SMALL, **eyes},
        projection_dim=12,
    )
    vit = transformers.ViTConfig(**SMALL, **eyes, num_labels=3)
    opt = transformers.OPTConfig(
        **TEXT, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    )
    llama = transformers.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=1)
    write("clip", transformers.FlaxCLIPModel(clip), both)
    write(
        "vit", transformers.FlaxViTForImageClassification(vit), lambda model: {"logits": model(PIXELS).logits}
    )
    write("opt", transformers.FlaxOPTForCausalLM(opt), logits)
    write("llama", transformers.FlaxLlamaForCausalLM(llama), logits)


if __name__ == "__main__":
    main()
