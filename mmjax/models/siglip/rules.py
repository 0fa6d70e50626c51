"""SigLIP's checkpoint keys."""

from __future__ import annotations

from mmjax.checkpoints import LINEAR, Fused, KeyRules, Reshape, prefixed, rule
from mmjax.models.assemblies import Model
from mmjax.models.tower_rules import ONE, POSITION_IDS, TEXT_TOWER, VISION_TOWER, linear, norm

_QKV = ("q_proj", "k_proj", "v_proj")

VISION = (
    *VISION_TOWER,
    rule("embeddings.patch_embedding.bias", "embeddings/patch_embedding/bias"),
    rule("head.probe", "head/probe", Reshape(before=1)),
    # torch's MultiheadAttention keeps the three products in one tensor.
    rule("head.attention.in_proj_weight", [f"head/attention/{n}/kernel" for n in _QKV], Fused(3, LINEAR)),
    rule("head.attention.in_proj_bias", [f"head/attention/{n}/bias" for n in _QKV], Fused(3)),
    *linear("head.attention.out_proj", "head/attention/out_proj"),
    *norm("head.layernorm", "head/layernorm"),
    *linear("head.mlp.fc1", "head/mlp/fc1"),
    *linear("head.mlp.fc2", "head/mlp/fc2"),
)
TEXT = (*TEXT_TOWER, *linear("head", "head"))


def rules(model: Model) -> KeyRules:
    """The table of a SigLIP model; towers alone are written without a prefix and read with or without one."""
    alone = type(model).__name__ in ("SiglipVisionModel", "SiglipTextModel")

    def tower(name: str) -> tuple[str, tuple[str, ...]]:
        return ("", (f"{name}.",)) if alone else (f"{name}.", ())

    (vision, other_vision), (text, other_text) = tower("vision_model"), tower("text_model")
    return KeyRules(
        rules=(
            *prefixed(VISION, vision, "vision_model/", other_vision),
            *prefixed(TEXT, text, "text_model/", other_text),
            rule("logit_scale", "logit_scale", ONE),
            rule("logit_bias", "logit_bias", ONE),
            *linear("classifier", "classifier"),
        ),
        ignored=(POSITION_IDS,),
    )
