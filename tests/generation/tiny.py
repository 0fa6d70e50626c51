"""Tiny language models: a random one, and one whose next-token logits are a table that tests write."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.language import DecoderConfig
from mmjax.language.positions import kept_positions, take_positions
from mmjax.models import CausalLM
from mmjax.models.assemblies import Model
from mmjax.models.causal_lm import CausalLMOutput
from mmjax.nn import KVCache, claim_slots, init_cache
from mmjax.nn.rope import DynamicScaling, LongRopeScaling
from tests.tiny import random_params

SIZES: dict[str, Any] = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip


@functools.cache
def language_model() -> tuple[CausalLM, Any]:
    model = CausalLM(DecoderConfig(**SIZES, eos_token_id=2, pad_token_id=0))
    return model, random_params(model)


# Rotations that change where a text grows beyond eight tokens.
BY_LENGTH = {
    "dynamic": DynamicScaling(factor=4.0, original_max_position_embeddings=8),
    "longrope": LongRopeScaling(
        short_factor=(1.0, 1.2), long_factor=(2.0, 5.0), original_max_position_embeddings=8, factor=4.0
    ),
}


@functools.cache
def model_by_length(kind: str) -> tuple[CausalLM, Any]:
    """A model whose tokens are rotated by the length of their text; its parameters make much of it."""
    model = CausalLM(DecoderConfig(**{**SIZES, "num_hidden_layers": 2}, rope_scaling=BY_LENGTH[kind]))
    return model, jax.tree.map(lambda x: 2 * x, random_params(model))


class Table(Model):
    """The logits after a token are its row of a table [V, V]; the parameter is that table."""

    config: DecoderConfig = DecoderConfig(vocab_size=6, num_hidden_layers=1, eos_token_id=5, pad_token_id=0)

    def init_cache(self, batch_size: int, length: int, dtype: Any = None) -> KVCache:
        return init_cache(1, batch_size, 1, length, 1, dtype)

    def __call__(
        self, input_ids: Any, attention_mask: Any = None, cache: Any = None, logits_to_keep: Any = 0
    ) -> CausalLMOutput:
        table = self.scope.get_variable("params", "table")
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask != 0
        cache, _ = claim_slots(cache, mask)
        cache = cache.replace(cursor=cache.cursor + input_ids.shape[1])
        positions = kept_positions(logits_to_keep, *input_ids.shape)
        return CausalLMOutput(logits=take_positions(table[input_ids], positions, 1), cache=cache)


def table(rows: Any) -> tuple[Table, dict[str, Any]]:
    return Table(), {"table": jnp.asarray(rows, jnp.float32)}


def prompts(lengths: Any, side: str = "left", seed: int = 0) -> dict[str, np.ndarray]:
    """Random prompts; a row's tokens depend on its number only."""
    longest = max(lengths)
    ids = np.zeros((len(lengths), longest), np.int32)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(longest - length, None) if side == "left" else slice(length)
        ids[row, where] = np.random.default_rng((seed, row)).integers(3, 40, length)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}
