"""Causal language models against transformers: outputs, gradients, and folders there and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

pytest.importorskip("torch", reason="live comparison needs the parity extra: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="live comparison needs the parity extra: pip install -e '.[parity]'"
)

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

import mmjax
from mmjax.checkpoints.weights import named_tensors
from mmjax.models.causal_lm.families import DECODERS
from mmjax.models.causal_lm.rules import rules
from mmjax.models.family import family_of_type
from tests.parity import reference as ref
from tests.parity.test_models_parity import assert_same_folder

# Widths that are not square, heads in groups, a head width apart from D / N.
A: dict[str, Any] = dict(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=64,
)  # fmt: skip
B: dict[str, Any] = dict(
    vocab_size=37, hidden_size=36, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=6, max_position_embeddings=32,
)  # fmt: skip
WINDOW: dict[str, Any] = dict(use_sliding_window=True, sliding_window=3, max_window_layers=1)
EXPERTS: dict[str, Any] = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12)
OPT: dict[str, Any] = dict(
    vocab_size=50, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=3,
    max_position_embeddings=32,
)  # fmt: skip


def rope(**entries: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 500.0, **entries}}


CASES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**A, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: transformers.LlamaConfig(**B, tie_word_embeddings=True, rms_norm_eps=1e-2),
    "llama-linear": lambda: transformers.LlamaConfig(**A, **rope(rope_type="linear", factor=3.0)),
    "llama-dynamic": lambda: transformers.LlamaConfig(
        **{**A, "max_position_embeddings": 5}, **rope(rope_type="dynamic", factor=4.0)
    ),
    "llama-llama3": lambda: transformers.LlamaConfig(
        **A,
        **rope(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama-yarn": lambda: transformers.LlamaConfig(
        **A, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "llama-yarn-mscale": lambda: transformers.LlamaConfig(
        **A,
        **rope(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=24, beta_fast=8.0, beta_slow=2.0,
            mscale=0.7, mscale_all_dim=0.3, truncate=False,
        ),
    ),
    "llama-longrope": lambda: transformers.LlamaConfig(
        **A,
        **rope(
            rope_type="longrope", factor=4.0, original_max_position_embeddings=5,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.4], long_factor=[1.5, 2.0, 2.5, 3.0, 4.0],
        ),
    ),
    "llama-longrope-short": lambda: transformers.LlamaConfig(
        **A,
        **rope(
            rope_type="longrope", original_max_position_embeddings=32,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.4], long_factor=[1.5, 2.0, 2.5, 3.0, 4.0],
        ),
    ),
    "mistral": lambda: transformers.MistralConfig(**A, sliding_window=3),
    "mistral-full": lambda: transformers.MistralConfig(**B, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in A.items() if k != "head_dim"}),
    "qwen2-sliding": lambda: transformers.Qwen2Config(**B, **WINDOW, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**A, attention_bias=True),
    "qwen3-sliding": lambda: transformers.Qwen3Config(**{**B, "head_dim": 8}, **WINDOW),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**A, **EXPERTS, norm_topk_prob=True),
    "qwen3_moe-some": lambda: transformers.Qwen3MoeConfig(
        **{**B, "num_hidden_layers": 4}, **EXPERTS, decoder_sparse_step=2, mlp_only_layers=[1],
        use_sliding_window=True, sliding_window=4,
    ),
    "gemma": lambda: transformers.GemmaConfig(**A),
    "gemma-untied": lambda: transformers.GemmaConfig(
        **{**B, "head_dim": 4}, hidden_act="gelu", attention_bias=True, tie_word_embeddings=False
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **A, sliding_window=3, query_pre_attn_scalar=7, attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
    ),
    "gemma2-plain": lambda: transformers.Gemma2Config(
        **{**B, "head_dim": 6}, sliding_window=2, layer_types=["full_attention", "sliding_attention"],
        attn_logit_softcapping=None, final_logit_softcapping=None,
    ),
    "opt": lambda: transformers.OPTConfig(**OPT),
    "opt-350m": lambda: transformers.OPTConfig(
        **OPT, do_layer_norm_before=False, word_embed_proj_dim=14, activation_function="gelu"
    ),
    "opt-bare": lambda: transformers.OPTConfig(
        **OPT, enable_bias=False, layer_norm_elementwise_affine=False, _remove_final_layer_norm=True,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def make_reference(name: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(CASES[name](), attn_implementation="eager")
    ref.randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:  # Experts: the fan-in is the last axis alone.
                parameter *= parameter.shape[1] ** 0.5
    return model.eval()


def texts(length: int = 9, vocabulary: int = 37) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask and positions of a whole row, a row padded on the left, and one padded on the right."""
    ids = np.random.default_rng(4).integers(0, vocabulary, (3, length))
    mask = np.ones_like(ids)
    mask[1, :2] = 0
    mask[2, length - 3 :] = 0
    return ids, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def real(values: Any, mask: np.ndarray) -> np.ndarray:
    return np.asarray(values)[mask > 0]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_folders(name, tmp_path):
    reference = make_reference(name)
    model, params, _ = mmjax.load(ref.save_reference(reference, tmp_path / "reference"))
    ids, mask, positions = texts()
    if "longrope" in name or "dynamic" in name:
        # Each row's own length decides here, the longest row's there: rows of one length.
        ids, mask, positions = (x[:1] for x in (ids, mask, positions))
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
            output_hidden_states=True,
            output_attentions=True,
        )
    run = jax.jit(lambda p: model.apply(
        {"params": p}, ids, mask, output_hidden_states=True, output_attentions=True
    ))  # fmt: skip
    out = run(params)
    ref.assert_close(real(out.logits, mask), real(expected.logits, mask), what="logits")
    assert len(out.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        ref.assert_close(real(ours, mask), real(theirs, mask), what="hidden state")
    for ours, theirs in zip(out.attentions, expected.attentions, strict=True):
        by_token = (np.moveaxis(np.asarray(x), 1, 2) for x in (ours, theirs))
        ref.assert_close(*(x[mask > 0] for x in by_token), what="attention")
    assert_same_folder(tmp_path, reference, model, params, type(reference))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "opt-350m"])
def test_gradients(name, tmp_path):
    reference = make_reference(name)
    model, params, _ = mmjax.load(ref.save_reference(reference, tmp_path / "reference"))
    ids, mask, positions = texts()
    # What padding predicts is nobody's business.
    labels = np.where((mask > 0) & (np.roll(mask, 1, axis=1) > 0), ids, -100)
    reference(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions),
        labels=torch.tensor(labels),
    ).loss.backward()

    def loss(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, ids, mask).logits[:, :-1]
        scores = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(ids)[:, 1:, None], axis=-1)
        counted = labels[:, 1:] >= 0
        return -jnp.sum(jnp.where(counted, scores[..., 0], 0)) / counted.sum()

    gradients = jax.jit(jax.grad(loss))(params)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    # The reference writes its gradients as it writes its weights, under the names of its folders.
    reference.save_pretrained(tmp_path / "gradients")
    expected = {}
    for file in (tmp_path / "gradients").glob("*.safetensors"):
        expected |= load_file(file)
    ours = dict(named_tensors(rules(model), gradients))
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        # A shift of all keys leaves the softmax as it is: that gradient is zero but for rounding.
        scale = np.abs(expected[key.replace("k_proj.bias", "q_proj.bias")]).max()
        assert np.abs(ours[key] - value).max() <= ref.GRADIENT * scale, key


@pytest.mark.parametrize("model_type", [name for name in DECODERS if name != "internlm2"])
def test_defaults_are_the_librarys(model_type):
    """A config.json that says nothing means the same there and here, attribute by attribute."""
    theirs = transformers.AutoConfig.for_model(model_type)
    family = family_of_type(model_type, "here")
    config = family.read_config({"model_type": model_type}, "", frozenset(), "here")
    ours = json.loads(json.dumps(family.write_config(config, "")))
    for name, value in ours.items():
        if hasattr(theirs, name):
            assert getattr(theirs, name) == value, name
    # And every attribute that theirs has is known here.
    known = json.loads(json.dumps(theirs.to_dict()))
    again = family.read_config(known, "", frozenset(), "here")
    written_out = dict(num_key_value_heads=config.kv_heads, head_dim=config.head_size, layer_types=None)
    assert dataclasses.replace(again, **written_out) == dataclasses.replace(config, **written_out)
