"""An image tower and a text tower in one space: CLIP and SigLIP."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import ConfigError
from mmjax.language.text_encoder import TextOutput, TextTransformer
from mmjax.models.assemblies import Model, example_ids, example_images, projection
from mmjax.models.outputs import DualEncoderOutput
from mmjax.nn import l2_normalize, param
from mmjax.nn.initializers import Initializer
from mmjax.nn.products import accumulator
from mmjax.vision.transformer import VisionOutput, VisionTransformer

Array = jax.Array


def _constant(value: float) -> Initializer:
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


class DualEncoder(Model):
    """Two towers, their projections, and the scale (and bias) of their similarities.

    The config has vision_config, text_config, projection_dim (None: the towers' own outputs are the
    embeddings), initializer_factor, logit_scale_init_value and logit_bias_init_value (None: no bias).
    """

    def setup(self) -> None:
        config, execution = self.config, self.execution
        if config.vision_config.pooling == "none":
            raise ConfigError("pooling: images are compared by their pooled features, but the tower has none")
        self.vision_model = VisionTransformer(config.vision_config, execution)
        self.text_model = TextTransformer(config.text_config, execution)
        if config.projection_dim is not None:
            size, factor = config.projection_dim, config.initializer_factor
            self.visual_projection = projection(config.vision_config.hidden_size, size, factor, execution)
            self.text_projection = projection(config.text_config.hidden_size, size, factor, execution)
        self.logit_scale = param(self, "logit_scale", _constant(config.logit_scale_init_value), (), ())
        if config.logit_bias_init_value is not None:
            self.logit_bias = param(self, "logit_bias", _constant(config.logit_bias_init_value), (), ())

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        """input_ids and pixel_values, all zero."""
        return {
            "input_ids": example_ids(self.config.text_config, batch_size),
            "pixel_values": example_images(self.config.vision_config, batch_size),
        }

    def encode_image(self, pixel_values: Array, *, normalize: bool = False, **options: Any) -> Array:
        """Image embeddings [B, E] of images [B, H, W, C]; of length 1 with `normalize`."""
        return self._embed_images(pixel_values, normalize, options)[0]

    def encode_text(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        *,
        normalize: bool = False,
        **options: Any,
    ) -> Array:
        """Text embeddings [B, E] of ids [B, T]; of length 1 with `normalize`."""
        return self._embed_texts(input_ids, attention_mask, position_ids, normalize, options)[0]

    def __call__(
        self,
        input_ids: Array,
        pixel_values: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **options: Any,
    ) -> DualEncoderOutput:
        """Embed both sides and compare every image with every text.

        Args:
            input_ids: int [B_text, T].
            pixel_values: float [B_image, H, W, C].
            attention_mask: [B_text, T], non-zero for real tokens; None means all are.
            position_ids: int [B_text, T]; None means 0, 1, ...
            interpolate_pos_encoding: accept other image sizes.
            options: output_hidden_states, output_attentions, deterministic, for both towers.
        """
        vision_options = {**options, "interpolate_pos_encoding": interpolate_pos_encoding}
        image_embeds, vision = self._embed_images(pixel_values, True, vision_options)
        text_embeds, text = self._embed_texts(input_ids, attention_mask, position_ids, True, options)
        sums = accumulator(text_embeds.dtype)
        logits = jnp.einsum("te,ie->ti", text_embeds, image_embeds, preferred_element_type=sums)
        logits = logits * jnp.exp(self.logit_scale.astype(sums))
        if self.config.logit_bias_init_value is not None:
            logits = logits + self.logit_bias.astype(sums)
        return DualEncoderOutput(
            logits_per_image=logits.T,
            logits_per_text=logits,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=vision,
            text_model_output=text,
        )

    def _embed_images(
        self, pixel_values: Array, normalize: bool, options: dict[str, Any]
    ) -> tuple[Array, VisionOutput]:
        out = self.vision_model(pixel_values, **options)
        embeds = out.pooler_output
        if self.config.projection_dim is not None:
            embeds = self.visual_projection(embeds)
        return (l2_normalize(embeds) if normalize else embeds), out

    def _embed_texts(
        self,
        input_ids: Array,
        attention_mask: Array | None,
        position_ids: Array | None,
        normalize: bool,
        options: dict[str, Any],
    ) -> tuple[Array, TextOutput]:
        out = self.text_model(input_ids, attention_mask, position_ids, **options)
        embeds = out.pooler_output
        if self.config.projection_dim is not None:
            embeds = self.text_projection(embeds)
        return (l2_normalize(embeds) if normalize else embeds), out
