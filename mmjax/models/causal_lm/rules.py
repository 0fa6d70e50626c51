"""The checkpoint keys of the causal language models: one table of LLaMA's names, and what families rename."""

from __future__ import annotations

from mmjax.checkpoints import LINEAR, KeyRules, Rule, prefixed, rule
from mmjax.models.assemblies import Model
from mmjax.models.tower_rules import linear, norm

LAYER: tuple[Rule, ...] = (
    *(
        r
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        for r in linear(f"self_attn.{name}", f"self_attn/{name}")
    ),
    *(r for name in ("gate_proj", "up_proj", "down_proj") for r in linear(f"mlp.{name}", f"mlp/{name}")),
    *(rule(f"self_attn.{name}.weight", f"self_attn/{name}/scale") for name in ("q_norm", "k_norm")),
    *(
        rule(f"{name}.weight", f"{name}/scale")
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
    ),
)
LLAMA: tuple[Rule, ...] = (
    rule("model.embed_tokens.weight", "model/embed_tokens/embedding"),
    *prefixed(LAYER, "model.layers.{i}.", "model/layers_{i}/"),
    rule("model.norm.weight", "model/norm/scale"),
)
HEAD = rule("lm_head.weight", "lm_head/kernel", LINEAR)

# Buffers that folders of 2023 hold.
BUFFERS = (r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from rope_theta")
TIED = (r"lm_head\.weight", "tied: the embedding table again")


def rules(model: Model) -> KeyRules:
    """The table of a causal language model."""
    table = LLAMA
    ignored = (BUFFERS, TIED) if model.config.tie_word_embeddings else (BUFFERS,)
    return KeyRules(rules=(*table, HEAD), ignored=ignored)
