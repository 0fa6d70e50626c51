"""The hub configs of the causal language models: one table per family, read into one DecoderConfig."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import ConfigError
from mmjax.language.config import DecoderConfig
from mmjax.models.causal_lm.families import DECODERS, DecoderFamily
from mmjax.models.causal_lm.rope_config import read_rope, write_rope
from mmjax.models.hub_config import build


def _default(family: DecoderFamily, name: str) -> Any:
    fields = {field.name: field.default for field in dataclasses.fields(DecoderConfig)}
    return family.defaults.get(name, fields[name])


def read_config(hub: Mapping[str, Any], architecture: str, names: Set[str], where: str) -> DecoderConfig:
    """DecoderConfig from a hub config of any of the families."""
    model_type = hub["model_type"]
    family = DECODERS[model_type]
    # A family's published folders may carry code (`auto_map`), which is never run.
    plain = {name: value for name, value in hub.items() if name != "auto_map"} if family.own_code else hub
    values = {**family.defaults, **family.table.read(plain, where)}
    values |= family.read(values, hub, where)
    if values.get("positions") != "learned":
        defaults = {name: _default(family, name) for name in ("max_position_embeddings", "rope_theta")}
        values |= read_rope(hub, defaults, where)
    return build(DecoderConfig, {**values, "model_type": model_type, "hub": json.dumps(dict(hub))}, where)


def write_config(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """Hub attributes of a DecoderConfig, in its family's words.

    Raises:
        ConfigError: the family has no words for a setting of the config.
    """
    family = DECODERS[config.model_type]
    # Where the config leaves a number to others, the folder has it written out, if it might be misread.
    width = config.head_size if "head_dim" in family.defaults else config.head_dim
    whole = dataclasses.replace(config, head_dim=width, num_key_value_heads=config.kv_heads)
    hub = {**family.table.write(whole), **family.write(config), "model_type": config.model_type}
    if width is None:
        hub.pop("head_dim", None)
    if config.positions == "rope":
        hub |= write_rope(config)
    where = f"a {config.model_type} folder"
    again = read_config(json.loads(json.dumps(hub)), architecture, frozenset(), where)
    for field in dataclasses.fields(DecoderConfig):
        mine, theirs = getattr(config, field.name), getattr(again, field.name)
        if field.compare and mine != theirs and not _means_the_same(config, again, field.name):
            raise ConfigError(
                f"{field.name}: {where} cannot say {mine!r} (it would be read as {theirs!r}); "
                "choose another model_type"
            )
    return hub


def _means_the_same(config: DecoderConfig, again: DecoderConfig, name: str) -> bool:
    if name == "layer_types":
        slides = [[c.slides(i) for i in range(c.num_hidden_layers)] for c in (config, again)]
        return slides[0] == slides[1]
    if name == "sliding_window":
        return not any(config.slides(i) for i in range(config.num_hidden_layers))
    if name == "embedding_size":
        return config.embedding_width == again.embedding_width
    if name == "query_scale":
        return (config.query_scale or config.head_size) == (again.query_scale or again.head_size)
    same = {"head_dim": "head_size", "num_key_value_heads": "kv_heads"}.get(name)
    return same is not None and getattr(config, same) == getattr(again, same)
