"""The one vision transformer that ViT, CLIP's and SigLIP's eyes configure."""

from __future__ import annotations

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.errors import ConfigError
from mmjax.nn import (
    MLP,
    Attention,
    Dense,
    Embedding,
    Encoder,
    Execution,
    LayerNorm,
    ModelOutput,
    activation,
    dense,
    dropout,
    interpolate_positions,
    param,
    patchify,
)
from mmjax.nn.initializers import normal, truncated_normal, xavier_uniform, zeros
from mmjax.vision.config import VisionConfig, pair

Array = jax.Array


class VisionOutput(ModelOutput):
    """What the tower returns.

    Attributes:
        last_hidden_state: [B, T, D], T = P, plus one with a CLS token.
        pooler_output: [B, D'], or None without pooling.
        hidden_states: L + 1 arrays [B, T, D], on request.
        attentions: L arrays [B, N, T, T], on request.
    """

    last_hidden_state: Array
    pooler_output: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


class PatchEmbedding(nn.Module):
    """A linear map of each patch; kernel [h, w, C, D]."""

    config: VisionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, pixel_values: Array) -> Array:
        """[B, H, W, C] to [B, P, D]."""
        config = self.config
        height, width = pair(config.patch_size, "patch_size")
        shape = (height, width, config.num_channels, config.hidden_size)
        fan_in = math.prod(shape[:3])
        std = {
            "normal": config.initializer_range,
            "clip": config.initializer_range * config.initializer_factor,
            "xavier": fan_in**-0.5,
        }[config.initializer]
        kernel = param(self, "kernel", normal(std), shape, (None, None, None, "embed"))
        bias = None
        if config.patch_bias:
            bias = param(self, "bias", zeros, shape[3:], ("embed",))
        patches = patchify(pixel_values, (height, width))
        return dense(patches, kernel.reshape(fan_in, -1), bias, dtype=self.execution.dtype)


class VisionEmbeddings(nn.Module):
    """Patches, CLS and mask tokens, positions."""

    config: VisionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, pixel_values: Array, bool_masked_pos: Array | None, interpolate_pos_encoding: bool
    ) -> Array:
        """[B, H, W, C] to [B, T, D]."""
        config = self.config
        x = PatchEmbedding(config, self.execution, name="patch_embedding")(pixel_values)
        small = truncated_normal(config.initializer_range)
        if config.mask_token:
            mask_token = param(self, "mask_token", zeros, (config.hidden_size,), (None,))
            if bool_masked_pos is not None:
                x = jnp.where(bool_masked_pos[..., None].astype(bool), mask_token.astype(x.dtype), x)
        elif bool_masked_pos is not None:
            raise ConfigError("bool_masked_pos: this model has no mask token (mask_token=False)")
        if config.class_token:
            init = normal(config.hidden_size**-0.5) if config.initializer == "clip" else small
            cls = param(self, "class_embedding", init, (config.hidden_size,), (None,))
            cls = jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([cls, x], axis=1)
        positions = Embedding(
            config.num_patches + config.class_token,
            config.hidden_size,
            table_init=normal(config.hidden_size**-0.5) if config.initializer == "xavier" else small,
            execution=self.execution,
            name="position_embedding",
        ).table()
        height, width = pixel_values.shape[1:3]
        return x + self._resize(positions, height, width, interpolate_pos_encoding)

    def _resize(self, positions: Array, height: int, width: int, interpolate: bool) -> Array:
        config = self.config
        if not interpolate and (height, width) != config.image_size:
            raise ConfigError(
                f"pixel_values: images of {height}x{width} pixels for a model of "
                f"{config.image_size}; resize them or pass interpolate_pos_encoding=True"
            )
        new_grid = config.grid_of(height, width)
        if new_grid == config.grid:
            return positions
        start = int(config.class_token)
        resized = interpolate_positions(positions[start:], config.grid, new_grid)
        return jnp.concatenate([positions[:start], resized])


class AttentionPoolingHead(nn.Module):
    """Attention pooling (MAP): a learned query attends to all tokens, then a residual MLP.

    Source: Zhai et al. 2022, "Scaling Vision Transformers", section 2.1.
    """

    config: VisionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, D] to [B, D]."""
        config = self.config
        probe = param(self, "probe", xavier_uniform, (1, config.hidden_size), (None, None))
        query = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        y, _ = Attention(config, self.execution, name="attention")(query, context=x)
        z = LayerNorm(config.layer_norm_eps, name="layernorm")(y)
        return (y + MLP(config, self.execution, name="mlp")(z))[:, 0]


class VisionTransformer(nn.Module):
    """Patches to features; see VisionConfig for what varies."""

    config: VisionConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        pixel_values: Array,
        bool_masked_pos: Array | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> VisionOutput:
        """Encode images.

        Args:
            pixel_values: [B, H, W, C], float.
            bool_masked_pos: [B, P], non-zero where the mask token replaces the patch.
            interpolate_pos_encoding: accept any H, W and resize the position table bicubically.
            output_hidden_states, output_attentions: return them too.
            deterministic: False applies dropout with the "dropout" key.
        """
        config = self.config
        chex.assert_shape(pixel_values, (None, None, None, config.num_channels))
        x = VisionEmbeddings(config, self.execution, name="embeddings")(
            pixel_values, bool_masked_pos, interpolate_pos_encoding
        )
        noisy = not deterministic and max(config.hidden_dropout, config.attention_dropout) > 0
        keys = jax.random.split(self.make_rng("dropout")) if noisy else (None, None)
        x = dropout(x, config.hidden_dropout, keys[0])
        if config.pre_norm:
            x = LayerNorm(config.layer_norm_eps, name="pre_layernorm")(x)
        encoded = Encoder(config, self.execution, name="encoder")(
            x,
            key=keys[1],
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        last, pooled = self._pool(encoded.last_hidden_state)
        return VisionOutput(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _pool(self, x: Array) -> tuple[Array, Array | None]:
        config = self.config
        norm = LayerNorm(config.layer_norm_eps, name="post_layernorm")
        if config.post_norm == "pooled":
            return x, norm(x[:, 0])
        x = norm(x)
        if config.pooling == "none":
            return x, None
        if config.pooling == "map":
            return x, AttentionPoolingHead(config, self.execution, name="head")(x)
        if config.pooling == "cls":
            return x, x[:, 0]
        pooler = Dense(
            config.pooler_size or config.hidden_size,
            ("embed", None),
            kernel_init=normal(config.initializer_range),
            execution=self.execution,
            name="pooler",
        )
        return x, activation(config.pooler_act)(pooler(x[:, 0]))
