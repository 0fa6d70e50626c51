"""Generation against transformers: greedy texts, beam search, and what samplers do to logits."""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("torch", reason="live comparison needs the parity extra: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="live comparison needs the parity extra: pip install -e '.[parity]'"
)

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.generation import logits_process

import mmjax
from mmjax.generation import BeamSearch, Greedy, Sampling
from mmjax.generation.warpers import warp
from tests.parity import reference as ref

SIZES: dict[str, Any] = dict(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
CASES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, sliding_window=6, query_pre_attn_scalar=7, attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, attention_bias=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@functools.cache
def both(name: str, folder: Any) -> tuple[Any, Any, Any]:
    theirs = transformers.AutoModelForCausalLM.from_config(CASES[name](), attn_implementation="eager")
    ref.randomise(theirs)
    theirs.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model, params, _ = mmjax.load(ref.save_reference(theirs, folder / name))
    return theirs, model, params


def prompts(side: str = "left") -> dict[str, np.ndarray]:
    """Three rows of 9, 4 and 7 tokens."""
    ids = np.random.default_rng(3).integers(3, 50, (3, 9))
    mask = np.ones_like(ids)
    for row, length in enumerate((9, 4, 7)):
        padding = slice(0, 9 - length) if side == "left" else slice(length, 9)
        if side == "right":
            ids[row] = np.roll(ids[row], length - 9)
        mask[row, padding] = 0
        ids[row, padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def reference_tokens(theirs: Any, batch: dict[str, np.ndarray], new: int, **options: Any) -> np.ndarray:
    """The new tokens, padded to `new` columns."""
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
    out = theirs.generate(**inputs, max_new_tokens=new, do_sample=False, **options)
    tokens = out[:, batch["input_ids"].shape[1] :].numpy()
    return np.pad(tokens, ((0, 0), (0, new - tokens.shape[1])))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stops", [None, ()], ids=["stops", "no-stops"])
def test_greedy_texts_of_64_tokens(name, stops, folder):
    theirs, model, params = both(name, folder)
    options = {} if stops is None else {"min_new_tokens": 64}
    expected = reference_tokens(theirs, prompts(), 64, **options)
    for side in ("left", "right"):
        tokens = mmjax.generate(model, params, prompts(side), 64, stop_ids=stops)
        if stops is None:
            np.testing.assert_array_equal(tokens, expected)
        else:
            # Theirs forbids the stop id, ours only ignores it.
            same = np.cumprod(np.asarray(tokens) != 2, axis=1).astype(bool)
            np.testing.assert_array_equal(np.asarray(tokens)[same], expected[same])
