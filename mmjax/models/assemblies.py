"""The assemblies that families share: a tower alone, a projected tower, a classifier.

A family's model class names its config and, at most, a choice; it has no forward of its own.
Configs give their towers as `config.vision_config` and `config.text_config`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.language.config import TextConfig
from mmjax.language.text_encoder import TextOutput, TextTransformer
from mmjax.models.outputs import ImageClassifierOutput, ProjectedOutput
from mmjax.nn import Dense, Execution
from mmjax.nn.initializers import normal
from mmjax.vision.config import VisionConfig
from mmjax.vision.transformer import VisionOutput, VisionTransformer

Array = jax.Array


def example_images(config: VisionConfig, batch_size: int) -> np.ndarray:
    """Black images of the size that the config expects: float32 [B, H, W, C]."""
    return np.zeros((batch_size, *config.image_size, config.num_channels), np.float32)  # type: ignore[misc]


def example_ids(config: TextConfig, batch_size: int) -> np.ndarray:
    """Token ids: int32 zeros [B, T], T the longest that the config allows."""
    return np.zeros((batch_size, config.max_position_embeddings), np.int32)


class Model(nn.Module):
    """What every model has: a frozen config, and how it is executed."""

    config: Any
    execution: Execution = Execution()

    model_type: ClassVar[str]

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        """Inputs of the right shapes, all zero, to call `init` with."""
        raise NotImplementedError


class VisionModel(Model):
    """A vision tower alone; parameters are below vision_model/."""

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        """pixel_values, all zero."""
        return {"pixel_values": example_images(self.config, batch_size)}

    @nn.compact
    def __call__(
        self, pixel_values: Array, bool_masked_pos: Array | None = None, **options: Any
    ) -> VisionOutput:
        """Encode images [B, H, W, C]; options as in `mmjax.vision.VisionTransformer`."""
        tower = VisionTransformer(self.config, self.execution, name="vision_model")
        return tower(pixel_values, bool_masked_pos, **options)


class TextModel(Model):
    """A text tower alone; parameters are below text_model/."""

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        """input_ids, all zero."""
        return {"input_ids": example_ids(self.config, batch_size)}

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        **options: Any,
    ) -> TextOutput:
        """Encode ids [B, T]; options as in `mmjax.language.TextTransformer`."""
        tower = TextTransformer(self.config, self.execution, name="text_model")
        return tower(input_ids, attention_mask, position_ids, **options)


def projection(width: int, size: int, factor: float, execution: Execution, name: str | None = None) -> Dense:
    """The linear map without bias from a tower of `width` to the shared space."""
    return Dense(
        size,
        ("embed", None),
        use_bias=False,
        kernel_init=normal(width**-0.5 * factor),
        execution=execution,
        name=name,
    )


class ProjectedVisionModel(VisionModel):
    """A vision tower and its projection; the config has `projection_dim`."""

    @nn.compact
    def __call__(self, pixel_values: Array, **options: Any) -> ProjectedOutput:  # type: ignore[override]
        """Encode images [B, H, W, C]; image_embeds [B, E] are not normalised."""
        config = self.config
        out = VisionTransformer(config, self.execution, name="vision_model")(pixel_values, **options)
        project = projection(
            config.hidden_size,
            config.projection_dim,
            config.initializer_factor,
            self.execution,
            "visual_projection",
        )
        return ProjectedOutput(
            image_embeds=project(out.pooler_output),
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


class ProjectedTextModel(TextModel):
    """A text tower and its projection; the config has `projection_dim`."""

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        **options: Any,
    ) -> ProjectedOutput:
        """Encode ids [B, T]; text_embeds [B, E] are not normalised."""
        config = self.config
        tower = TextTransformer(config, self.execution, name="text_model")
        out = tower(input_ids, attention_mask, position_ids, **options)
        project = projection(
            config.hidden_size,
            config.projection_dim,
            config.initializer_factor,
            self.execution,
            "text_projection",
        )
        return ProjectedOutput(
            text_embeds=project(out.pooler_output),
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


class ImageClassifier(Model):
    """A vision tower and a linear head on its CLS token or on the mean of its patches.

    The config has `num_labels`; with 0 the pooled features themselves are returned.
    """

    head_pooling: ClassVar[Literal["cls", "mean"]] = "cls"

    def example_batch(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        """pixel_values, all zero."""
        return {"pixel_values": example_images(self.config.vision_config, batch_size)}

    @nn.compact
    def __call__(self, pixel_values: Array, **options: Any) -> ImageClassifierOutput:
        """Classify images [B, H, W, C]; options as in `mmjax.vision.VisionTransformer`."""
        vision = self.config.vision_config
        out = VisionTransformer(vision, self.execution, name="vision_model")(pixel_values, **options)
        tokens = out.last_hidden_state
        if self.head_pooling == "cls":
            features = tokens[:, 0]
        else:
            features = jnp.mean(tokens[:, int(vision.class_token) :], axis=1)
        if self.config.num_labels:
            features = Dense(
                self.config.num_labels,
                ("embed", None),
                kernel_init=normal(vision.initializer_range),
                execution=self.execution,
                name="classifier",
            )(features)
        return ImageClassifierOutput(
            logits=features, hidden_states=out.hidden_states, attentions=out.attentions
        )
