"""Key rules that several families share: a layer in CLIP's naming, and the two towers made of it."""

from __future__ import annotations

from mmjax.checkpoints import CONV, LINEAR, Reshape, Rule, prefixed, rule


def linear(source: str, target: str) -> tuple[Rule, ...]:
    """A torch Linear: transposed weight, bias as it is (skipped for models without one)."""
    return rule(f"{source}.weight", f"{target}/kernel", LINEAR), rule(f"{source}.bias", f"{target}/bias")


def norm(source: str, target: str) -> tuple[Rule, ...]:
    """A torch LayerNorm."""
    return rule(f"{source}.weight", f"{target}/scale"), rule(f"{source}.bias", f"{target}/bias")


LAYER: tuple[Rule, ...] = (
    *norm("layer_norm1", "layer_norm1"),
    *norm("layer_norm2", "layer_norm2"),
    *(
        r
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        for r in linear(f"self_attn.{name}", f"self_attn/{name}")
    ),
    *linear("mlp.fc1", "mlp/fc1"),
    *linear("mlp.fc2", "mlp/fc2"),
)

LAYERS = prefixed(LAYER, "encoder.layers.{i}.", "encoder/layers_{i}/")

TEXT_TOWER: tuple[Rule, ...] = (
    rule("embeddings.token_embedding.weight", "embeddings/token_embedding/embedding"),
    rule("embeddings.position_embedding.weight", "embeddings/position_embedding/embedding"),
    *LAYERS,
    *norm("final_layer_norm", "final_layer_norm"),
)

VISION_TOWER: tuple[Rule, ...] = (
    rule("embeddings.patch_embedding.weight", "embeddings/patch_embedding/kernel", CONV),
    rule("embeddings.position_embedding.weight", "embeddings/position_embedding/embedding"),
    *LAYERS,
    *norm("post_layernorm", "post_layernorm"),
)

# Buffers of arange that folders written before transformers 4.31 hold.
POSITION_IDS = (r"(.*\.)?embeddings\.position_ids", "0, 1, 2, ... counted, not learned")

# A [1] tensor for our scalar.
ONE = Reshape(before=1)
