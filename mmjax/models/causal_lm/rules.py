"""The checkpoint keys of the causal language models: LLaMA's names, and the families that have their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from mmjax.checkpoints import LINEAR, KeyRules, Rule, prefixed, rule
from mmjax.checkpoints.transforms import Shape, Transform
from mmjax.language.config import DecoderConfig
from mmjax.models.assemblies import Model
from mmjax.models.tower_rules import linear, norm


@dataclasses.dataclass(frozen=True)
class GroupedQKV:
    """Query, key and value of one product, group by group: each key head's G queries, its key, its value.

    The source is [K * (G + 2) * H, D], the targets [D, N * H] and twice [D, K * H]; biases have no D.

    >>> GroupedQKV(kv_heads=2, head_dim=3).source_shape([(5, 12), (5, 6), (5, 6)])
    (24, 5)
    """

    kv_heads: int
    head_dim: int
    parts: int = 3

    def source_shape(self, targets: Sequence[Shape]) -> Shape:
        return (sum(shape[-1] for shape in targets), *targets[0][:-1])

    def load(self, source: np.ndarray) -> list[np.ndarray]:
        groups = source.reshape(self.kv_heads, -1, self.head_dim, *source.shape[1:])
        parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
        return [part.reshape(-1, *source.shape[1:]).T for part in parts]

    def save(self, targets: Sequence[np.ndarray]) -> np.ndarray:
        rest = targets[0].shape[:-1]
        parts = [target.T.reshape(self.kv_heads, -1, self.head_dim, *rest) for target in targets]
        return np.concatenate(parts, axis=1).reshape(-1, *rest)


def _linears(source: str, target: str, names: str) -> tuple[Rule, ...]:
    """Products whose names differ, as "theirs=ours" or one name for both."""
    pairs = [(pair.partition("=")[0], pair.partition("=")[2] or pair) for pair in names.split()]
    return tuple(r for old, new in pairs for r in linear(source + old, target + new))


def _scales(names: str) -> tuple[Rule, ...]:
    pairs = [(pair.partition("=")[0], pair.partition("=")[2] or pair) for pair in names.split()]
    return tuple(rule(f"{old}.weight", f"{new}/scale") for old, new in pairs)


LLAMA_LAYER: tuple[Rule, ...] = (
    *_linears("self_attn.", "self_attn/", "q_proj k_proj v_proj o_proj"),
    *_linears("mlp.", "mlp/", "gate_proj up_proj down_proj"),
    rule("self_attn.q_norm.weight", "self_attn/q_norm/scale"),
    rule("self_attn.k_norm.weight", "self_attn/k_norm/scale"),
    *_scales("input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"),
    rule("mlp.gate.weight", "mlp/gate/kernel", LINEAR),
    *(
        rule(f"mlp.experts.{{e}}.{name}.weight", f"mlp/experts/{name}/kernel", LINEAR)
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
)
LLAMA: tuple[Rule, ...] = (
    rule("model.embed_tokens.weight", "model/embed_tokens/embedding"),
    *prefixed(LLAMA_LAYER, "model.layers.{i}.", "model/layers_{i}/"),
    rule("model.norm.weight", "model/norm/scale"),
    rule("lm_head.weight", "lm_head/kernel", LINEAR),
)

OPT_LAYER: tuple[Rule, ...] = (
    *_linears("self_attn.", "self_attn/", "q_proj k_proj v_proj out_proj=o_proj"),
    *_linears("", "mlp/", "fc1=up_proj fc2=down_proj"),
    *norm("self_attn_layer_norm", "input_layernorm"),
    *norm("final_layer_norm", "post_attention_layernorm"),
)
OPT: tuple[Rule, ...] = (
    *prefixed(
        (
            rule("embed_tokens.weight", "embed_tokens/embedding"),
            rule("embed_positions.weight", "embed_positions/embedding"),
            *_linears("", "", "project_in project_out"),
            *norm("final_layer_norm", "norm"),
            *prefixed(OPT_LAYER, "layers.{i}.", "layers_{i}/"),
        ),
        "model.decoder.",
        "model/",
        # As the folders of 2022 have it.
        ["decoder."],
    ),
    rule("lm_head.weight", "lm_head/kernel", LINEAR),
)


def _internlm2(config: DecoderConfig) -> tuple[Rule, ...]:
    fused: Transform = GroupedQKV(config.kv_heads, config.head_size)
    names = [f"self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj")]
    layer = (
        rule("attention.wqkv.weight", [f"{name}/kernel" for name in names], fused),
        rule("attention.wqkv.bias", [f"{name}/bias" for name in names], fused),
        *_linears("attention.", "self_attn/", "wo=o_proj"),
        *_linears("feed_forward.", "mlp/", "w1=gate_proj w3=up_proj w2=down_proj"),
        *_scales("attention_norm=input_layernorm ffn_norm=post_attention_layernorm"),
    )
    return (
        rule("model.tok_embeddings.weight", "model/embed_tokens/embedding"),
        *prefixed(layer, "model.layers.{i}.", "model/layers_{i}/"),
        rule("model.norm.weight", "model/norm/scale"),
        rule("output.weight", "lm_head/kernel", LINEAR),
    )


OWN_NAMES: Mapping[str, tuple[Rule, ...]] = MappingProxyType({"opt": OPT})

# Buffers that folders of 2023 hold.
BUFFERS = (r"model\.layers\.\d+\.(self_attn|attention)\.rotary_emb\.inv_freq", "computed from rope_theta")
TIED = (r"(lm_head|output)\.weight", "tied: the embedding table again")


def rules(model: Model) -> KeyRules:
    """The table of a causal language model."""
    config: DecoderConfig = model.config
    fused = config.model_type == "internlm2"
    table = _internlm2(config) if fused else OWN_NAMES.get(config.model_type, LLAMA)
    return KeyRules(rules=table, ignored=(BUFFERS, TIED) if config.tie_word_embeddings else (BUFFERS,))
