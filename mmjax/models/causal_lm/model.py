"""The assembly of every causal language model: a decoder and the product with the vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import ConfigError
from mmjax.language.config import DecoderConfig
from mmjax.language.decoder import Decoder, DecoderOutput, OutputKernel, vocabulary_logits
from mmjax.models.assemblies import Model
from mmjax.nn import KVCache, ModelOutput, init_cache

Array = jax.Array


class CausalLMOutput(ModelOutput):
    """What a causal language model returns.

    Attributes:
        logits: [B, T', V], at least float32; T' = T, or as `logits_to_keep` says.
        last_hidden_state: [B, T', D], after the last norm, of the positions that have logits.
        hidden_states: the input of every layer, then what comes after the last norm, [B, T, D], on request.
        attentions: one array [B, N, T, S] per layer, on request.
        cache: with the new tokens, where one was given.
    """

    logits: Array | None = None
    last_hidden_state: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cache: KVCache | None = None


class CausalLM(Model):
    """A decoder that predicts the next token: LLaMA, Mistral, Qwen, OPT, InternLM2, Gemma.

    >>> import jax
    >>> sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    >>> model = CausalLM(DecoderConfig(num_attention_heads=2, **sizes))
    >>> params = model.init(jax.random.key(0), **model.example_batch())["params"]
    >>> prompt = model.apply({"params": params}, jnp.array([[3, 1, 4]]), cache=model.init_cache(1, 8))
    >>> out = model.apply({"params": params}, jnp.array([[1]]), cache=prompt.cache)
    >>> out.logits.shape, int(out.cache.cursor)
    ((1, 1, 11), 4)
    """

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.model = Decoder(config, self.execution)
        if not config.tie_word_embeddings:
            self.lm_head = OutputKernel(config.embedding_width, config.vocab_size, config.initializer_range)

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        """input_ids, all zero."""
        return {"input_ids": np.zeros((batch_size, min(self.config.max_position_embeddings, 8)), np.int32)}

    def init_cache(self, batch_size: int, length: int, dtype: Any = None) -> KVCache:
        """An empty cache for `length` tokens per row; keys and values are kept in `dtype`.

        Args:
            batch_size: B.
            length: S, padding included.
            dtype: None means the compute dtype, or float32 where that is the parameters' own.
        """
        config = self.config
        dtype = dtype or self.execution.dtype or jnp.float32
        layers, heads, width = config.num_hidden_layers, config.kv_heads, config.head_size
        return init_cache(layers, batch_size, heads, length, width, dtype)

    def embed_tokens(self, input_ids: Array) -> Array:
        """int [B, T] to embeddings [B, T, D], as `inputs_embeds` takes them."""
        return self.model.embed(input_ids)

    def embed_inputs(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        inputs_embeds: Array | None = None,
    ) -> Array:
        """What the decoder reads, [B, T, D], padding too; arguments as in `__call__`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("input_ids, inputs_embeds: give one of the two")
        if inputs_embeds is not None:
            return inputs_embeds
        if input_ids.ndim != 2:  # type: ignore[union-attr]
            raise ConfigError(f"input_ids: expected [batch, tokens], got shape {input_ids.shape}")  # type: ignore[union-attr]
        return self.embed_tokens(input_ids)  # type: ignore[arg-type]

    def output_kernel(self) -> Array:
        """The kernel [D, V] of the product with the vocabulary; tied models' is the table's transpose."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.embedding.T
        return self.lm_head()

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] to logits [..., V]."""
        cap = self.config.logits_softcap
        return vocabulary_logits(hidden, self.output_kernel(), cap=cap, dtype=self.execution.dtype)

    def decode(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        **options: Any,
    ) -> DecoderOutput:
        """Everything but the logits; arguments as in `__call__`."""
        inputs_embeds = self.embed_inputs(input_ids, inputs_embeds=inputs_embeds)
        config = self.config
        noisy = not deterministic and max(config.hidden_dropout, config.attention_dropout) > 0
        key = self.make_rng("dropout") if noisy else None
        return self.model(inputs_embeds, attention_mask, position_ids, segment_ids, cache, key=key, **options)

    def hidden(self, *arguments: Any, **options: Any) -> tuple[Array, KVCache | None]:
        """What the logits are made of, [B, T', D], and the cache; arguments as in `__call__`."""
        out = self.decode(*arguments, **options)
        return out.last_hidden_state, out.cache

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int | Array = 0,
    ) -> CausalLMOutput:
        """Predict the token after each one.

        Args:
            input_ids: int [B, T]; or give inputs_embeds.
            attention_mask: [B, T], non-zero for tokens, zero for padding on either side; None: no padding.
            position_ids: int [B, T] or [A, B, T]; None counts the tokens of each row (or segment), on from
                the cache.
            inputs_embeds: [B, T, D].
            segment_ids: int [B, T]; tokens see only those of their own number (packed texts).
            cache: the tokens so far (see `init_cache`); the new ones are added to the one that comes back.
            deterministic: False applies dropout with the "dropout" key.
            output_hidden_states, output_attentions: return them too.
            logits_to_keep: 0 for all positions, n for the last n, or one position per row, int [B]. Less of
                the last layer is computed for few, unless hidden states or attentions are to be returned.

        Raises:
            ConfigError: inputs that do not fit each other, the model, or the cache.
        """
        out = self.decode(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            segment_ids,
            cache,
            deterministic,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            logits_to_keep=logits_to_keep,
        )
        return CausalLMOutput(
            logits=self.logits(out.last_hidden_state),
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            cache=out.cache,
        )
