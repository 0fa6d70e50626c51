"""ViT's checkpoint keys, in the layout that hub folders have."""

from __future__ import annotations

import dataclasses

from mmjax.checkpoints import CONV, LINEAR, POINTWISE, KeyRules, Reshape, Rule, prefixed, rule
from mmjax.models.assemblies import Model
from mmjax.models.tower_rules import POSITION_IDS, linear, norm

LAYER: tuple[Rule, ...] = (
    *norm("layernorm_before", "layer_norm1"),
    *norm("layernorm_after", "layer_norm2"),
    *linear("attention.attention.query", "self_attn/q_proj"),
    *linear("attention.attention.key", "self_attn/k_proj"),
    *linear("attention.attention.value", "self_attn/v_proj"),
    *linear("attention.output.dense", "self_attn/out_proj"),
    *linear("intermediate.dense", "mlp/fc1"),
    *linear("output.dense", "mlp/fc2"),
)

# The names that transformers 5 uses in memory; some tools write them out.
NEW_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def _with_new_names(r: Rule) -> Rule:
    stem, _, kind = r.source.removeprefix("encoder.layer.{i}.").rpartition(".")
    return dataclasses.replace(r, aliases=(f"layers.{{i}}.{NEW_NAMES.get(stem, stem)}.{kind}",))


TOWER: tuple[Rule, ...] = (
    rule("embeddings.cls_token", "embeddings/class_embedding", Reshape(before=2)),
    rule("embeddings.mask_token", "embeddings/mask_token", Reshape(before=2)),
    rule("embeddings.position_embeddings", "embeddings/position_embedding/embedding", Reshape(before=1)),
    rule("embeddings.patch_embeddings.projection.weight", "embeddings/patch_embedding/kernel", CONV),
    rule("embeddings.patch_embeddings.projection.bias", "embeddings/patch_embedding/bias"),
    *map(_with_new_names, prefixed(LAYER, "encoder.layer.{i}.", "encoder/layers_{i}/")),
    *norm("layernorm", "post_layernorm"),
    *linear("pooler.dense", "pooler"),
)


def rules(model: Model) -> KeyRules:
    """The table of a ViT model; a tower alone has no prefix, with a head it is below vit."""
    alone = type(model).__name__ == "ViTModel"
    prefixes = ("", "vit.") if alone else ("vit.", "")
    ignored = [POSITION_IDS]
    if not alone:
        ignored.append(
            (r"(vit\.)?pooler\.dense\.(weight|bias)", "the head reads the CLS token, not the pooler")
        )
    return KeyRules(
        rules=(
            *prefixed(TOWER, prefixes[0], "vision_model/", prefixes[1:]),
            rule("classifier.weight", "classifier/kernel", LINEAR),
            rule("classifier.bias", "classifier/bias"),
            # A 1x1 convolution [O, D, 1, 1] is a linear layer.
            rule("decoder.0.weight", "decoder/kernel", POINTWISE),
            rule("decoder.0.bias", "decoder/bias"),
        ),
        ignored=tuple(ignored),
    )
