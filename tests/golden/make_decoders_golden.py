"""Write the golden folders of the causal language models; needs the parity extra.

    python -m tests.golden.make_decoders_golden

Each is a tiny model with every parameter random, as the reference saves it, and `expected.npz`: ids and masks
of a whole row, a row padded on the left and one padded on the right, logits, and the next 12 greedy tokens
of the first two rows. The reference is transformers; for InternLM2, which it lacks, `internlm2_reference.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from tests.golden import internlm2_reference
from tests.parity import reference as ref

FOLDER = Path(__file__).parent / "decoders"
STEPS = 12
SMALL: dict[str, Any] = dict(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True)
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL, head_dim=6, rope_parameters=LLAMA3),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=3),
    "qwen2": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=6),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, mlp_only_layers=[0]),
    "gemma": transformers.GemmaConfig(**SMALL, head_dim=6),
    "gemma2": transformers.Gemma2Config(
        **SMALL,
        head_dim=6,
        sliding_window=3,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
    ),
    "opt": transformers.OPTConfig(
        vocab_size=29,
        hidden_size=16,
        ffn_dim=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=12,
        do_layer_norm_before=False,
    ),
}
INTERNLM2 = {
    **SMALL,
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "model_type": "internlm2",
    "bias": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 2,
}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 29, (3, 8), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, 6:] = 0
    return ids, mask


Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def expected(run: Run) -> dict[str, np.ndarray]:
    """Logits, and greedy tokens without a cache, so that they claim nothing about the reference's cache."""
    ids, mask = inputs()
    arrays = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "logits": run(ids, mask).numpy()}
    ids, mask = ids[:2], mask[:2]
    for _ in range(STEPS):
        ids = torch.cat([ids, run(ids, mask)[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return {**arrays, "tokens": ids[:, -STEPS:].numpy()}


def make(name: str) -> None:
    config = CONFIGS[name]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ref.randomise(model, seed=sorted(CONFIGS).index(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:  # Experts: the fan-in is the last axis alone.
                parameter *= parameter.shape[1] ** 0.5
    ref.save_reference(model.eval(), FOLDER / name)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits

    np.savez_compressed(FOLDER / name / "expected.npz", **expected(run))


def make_internlm2(name: str, **changes: Any) -> None:
    config, folder = {**INTERNLM2, **changes}, FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = internlm2_reference.random_tensors(config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    arrays = expected(lambda ids, mask: internlm2_reference.forward(config, tensors, ids, mask))
    np.savez_compressed(folder / "expected.npz", **arrays)


if __name__ == "__main__":
    with torch.no_grad():
        for golden in CONFIGS:
            make(golden)
        make_internlm2("internlm2")
        make_internlm2("internlm2-no-bias", bias=False, num_key_value_heads=1)
