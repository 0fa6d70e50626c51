"""What the assembled models return, under transformers' names."""

from __future__ import annotations

import jax

from mmjax.language.text_encoder import TextOutput
from mmjax.nn import ModelOutput
from mmjax.vision.transformer import VisionOutput

Array = jax.Array


class DualEncoderOutput(ModelOutput):
    """A joint forward of images and texts.

    Attributes:
        logits_per_image: [B_image, B_text], at least float32.
        logits_per_text: [B_text, B_image], its transpose.
        image_embeds: [B_image, E], of length 1.
        text_embeds: [B_text, E], of length 1.
        vision_model_output, text_model_output: what the towers returned.
    """

    logits_per_image: Array | None = None
    logits_per_text: Array | None = None
    image_embeds: Array | None = None
    text_embeds: Array | None = None
    vision_model_output: VisionOutput | None = None
    text_model_output: TextOutput | None = None


class ProjectedOutput(ModelOutput):
    """One tower with its projection.

    Attributes:
        image_embeds or text_embeds: [B, E], not normalised.
        last_hidden_state: [B, T, D].
        hidden_states, attentions: on request.
    """

    image_embeds: Array | None = None
    text_embeds: Array | None = None
    last_hidden_state: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


class ImageClassifierOutput(ModelOutput):
    """Attributes: logits [B, classes]; hidden_states, attentions on request."""

    logits: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


class MaskedImageModelingOutput(ModelOutput):
    """Attributes: reconstruction [B, H, W, C]; hidden_states, attentions on request."""

    reconstruction: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
