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

# Not 0, which transformers' beam search takes for none.
PAD = 1
SIZES: dict[str, Any] = dict(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=128, bos_token_id=0, eos_token_id=2,
    pad_token_id=PAD,
)  # fmt: skip
CASES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, sliding_window=6, query_pre_attn_scalar=7, attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, attention_bias=True),
}  # fmt: skip
# Rotations that change where a text grows beyond 16 tokens.
BY_LENGTH: dict[str, Any] = {
    "dynamic": lambda: transformers.LlamaConfig(
        **{**SIZES, "max_position_embeddings": 16},
        rope_parameters=dict(rope_type="dynamic", factor=8.0, rope_theta=500.0),
    ),
    "longrope": lambda: transformers.LlamaConfig(
        **SIZES,
        rope_parameters=dict(
            rope_type="longrope", factor=8.0, original_max_position_embeddings=16, rope_theta=500.0,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.4], long_factor=[1.5, 2.0, 3.0, 5.0, 8.0],
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@functools.cache
def both(name: str, folder: Any) -> tuple[Any, Any, Any]:
    theirs = transformers.AutoModelForCausalLM.from_config(
        {**CASES, **BY_LENGTH}[name](), attn_implementation="eager"
    )
    ref.randomise(theirs)
    theirs.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=2, pad_token_id=PAD)
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
    return np.pad(tokens, ((0, 0), (0, new - tokens.shape[1])), constant_values=PAD)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stops", [[2, 7, 26, 39], []], ids=["stops", "no-stops"])
def test_greedy_texts_of_64_tokens(name, stops, folder, monkeypatch):
    theirs, model, params = both(name, folder)
    monkeypatch.setattr(theirs.generation_config, "eos_token_id", stops or None)
    expected = reference_tokens(theirs, prompts(), 64)
    assert not stops or (expected == PAD).any()
    for side in ("left", "right"):
        tokens = mmjax.generate(model, params, prompts(side), 64, stop_ids=stops)
        np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_greedy_texts_that_grow_beyond_the_original_context(name, folder, monkeypatch):
    """Cached keys keep their rotation there as here. Rows one by one: there the longest decides for all."""
    theirs, model, params = both(name, folder)
    monkeypatch.setattr(theirs.generation_config, "eos_token_id", None)
    for row in range(3):
        batch = {key: value[row : row + 1] for key, value in prompts().items()}
        batch = {key: value[batch["attention_mask"] > 0][None] for key, value in batch.items()}
        tokens = np.asarray(mmjax.generate(model, params, batch, 64, stop_ids=()))
        np.testing.assert_array_equal(tokens, reference_tokens(theirs, batch, 64))
    # Not what whole passes over the text give: the test would see it.
    ids = np.concatenate([batch["input_ids"], tokens], axis=1)
    logits = model.apply({"params": params}, ids[:, :-1]).logits
    assert (np.argmax(logits[0, -48:], axis=-1) != tokens[0, -48:]).any()


BEAMS = [
    dict(num_beams=3),
    dict(num_beams=4, length_penalty=2.0, early_stopping=True),
    dict(num_beams=2, length_penalty=0.5, early_stopping="never"),
    dict(num_beams=3, length_penalty=-1.0, early_stopping="never"),
]


@pytest.mark.parametrize("settings", BEAMS, ids=str)
def test_beam_search(settings, folder):
    """Several stop ids, so that texts end at many lengths, and two texts returned for each prompt."""
    theirs, model, params = both("llama", folder)
    stops = [2, 7, 11, 30, 41]
    expected = reference_tokens(theirs, prompts(), 24, eos_token_id=stops, num_return_sequences=2, **settings)
    tokens = mmjax.generate(
        model, params, prompts(), 24, BeamSearch(**settings), stop_ids=stops, num_return_sequences=2
    )
    np.testing.assert_array_equal(tokens, expected)
    assert len({int((row == PAD).argmax()) for row in expected}) > 1


def test_greedy_with_repetition_penalty(folder):
    """Row by row: theirs counts padding as seen."""
    theirs, model, params = both("llama", folder)
    batch = prompts()
    tokens = mmjax.generate(model, params, batch, 24, Greedy(repetition_penalty=1.7), stop_ids=())
    for row in range(3):
        ids = batch["input_ids"][row : row + 1, batch["attention_mask"][row].argmax() :]
        alone = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        expected = reference_tokens(theirs, alone, 24, eos_token_id=[49], repetition_penalty=1.7)[0]
        count = int((expected == 49).argmax()) or 24
        np.testing.assert_array_equal(tokens[row, :count], expected[:count])


LOGITS = np.random.default_rng(5).normal(0, 3, (4, 97)).astype(np.float32)
SEEN = np.random.default_rng(6).integers(0, 97, (4, 12))


@pytest.mark.parametrize(
    "sampler, processors",
    [
        (Sampling(temperature=0.3), [logits_process.TemperatureLogitsWarper(0.3)]),
        (Sampling(top_k=5), [logits_process.TopKLogitsWarper(5)]),
        (Sampling(top_k=500), [logits_process.TopKLogitsWarper(500)]),
        (Sampling(top_p=0.8), [logits_process.TopPLogitsWarper(0.8)]),
        (Sampling(top_p=0.01), [logits_process.TopPLogitsWarper(0.01)]),
        (Sampling(min_p=0.1), [logits_process.MinPLogitsWarper(0.1)]),
        (
            Sampling(repetition_penalty=1.3),
            [logits_process.RepetitionPenaltyLogitsProcessor(1.3)],
        ),
        (
            Sampling(repetition_penalty=0.8, temperature=2.5, top_k=60, top_p=0.9, min_p=0.05),
            [
                logits_process.RepetitionPenaltyLogitsProcessor(0.8),
                logits_process.TemperatureLogitsWarper(2.5),
                logits_process.TopKLogitsWarper(60),
                logits_process.TopPLogitsWarper(0.9),
                logits_process.MinPLogitsWarper(0.05),
            ],
        ),
    ],
    ids=lambda value: "+".join(value.plan().names[:-1]) if isinstance(value, Sampling) else "",
)
def test_logits_processors(sampler, processors):
    seen = np.zeros(LOGITS.shape, bool)
    seen[np.arange(4)[:, None], SEEN] = True
    ours = np.asarray(warp(jnp.asarray(LOGITS), sampler.plan(), sampler.numbers(), jnp.asarray(seen)))
    expected = torch.from_numpy(LOGITS)
    for processor in processors:
        expected = processor(torch.from_numpy(SEEN), expected)
    finite = np.isfinite(expected.numpy())
    np.testing.assert_array_equal(np.isfinite(ours), finite)
    ref.assert_close(np.where(finite, ours, 0), np.where(finite, expected.numpy(), 0))


def test_the_order_of_processors_is_theirs(folder):
    theirs, _, _ = both("llama", folder)
    settings = dict(repetition_penalty=0.8, temperature=2.5, top_k=60, top_p=0.9, min_p=0.05)
    config = transformers.GenerationConfig(do_sample=True, **settings)
    # Special tokens are prepared for by `generate`; none are needed here.
    config._eos_token_tensor = None
    processors = theirs._get_logits_processor(config, input_ids_seq_length=12, device="cpu")
    names = [type(processor).__name__ for processor in processors]
    words = ("RepetitionPenalty", "Temperature", "TopK", "TopP", "MinP")
    assert [word for name in names for word in words if name.startswith(word)] == [*words]
    assert Sampling(**settings).plan().names == tuple(settings)
