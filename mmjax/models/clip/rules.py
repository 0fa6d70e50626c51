"""CLIP's checkpoint keys."""

from __future__ import annotations

from mmjax.checkpoints import LINEAR, KeyRules, prefixed, rule
from mmjax.models.assemblies import Model
from mmjax.models.tower_rules import POSITION_IDS, TEXT_TOWER, VISION_TOWER, linear, norm

VISION = (
    *VISION_TOWER,
    rule("embeddings.class_embedding", "embeddings/class_embedding"),
    # The published name has this spelling.
    *norm("pre_layrnorm", "pre_layernorm"),
)


def rules(model: Model) -> KeyRules:
    """The table of a CLIP model; towers alone are written without a prefix and read with or without one."""
    alone = type(model).__name__ in ("CLIPVisionModel", "CLIPTextModel")

    def tower(name: str) -> tuple[str, tuple[str, ...]]:
        return ("", (f"{name}.",)) if alone else (f"{name}.", ())

    (vision, other_vision), (text, other_text) = tower("vision_model"), tower("text_model")
    return KeyRules(
        rules=(
            *prefixed(VISION, vision, "vision_model/", other_vision),
            *prefixed(TEXT_TOWER, text, "text_model/", other_text),
            rule("visual_projection.weight", "visual_projection/kernel", LINEAR),
            rule("text_projection.weight", "text_projection/kernel", LINEAR),
            rule("logit_scale", "logit_scale"),
            *linear("classifier", "classifier"),
        ),
        ignored=(POSITION_IDS,),
    )
