"""ViT: the tower alone, with a classifier, and as a masked image model."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mmjax.errors import ConfigError
from mmjax.models.assemblies import ImageClassifier, Model, VisionModel, example_images
from mmjax.models.outputs import MaskedImageModelingOutput
from mmjax.models.vit.config import ViTConfig
from mmjax.nn import Dense
from mmjax.nn.initializers import normal
from mmjax.vision.transformer import VisionTransformer

Array = jax.Array


class ViTModel(VisionModel):
    """The tower; pooler_output by the config's pooling.

    >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    ...                    image_size=(8, 12), patch_size=4)
    >>> model = ViTModel(config)
    >>> out, _ = model.init_with_output(jax.random.key(0), **model.example_batch(2))
    >>> out.last_hidden_state.shape, out["pooler_output"].shape
    ((2, 7, 8), (2, 8))
    """

    config: ViTConfig
    model_type = "vit"


class ViTForImageClassification(ImageClassifier):
    """A linear classifier on the CLS token after the final norm."""

    config: ViTConfig
    model_type = "vit"


class ViTForMaskedImageModeling(Model):
    """Paints each patch from its token; masked patches enter as the mask token.

    Source: Xie et al. 2022 (SimMIM), section 3, with the one-layer head of transformers.
    """

    config: ViTConfig
    model_type = "vit"

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        """pixel_values and bool_masked_pos, all zero."""
        return {
            "pixel_values": example_images(self.config, batch_size),
            "bool_masked_pos": np.zeros((batch_size, self.config.num_patches), bool),
        }

    @nn.compact
    def __call__(
        self, pixel_values: Array, bool_masked_pos: Array | None = None, **options: Any
    ) -> MaskedImageModelingOutput:
        """Reconstruct images.

        Args:
            pixel_values: [B, H, W, C].
            bool_masked_pos: [B, P], non-zero where a patch is hidden; None hides none.
            options: as in `mmjax.vision.VisionTransformer`.

        Raises:
            ConfigError: the config has no mask token, or patches are hidden while encoder_stride is not
                the patch size, so that input and output would differ in size.
        """
        config, stride = self.config, self.config.encoder_stride
        if not config.mask_token:
            raise ConfigError("mask_token: ViTForMaskedImageModeling needs a config with mask_token=True")
        if bool_masked_pos is not None and config.patch_size != (stride, stride):
            raise ConfigError(
                f"encoder_stride: {stride} differs from patch_size {config.patch_size}; "
                "they must agree to mask"
            )
        tower = VisionTransformer(config.vision_config, self.execution, name="vision_model")
        out = tower(pixel_values, bool_masked_pos, **options)
        painted = Dense(
            config.num_channels * stride**2,
            ("embed", None),
            kernel_init=normal(config.initializer_range),
            execution=self.execution,
            name="decoder",
        )(out.last_hidden_state[:, int(config.class_token) :])
        rows, columns = config.grid_of(*pixel_values.shape[1:3])
        # The checkpoint orders each patch's values by channel, row, column.
        x = painted.reshape(-1, rows, columns, config.num_channels, stride, stride).transpose(
            0, 1, 4, 2, 5, 3
        )
        return MaskedImageModelingOutput(
            reconstruction=x.reshape(-1, rows * stride, columns * stride, config.num_channels),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
