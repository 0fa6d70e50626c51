"""One layer of the decoder: attention over itself and a cache, then a perceptron or experts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from mmjax.language.config import DecoderConfig
from mmjax.language.positions import take_positions
from mmjax.nn import (
    Dense,
    Execution,
    FeedForward,
    LayerNorm,
    MixtureOfExperts,
    RMSNorm,
    apply_rope,
    attention,
    dropout,
    merge_heads,
    split_heads,
    write_slots,
)
from mmjax.nn.initializers import normal
from mmjax.parallel import LogicalAxes

Array = jax.Array
# One layer's keys and values, each [B, K, S, H].
LayerCache = tuple[Array, Array]


def make_norm(config: DecoderConfig, name: str) -> nn.Module:
    """The norm that the config asks for."""
    if config.norm == "rms":
        return RMSNorm(config.norm_eps, config.norm_offset, name=name)
    return LayerNorm(config.norm_eps, config.norm_affine, name=name)


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions and a cache."""

    config: DecoderConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        rope: tuple[Array, Array] | None,
        cached: LayerCache | None,
        cursor: Array | None,
        key: Array | None,
        keep: Array | None = None,
    ) -> tuple[Array, Array, LayerCache | None]:
        """Attend.

        Args:
            x: [B, T, D].
            mask: bool, broadcastable to [B, N, T, S].
            rope: cos and sin, [B, T, H / 2] each.
            cached: keys and values so far; the new ones are written at `cursor`.
            cursor: int32 [].
            key: PRNG key for dropout on the weights; None means none.
            keep: int [B, T'], the positions that attend; None means all, T' = T. All have keys and values.

        Returns:
            [B, T', D], the weights [B, N, T', S], and the cache with the new tokens.
        """
        config = self.config
        heads, kv_heads, width = config.num_attention_heads, config.kv_heads, config.head_size

        def project(source: Array, name: str, size: int, axes: LogicalAxes, bias: bool) -> Array:
            init = normal(config.initializer_range)
            return Dense(size, axes, bias, init, self.execution, name=name)(source)

        inward: LogicalAxes = ("embed", "heads")
        asking = take_positions(x, keep, 1)
        query, keys, values = (
            split_heads(project(source, name, count * width, inward, config.qkv_bias), count)
            for source, name, count in (
                (asking, "q_proj", heads),
                (x, "k_proj", kv_heads),
                (x, "v_proj", kv_heads),
            )
        )
        if config.qk_norm:
            query, keys = make_norm(config, "q_norm")(query), make_norm(config, "k_norm")(keys)
        if rope is not None:
            query = apply_rope(query, *(take_positions(table, keep, 1) for table in rope))
            keys = apply_rope(keys, *rope)
        if cached is not None and cursor is not None:
            cached = (write_slots(cached[0], keys, cursor), write_slots(cached[1], values, cursor))
            keys, values = (part.astype(query.dtype) for part in cached)
        out, weights = attention(
            query,
            keys,
            values,
            take_positions(mask, keep, 2),
            scale=(config.query_scale or width) ** -0.5,
            softcap=config.attention_softcap,
            dropout_rate=config.attention_dropout,
            dropout_key=key,
        )
        outward: LogicalAxes = ("heads", "embed")
        bias = config.attention_output_bias
        return project(merge_heads(out), "o_proj", config.hidden_size, outward, bias), weights, cached


class DecoderLayer(nn.Module):
    """Attention and a perceptron, each with its norm(s) and its residual."""

    config: DecoderConfig
    execution: Execution = Execution()
    has_experts: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        rope: tuple[Array, Array] | None = None,
        cached: LayerCache | None = None,
        cursor: Array | None = None,
        key: Array | None = None,
        keep: Array | None = None,
    ) -> tuple[Array, Array, LayerCache | None]:
        """[B, T, D] to [B, T', D], the attention weights [B, N, T', S], and the layer's cache.

        With `keep` it is computed for some positions only, as in `DecoderAttention`; its cache is whole.
        """
        config = self.config
        keys: Any = (None, None, None) if key is None else jax.random.split(key, 3)
        order = config.norm_order
        attend = DecoderAttention(config, self.execution, name="self_attn")

        y = make_norm(config, "input_layernorm")(x) if order != "post" else x
        y, weights, cached = attend(y, mask, rope, cached, cursor, keys[0], keep)
        y = make_norm(config, "post_attention_layernorm")(y) if order == "both" else y
        x = take_positions(x, keep, 1) + dropout(y, config.hidden_dropout, keys[1])
        x = make_norm(config, "input_layernorm")(x) if order == "post" else x

        inner = "pre_feedforward_layernorm" if order == "both" else "post_attention_layernorm"
        y = make_norm(config, inner)(x) if order != "post" else x
        y = self.perceptron()(y)
        y = make_norm(config, "post_feedforward_layernorm")(y) if order == "both" else y
        x = x + dropout(y, config.hidden_dropout, keys[2])
        x = make_norm(config, inner)(x) if order == "post" else x
        return x, weights, cached

    def perceptron(self) -> nn.Module:
        """The layer's second block."""
        config, init = self.config, normal(self.config.initializer_range)
        if self.has_experts and config.experts is not None:
            return MixtureOfExperts(
                config.experts.num_experts,
                config.experts.num_experts_per_tok,
                config.experts.intermediate_size,
                config.hidden_act,
                config.experts.normalize,
                init,
                self.execution,
                name="mlp",
            )
        return FeedForward(
            config.intermediate_size,
            config.hidden_act,
            config.gated_mlp,
            config.mlp_bias,
            init,
            self.execution,
            name="mlp",
        )
