"""The decoder: embeddings, masks and positions, the layers, the last norm, the output product."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.errors import ConfigError
from mmjax.language.config import DecoderConfig
from mmjax.language.decoder_layers import DecoderLayer, make_norm
from mmjax.language.positions import (
    attention_masks,
    cache_masks,
    kept_positions,
    take_positions,
    token_positions,
)
from mmjax.nn import (
    Dense,
    Embedding,
    Execution,
    KVCache,
    ModelOutput,
    claim_slots,
    dense,
    param,
    rope_tables,
    run_layers,
    softcap,
)
from mmjax.nn.initializers import normal

Array = jax.Array


class DecoderOutput(ModelOutput):
    """What the decoder returns.

    Attributes:
        last_hidden_state: [B, T', D], after the last norm, of the positions that were asked for.
        hidden_states: the input of every layer, then what comes after the last norm, L + 1 arrays [B, T, D],
            on request.
        attentions: L arrays [B, N, T, S], on request.
        cache: with the new tokens, where one was given.
    """

    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    cache: KVCache | None = None


class OutputKernel(nn.Module):
    """The kernel [D, V] of the output product."""

    features: int
    size: int
    std: float

    def setup(self) -> None:
        self.kernel = param(self, "kernel", normal(self.std), (self.features, self.size), ("embed", "vocab"))

    def __call__(self) -> Array:
        """The kernel itself."""
        return self.kernel


class Decoder(nn.Module):
    """Embeddings to hidden states; see DecoderConfig for what varies."""

    config: DecoderConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        config = self.config
        width, init = config.embedding_width, normal(config.initializer_range)
        self.embed_tokens = Embedding(config.vocab_size, width, ("vocab", "embed"), init, self.execution)
        if config.positions == "learned":
            rows = config.max_position_embeddings + config.position_offset
            self.embed_positions = Embedding(
                rows, config.hidden_size, table_init=init, execution=self.execution
            )
        if width != config.hidden_size:
            bare: dict[str, Any] = {"use_bias": False, "kernel_init": init, "execution": self.execution}
            self.project_in = Dense(config.hidden_size, (None, "embed"), **bare)
            self.project_out = Dense(width, ("embed", None), **bare)
        self.layers = [
            DecoderLayer(config, self.execution, self.has_experts(i)) for i in range(config.num_hidden_layers)
        ]
        if config.final_norm:
            self.norm = make_norm(config, "norm")

    def has_experts(self, index: int) -> bool:
        """Whether layer `index` has experts in place of one perceptron."""
        return self.config.experts is not None and self.config.experts.in_layer(index)

    def embed(self, input_ids: Array) -> Array:
        """int [B, T] to embeddings [B, T, D], scaled where the family scales them."""
        x = self.embed_tokens(input_ids)
        scale = jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return x * scale if self.config.scale_embeddings else x

    def __call__(
        self,
        inputs_embeds: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        *,
        key: Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int | Array = 0,
    ) -> DecoderOutput:
        """Run the layers.

        Args:
            inputs_embeds: [B, T, D] (OPT: of the embeddings' width).
            attention_mask: [B, T], non-zero for tokens; None means all are.
            position_ids: int [B, T] or [A, B, T]; None counts the tokens, on from the cache.
            segment_ids: int [B, T]; tokens see only those of their own number. Not with a cache.
            cache: the tokens so far.
            key: PRNG key for dropout; None means none.
            output_hidden_states, output_attentions: whether to return them.
            logits_to_keep: the positions to return, as in `kept_positions`. Of others the last layer makes
                keys and values alone, which is all that the cache needs.
        """
        batch, length = self._check(inputs_embeds, attention_mask, position_ids, segment_ids, cache)
        window = self.config.sliding_window
        token_mask = None if attention_mask is None else attention_mask != 0
        given = jnp.ones((batch, length), bool) if token_mask is None else token_mask
        if cache is not None:
            cache, positions = claim_slots(cache, given)
            masks = cache_masks(cache, positions, window)
        else:
            positions = token_positions(given, segment_ids)
            masks = attention_masks(token_mask, length, window, segment_ids)
        position_ids = positions if position_ids is None else position_ids
        x = inputs_embeds.astype(self.execution.dtype or inputs_embeds.dtype)
        if self.config.embedding_width != self.config.hidden_size:
            x = self.project_in(x)
        rope = None
        if self.config.positions == "rope":
            rope = rope_tables(self.config.rope, position_ids, segment_ids)
        else:
            x = x + self.embed_positions(position_ids + self.config.position_offset)
        wanted = (output_hidden_states, output_attentions)
        keep = kept_positions(logits_to_keep, batch, length)
        # What is asked for of every layer is whole, and so are dropout's masks.
        early = None if key is not None or any(wanted) or self.is_initializing() else keep
        x, kept, cache = self._run(x, masks, rope, cache, key, wanted, early)
        if self.config.final_norm:
            x = self.norm(x)
        if self.config.embedding_width != self.config.hidden_size:
            x = self.project_out(x)
        return DecoderOutput(
            last_hidden_state=x if early is not None else take_positions(x, keep, 1),
            hidden_states=(*(states for states, _ in kept), x) if output_hidden_states else None,
            attentions=tuple(weights for _, weights in kept) if output_attentions else None,
            cache=cache,
        )

    def _check(
        self, x: Array, mask: Array | None, position_ids: Array | None, segments: Array | None, cache: Any
    ) -> tuple[int, int]:
        chex.assert_shape(x, (None, None, self.config.embedding_width))
        batch, length = x.shape[:2]
        for name, value in (("attention_mask", mask), ("segment_ids", segments)):
            if value is not None and value.shape != (batch, length):
                raise ConfigError(
                    f"{name}: shape {value.shape}, but there are {batch} rows of {length} tokens"
                )
        if position_ids is not None and position_ids.shape[-2:] not in ((batch, length), (1, length)):
            raise ConfigError(
                f"position_ids: shape {position_ids.shape}, but there are {batch} rows of {length} tokens"
            )
        if cache is not None and segments is not None:
            raise ConfigError("segment_ids: packed rows cannot be cached; leave out one of the two")
        if cache is not None and (cache.batch_size, len(cache.keys)) != (batch, len(self.layers)):
            raise ConfigError(
                f"cache: made for {cache.batch_size} rows and {len(cache.keys)} layers, "
                f"but there are {batch} and {len(self.layers)}"
            )
        longest = self.config.max_position_embeddings
        if self.config.positions == "learned" and length > longest:
            raise ConfigError(f"input_ids: {length} tokens, but the model has {longest} positions")
        return batch, length

    def _run(
        self,
        x: Array,
        masks: tuple[Array, Array],
        rope: Any,
        cache: KVCache | None,
        key: Any,
        wanted: tuple[bool, bool],
        keep: Array | None,
    ) -> tuple[Array, list[Any], KVCache | None]:
        """The layers in turn: the last x of the positions to keep, what is wanted of each, and the cache."""
        config, depth = self.config, len(self.layers)
        full, sliding = masks
        slides = [config.slides(i) for i in range(depth)]
        if self.is_initializing():
            for layer in self.layers:
                x, _, _ = layer(x, full, rope)
            return x, [], cache
        # Only where layers differ in it is the mask a choice of each layer's.
        mask = masks if any(slides) and not all(slides) else (sliding if all(slides) else full)
        shared = (mask, rope, None if cache is None else cache.cursor)
        params = [self.variables["params"][f"layers_{i}"] for i in range(depth)]
        keys = [None] * depth if key is None else list(jax.random.split(key, depth))
        slots = [None] * depth if cache is None else list(zip(cache.keys, cache.values, strict=True))
        flags = [jnp.asarray(value) for value in slides]
        keeps = [None] * (depth - 1) + [keep]
        layers = list(zip(params, keys, flags, slots, keeps, strict=True))
        results: list[Any] = []
        length = x.shape[1]

        # Layers with experts have other parameters: each run of equal layers is a loop of its own.
        def kind(i: int) -> tuple[bool, bool]:
            return self.has_experts(i), keeps[i] is not None

        for (has_experts, _), group in itertools.groupby(range(depth), kind):
            part = [layers[i] for i in group]
            run = _DecoderRun(config, self.execution, has_experts, *wanted)
            x, extras = run_layers(run, x, shared, part, self.execution)
            results += extras
        if cache is not None:
            cache = cache.replace(  # type: ignore[attr-defined]
                keys=tuple(new[0] for _, new in results),
                values=tuple(new[1] for _, new in results),
                cursor=cache.cursor + length,
            )
        return x, [kept for kept, _ in results], cache


@dataclasses.dataclass(frozen=True)
class _DecoderRun:
    """One layer, as `run_layers` takes it; what is kept: its input and its weights on request, its cache."""

    config: DecoderConfig
    execution: Execution
    has_experts: bool
    hidden_states: bool
    attentions: bool

    def __call__(
        self, x: Array, shared: Any, params: Any, key: Any, slides: Array, cached: Any, keep: Array | None
    ) -> Any:
        mask, rope, cursor = shared
        if isinstance(mask, tuple):
            full, sliding = mask
            mask = jnp.where(slides, sliding, full)
        layer = DecoderLayer(self.config, self.execution, self.has_experts, parent=None)
        out: Any = layer.apply({"params": params}, x, mask, rope, cached, cursor, key, keep)
        y, weights, cached = out
        return y, ((x if self.hidden_states else None, weights if self.attentions else None), cached)


def vocabulary_logits(hidden: Array, kernel: Array, *, cap: float | None = None, dtype: Any = None) -> Array:
    """Scores of the vocabulary.

    Args:
        hidden: [..., D].
        kernel: [D, V].
        cap: bound of the scores, or None.
        dtype: of the factors; None means the kernel's.

    Returns:
        [..., V] in at least float32.

    >>> vocabulary_logits(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16)).dtype.name
    'float32'
    """
    return softcap(dense(hidden, kernel, dtype=dtype, keep_sums=True), cap)
