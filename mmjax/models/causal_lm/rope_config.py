"""Rotary positions in hub configs: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from mmjax.errors import ConfigError
from mmjax.language.config import DecoderConfig
from mmjax.models.hub_config import short
from mmjax.nn.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

SCALINGS: Mapping[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
}
# An early name, in folders of 2024.
_OTHER_NAMES = {"su": "longrope"}
_ROPE_NAMES = ("rope_parameters", "rope_theta", "rope_scaling")
_CONTEXT = "original_max_position_embeddings"
IGNORED: Mapping[str, str] = {name: "read as rotary positions" for name in (*_ROPE_NAMES, _CONTEXT)}


def read_rope(hub: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling of DecoderConfig from a hub config of either form.

    Args:
        hub: the whole config.
        defaults: max_position_embeddings and rope_theta where the config names none.
        where: the file, for messages.

    Raises:
        ConfigError: a kind or an entry that is not known, or an entry that is missing or no number.
    """
    given = hub.get("rope_scaling") or hub.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: rope_parameters should be an object, got {short(given)}")
    entries = {name: value for name, value in given.items() if value is not None}
    theta = entries.pop("rope_theta", hub.get("rope_theta", defaults["rope_theta"]))
    old_name = entries.pop("type", "default")
    kind = entries.pop("rope_type", old_name)
    kind = _OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if entries.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: rope_parameters: partial_rotary_factor is not supported; only 1.0 is")
    if not _is_number(theta):
        raise ConfigError(f"{where}: rope_theta should be a number, got {short(theta)}")
    if kind == "default":
        if entries:
            raise ConfigError(
                f"{where}: rope_parameters: {min(entries)} means nothing to rope_type 'default'"
            )
        return {"rope_theta": float(theta), "rope_scaling": None}
    if not isinstance(kind, str) or kind not in SCALINGS:
        known = ", ".join(("default", *SCALINGS))
        raise ConfigError(f"{where}: rope_parameters: rope_type {short(kind)} is not known; known: {known}")
    return {
        "rope_theta": float(theta),
        "rope_scaling": _scaling(kind, entries, hub, defaults["max_position_embeddings"], where),
    }


def _scaling(kind: str, entries: dict[str, Any], hub: Mapping[str, Any], longest: int, where: str) -> Any:
    cls = SCALINGS[kind]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    longest = hub.get("max_position_embeddings", longest)
    if kind == "dynamic":
        # The formula has the config's own length, whatever else is written there.
        entries[_CONTEXT] = longest
    elif _CONTEXT in fields:
        entries[_CONTEXT] = hub.get(_CONTEXT, entries.get(_CONTEXT, longest))
        if kind in ("yarn", "longrope") and "factor" not in entries and _is_number(entries[_CONTEXT]):
            entries["factor"] = longest / entries[_CONTEXT]
    else:
        entries.pop(_CONTEXT, None)
    # Written beside every kind by some tools; only the vocabulary of the kind counts.
    unknown = sorted(set(entries) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: rope_parameters: {unknown[0]} means nothing to rope_type {kind!r}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in entries]
    if missing:
        raise ConfigError(f"{where}: rope_parameters: rope_type {kind!r} needs {missing[0]}")
    values: dict[str, Any] = {}
    for name, value in entries.items():
        many = name in ("short_factor", "long_factor")
        fits = isinstance(value, bool) if name == "truncate" else _is_number(value)
        if many:
            fits = isinstance(value, list) and all(_is_number(v) for v in value)
        if not fits:
            raise ConfigError(f"{where}: rope_parameters: {name} has the wrong type: {short(value)}")
        values[name] = tuple(value) if many else value
    return cls(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The hub attributes that say the same, in transformers 5's form and in the one that was read."""
    scaling = config.rope_scaling
    entries: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        names = {cls: name for name, cls in SCALINGS.items()}
        values = {k: v for k, v in dataclasses.asdict(scaling).items() if v is not None}
        entries = {"rope_type": names[type(scaling)], **values}
    entries = {name: list(v) if isinstance(v, tuple) else v for name, v in entries.items()}
    written: dict[str, Any] = {"rope_parameters": {**entries, "rope_theta": config.rope_theta}}
    before = json.loads(config.hub)
    # What an older folder says in other words must not contradict it.
    if "rope_theta" in before:
        written["rope_theta"] = config.rope_theta
    if "rope_scaling" in before:
        written["rope_scaling"] = None if scaling is None else entries
    if _CONTEXT in before and hasattr(scaling, _CONTEXT):
        written[_CONTEXT] = getattr(scaling, _CONTEXT)
    return written
