"""The hub configs of the causal language models: one table per family, read into one DecoderConfig."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import Any

from mmjax.language.config import DecoderConfig
from mmjax.models.causal_lm import rope_config
from mmjax.models.hub_config import ConfigTable, build

COMMON_FIELDS: Mapping[str, str] = {
    name: name
    for name in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "hidden_act",
        "attention_dropout",
        "initializer_range",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ]
} | {"rms_norm_eps": "norm_eps"}


@dataclasses.dataclass(frozen=True)
class DecoderFamily:
    """One model_type of the hub.

    Attributes:
        architecture: its class in transformers.
        table: hub attributes to fields.
        defaults: fields whose default is another than DecoderConfig's, which is LLaMA's.
        read: (hub config, file) to more fields.
        write: config to more hub attributes.
    """

    architecture: str
    table: ConfigTable
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Mapping[str, Any], str], dict[str, Any]] = lambda hub, where: {}
    write: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}


def _default(family: DecoderFamily, name: str) -> Any:
    fields = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
    return family.defaults.get(name, fields[name])


def read_config(hub: Mapping[str, Any], architecture: str, names: Set[str], where: str) -> DecoderConfig:
    """DecoderConfig from a hub config of any of the families."""
    model_type = hub["model_type"]
    family = DECODERS[model_type]
    values = {**family.defaults, **family.table.read(hub, where), **family.read(hub, where)}
    defaults = {name: _default(family, name) for name in ("max_position_embeddings", "rope_theta")}
    values |= rope_config.read_rope(hub, defaults, where)
    return build(DecoderConfig, {**values, "model_type": model_type, "hub": json.dumps(dict(hub))}, where)


def write_config(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """Hub attributes of a DecoderConfig, in its family's words."""
    family = DECODERS[config.model_type]
    hub = {**family.table.write(config), **rope_config.write_rope(config), **family.write(config)}
    return {**hub, "model_type": config.model_type}


def _bias(hub: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"attention_output_bias": hub.get("attention_bias", False)}


IGNORED: Mapping[str, str] = {
    **rope_config.IGNORED,
    "pretraining_tp": "splits the work, not the result",
    "original_max_position_embeddings": "read as rotary positions",
}

DECODERS: Mapping[str, DecoderFamily] = MappingProxyType(
    {
        "llama": DecoderFamily(
            "LlamaForCausalLM",
            ConfigTable(
                {**COMMON_FIELDS, "attention_bias": "qkv_bias", "mlp_bias": "mlp_bias"}, ignored=IGNORED
            ),
            read=_bias,
        ),
    }
)
