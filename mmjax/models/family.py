"""What a family declares, and the list of families."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import Any

from mmjax.checkpoints import KeyRules
from mmjax.errors import ConfigError
from mmjax.models.assemblies import Model
from mmjax.models.hub_config import short


@dataclasses.dataclass(frozen=True)
class Family:
    """How folders of one family are read and written.

    Attributes:
        architectures: architecture name as in config.json to model class; the first is the default of a
            folder that names none.
        read_config: (hub config, architecture, names of the folder's tensors, file) to our config.
        write_config: (config, architecture) to hub attributes, without what `merge` keeps.
        rules: model to its key rules.
        processor: the class that opens its folders' processor files; None: `Processor`.
        other_layout: opens folders of another layout: (folder, hub config, dtype, mesh, execution, find) to
            what `load` returns, or None for a folder that is none of them.
        other_tensors: the same without reading a value: (folder, hub config, find) to a context of the
            config and the tensors by name, or None.
        own_code: whether published folders of the family bring their code (`auto_map`); it is never run.
    """

    architectures: Mapping[str, type[Model]]
    read_config: Callable[[Mapping[str, Any], str, Set[str], str], Any]
    write_config: Callable[[Any, str], dict[str, Any]]
    rules: Callable[[Model], KeyRules]
    own_code: bool = False
    processor: Any = None
    other_layout: Callable[..., Any] | None = None
    other_tensors: Callable[..., Any] | None = None


# model_type in config.json to the module that has FAMILY, or FAMILIES by model_type; imported when needed.
FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "clip": "mmjax.models.clip",
        "clip_text_model": "mmjax.models.clip",
        "clip_vision_model": "mmjax.models.clip",
        "siglip": "mmjax.models.siglip",
        "siglip_text_model": "mmjax.models.siglip",
        "siglip_vision_model": "mmjax.models.siglip",
        "vit": "mmjax.models.vit",
        **dict.fromkeys(
            ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "internlm2", "opt"),
            "mmjax.models.causal_lm",
        ),
        **dict.fromkeys(
            ("llava", "llava_next", "llava_onevision", "llava_llama", "llava_mistral", "llava_qwen"),
            "mmjax.models.llava",
        ),
    }
)


def family_of_type(model_type: Any, where: str) -> Family:
    """The family that handles a hub config's model_type.

    Raises:
        ConfigError: no such family.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {short(model_type)} is not a family that mmjax knows; "
            f"it knows {', '.join(FAMILIES)}"
        )
    return _families_in(FAMILIES[model_type], model_type)[model_type]


def _families_in(module: str, model_type: str = "") -> Mapping[str, Family]:
    """The families that a module declares, by model_type (one for all its types, or one for each)."""
    found = importlib.import_module(module)
    return getattr(found, "FAMILIES", None) or {model_type: found.FAMILY}


def family_of_model(model: Model) -> tuple[Family, str]:
    """The family of a model and its architecture name.

    Raises:
        ConfigError: the model's class belongs to no family.
    """
    for module in dict.fromkeys(FAMILIES.values()):
        for model_type, family in _families_in(module).items():
            if model_type and model_type != getattr(model.config, "model_type", None):
                continue
            for architecture, cls in family.architectures.items():
                if type(model) is cls:
                    return family, architecture
    raise ConfigError(f"{type(model).__name__} is not a model class of a family that mmjax knows")


def choose_architecture(family: Family, hub: Mapping[str, Any], where: str) -> str:
    """The architecture that a config names, or the default of its model_type.

    Raises:
        ConfigError: the config names one that the family does not have.
    """
    named = hub.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"{where}: architectures should be a list of names, got {short(named)}")
    for name in named:
        if name in family.architectures:
            return name
    if named:
        raise ConfigError(
            f"{where}: architecture {short(named[0])} is not supported; "
            f"this family has {', '.join(family.architectures)}"
        )
    if len(family.architectures) == 1:
        return next(iter(family.architectures))
    by_type: dict[str, str] = {}
    for name, cls in family.architectures.items():
        by_type.setdefault(cls.model_type, name)
    return by_type[hub["model_type"]]
