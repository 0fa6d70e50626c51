"""What peft calls a model's modules: the names that transformers has for them in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.checkpoints.rules import expand
from mmjax.checkpoints.transforms import LINEAR, SAME
from mmjax.models.family import family_of_model
from mmjax.nn import parameter_specs
from mmjax.training.lora import TABLE
from mmjax.training.state import flatten

_SEEING = ("language_model.", "multi_modal_projector.", "vision_tower.", "image_newline")
_VOCABULARY = ("lm_head", "output", "embed_tokens", "tok_embeddings")


def modules_of(model: Any) -> dict[str, list[str]]:
    """Kernel's or table's path to its module's names in checkpoints, where it has a tensor of its own."""
    specs = flatten(parameter_specs(model))
    found = {}
    for rule in expand(family_of_model(model)[0].rules(model), specs):
        path = rule.targets[0]
        kernel = rule.transform == LINEAR and len(rule.targets) == 1 and "{e}" not in rule.source
        table = rule.transform == SAME and path.endswith(TABLE) and rule.source.endswith(".weight")
        names = [name.removesuffix(".weight") for name in (rule.source, *rule.aliases)]
        if kernel or (table and not shares_matrix(model, names[0])):
            own = name_in_memory(names)
            found[path] = [own, *(name for name in names if name != own)]
    return found


def shares_matrix(model: Any, module: str) -> bool:
    """Whether a module (as checkpoints name it) is the embedding or the output of a model that ties them."""
    config = getattr(model.config, "text_config", model.config)
    return module.rpartition(".")[2] in _VOCABULARY and bool(getattr(config, "tie_word_embeddings", False))


def other_names(model: Any, source: str) -> tuple[str, ...]:
    """The other names that folders have for a tensor."""
    specs = flatten(parameter_specs(model))
    rules = expand(family_of_model(model)[0].rules(model), specs)
    return next((rule.aliases for rule in rules if rule.source == source), ())


def name_in_memory(names: Sequence[str]) -> str:
    """Of a tensor's or module's names the one that transformers has for it in memory, as peft sees it.

    Folders of models that see keep older names, which transformers maps when it opens them.
    """
    for prefix in ("lm_head", *(f"model.{part}" for part in _SEEING)):
        for name in names:
            if names[0].startswith(_SEEING) and name.startswith(prefix):
                return name
    return names[0]


def target_names(paths: list[str], modules: Mapping[str, list[str]]) -> list[str]:
    """Last parts of the modules' names, where they mean no other module; else whole names."""
    wanted = {modules[path][0] for path in paths}
    last = {name.rpartition(".")[2] for name in wanted}
    meant = {names[0] for names in modules.values() if names[0].rpartition(".")[2] in last}
    return sorted(last if meant == wanted else wanted)
