"""The text towers: causal and pooled at the end-of-text token (CLIP), bidirectional and last (SigLIP)."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.errors import ConfigError
from mmjax.language.config import TextConfig
from mmjax.nn import (
    Dense,
    Embedding,
    Encoder,
    Execution,
    LayerNorm,
    ModelOutput,
    causal_mask,
    combine_masks,
    padding_mask,
)
from mmjax.nn.initializers import lecun_normal, normal

Array = jax.Array

# Configs written before transformers 4.31 carry this id whatever the tokenizer uses.
LEGACY_EOS_TOKEN_ID = 2


class TextOutput(ModelOutput):
    """What the tower returns.

    Attributes:
        last_hidden_state: [B, T, D].
        pooler_output: [B, D'].
        hidden_states: L + 1 arrays [B, T, D], on request.
        attentions: L arrays [B, N, T, T], on request.
    """

    last_hidden_state: Array
    pooler_output: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


def pool_eos(x: Array, input_ids: Array, eos_token_id: int) -> Array:
    """The hidden state at the first end-of-text token.

    Args:
        x: [B, T, D].
        input_ids: int [B, T].
        eos_token_id: the id looked for; 2 means the largest id of the row instead. A row without the id
            gives its first position, as in transformers.

    Returns:
        [B, D].

    >>> pool_eos(jnp.arange(6.0).reshape(1, 3, 2), jnp.array([[5, 9, 9]]), 9).tolist()
    [[2.0, 3.0]]
    """
    score = (
        input_ids if eos_token_id == LEGACY_EOS_TOKEN_ID else (input_ids == eos_token_id).astype(jnp.int32)
    )
    return jnp.take_along_axis(x, jnp.argmax(score, axis=-1)[:, None, None], axis=1)[:, 0]


class TextEmbeddings(nn.Module):
    """Token and position tables."""

    config: TextConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, input_ids: Array, position_ids: Array | None) -> Array:
        """int [B, T] to [B, T, D]."""
        config = self.config
        std = config.hidden_size**-0.5 if config.initializer == "xavier" else config.initializer_range
        std = std * config.initializer_factor if config.initializer == "clip" else std
        tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            axes=("vocab", "embed"),
            table_init=normal(std),
            execution=self.execution,
            name="token_embedding",
        )
        positions = Embedding(
            config.max_position_embeddings,
            config.hidden_size,
            table_init=normal(std),
            execution=self.execution,
            name="position_embedding",
        )
        if position_ids is None:
            return tokens(input_ids) + positions.table()[: input_ids.shape[1]]
        return tokens(input_ids) + positions(position_ids)


class TextTransformer(nn.Module):
    """Token ids to features; see TextConfig for what varies."""

    config: TextConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> TextOutput:
        """Encode token ids.

        Args:
            input_ids: int [B, T], T at most max_position_embeddings.
            attention_mask: [B, T], non-zero for real tokens; None means all are.
            position_ids: int [B, T]; None means 0, 1, ...
            output_hidden_states, output_attentions: return them too.
            deterministic: False applies dropout with the "dropout" key.
        """
        config = self.config
        chex.assert_rank(input_ids, 2)
        length = input_ids.shape[1]
        if length > config.max_position_embeddings:
            raise ConfigError(
                f"input_ids: {length} tokens, but the model has {config.max_position_embeddings} positions; "
                "truncate the text"
            )
        x = TextEmbeddings(config, self.execution, name="embeddings")(input_ids, position_ids)
        mask = combine_masks(
            causal_mask(length) if config.causal else None,
            None if attention_mask is None else padding_mask(attention_mask),
        )
        noisy = not deterministic and max(config.hidden_dropout, config.attention_dropout) > 0
        encoded = Encoder(config, self.execution, name="encoder")(
            x,
            mask,
            key=self.make_rng("dropout") if noisy else None,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        last = LayerNorm(config.layer_norm_eps, name="final_layer_norm")(encoded.last_hidden_state)
        pooled = pool_eos(last, input_ids, config.eos_token_id) if config.pooling == "eos" else last[:, -1]
        if config.projection_size is not None:
            pooled = Dense(
                config.projection_size,
                ("embed", None),
                kernel_init=lecun_normal,
                execution=self.execution,
                name="head",
            )(pooled)
        return TextOutput(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
