"""LLaVA's checkpoint keys: llava-hf's names, and all others that its folders have had."""

from __future__ import annotations

import dataclasses

from mmjax.checkpoints import LINEAR, KeyRules, Rule, rule
from mmjax.models.assemblies import Model
from mmjax.models.causal_lm.model import CausalLM
from mmjax.models.family import family_of_type
from mmjax.models.llava.config import LlavaConfig
from mmjax.models.llava.hub import eyes_family

#: What the eyes' names have stood below: as published, in memory, and in the original repository.
EYES = ("vision_tower.", "model.vision_tower.", "model.vision_tower.vision_tower.")
#: The projector's linear layers in the original repository, alone and with the whole model.
ORIGINAL = ("model.mm_projector", "mm_projector")


def _eyes(config: LlavaConfig) -> tuple[tuple[Rule, ...], tuple[tuple[str, str], ...]]:
    family, _, cls = eyes_family(config.vision_config)
    table = family.rules(cls(config.vision_config))
    found = []
    for r in table.rules:
        names = [*dict.fromkeys(name.removeprefix("vision_model.") for name in (r.source, *r.aliases))]
        inner: tuple[str, ...] = (
            ("vision_model.", "") if config.layout == "published" else ("", "vision_model.")
        )
        if cls.__name__ == "ViTModel":
            inner = ("",)
        sources = [prefix + middle + name for prefix in EYES for middle in inner for name in names]
        targets = tuple("vision_tower/" + target.removeprefix("vision_model/") for target in r.targets)
        if all(target.startswith("vision_model/") for target in r.targets):
            found.append(Rule(sources[0], targets, r.transform, tuple(sources[1:])))
    prefixes = "|".join(prefix.replace(".", r"\.") for prefix in EYES)
    return tuple(found), tuple((f"({prefixes}){pattern}", reason) for pattern, reason in table.ignored)


def _brain(config: LlavaConfig) -> tuple[tuple[Rule, ...], tuple[tuple[str, str], ...]]:
    family = family_of_type(config.text_config.model_type, "text_config")
    table = family.rules(CausalLM(config.text_config))
    found = []
    for r in table.rules:
        aliases = []
        for name in (r.source, *r.aliases):
            # In memory the output product stands beside the model, the rest below model.language_model.
            inner = name.removeprefix("model.")
            aliases += [f"language_model.{name}", name, f"model.language_model.{inner}"]
        targets = tuple("language_model/" + target for target in r.targets)
        found.append(dataclasses.replace(r, source=aliases[0], targets=targets, aliases=tuple(aliases[1:])))
    prefix = r"(language_model\.|model\.language_model\.)?"
    # The last alternative is for names without their own "model.".
    ignored = [
        (prefix + shape, reason)
        for pattern, reason in table.ignored
        for shape in {pattern, pattern.removeprefix(r"model\.")}
    ]
    return tuple(found), tuple(ignored)


def _bridge(config: LlavaConfig) -> tuple[Rule, ...]:
    numbered = config.projector != "linear"
    found = []
    for name, place in (("linear_1", ".0"), ("linear_2", ".2")):
        for theirs, ours in (("weight", "kernel"), ("bias", "bias")):
            stem = f"multi_modal_projector.{name}.{theirs}"
            originals = [f"{prefix}{place if numbered else ''}.{theirs}" for prefix in ORIGINAL]
            target = f"multi_modal_projector/{name}/{ours}"
            transform = (LINEAR,) if theirs == "weight" else ()
            made = rule(stem, target, *transform)
            found.append(dataclasses.replace(made, aliases=("model." + stem, *originals)))
    return tuple(found)


def bridge_rules(config: LlavaConfig) -> KeyRules:
    """The projector's table alone (and the embedding that ends rows), for files that hold nothing else."""
    newline = rule("image_newline", "image_newline")
    newline = dataclasses.replace(newline, aliases=("model.image_newline",))
    return KeyRules(rules=(*_bridge(config), newline))


def rules(model: Model) -> KeyRules:
    """The table of a LLaVA model."""
    config: LlavaConfig = model.config
    (eyes, eyes_ignored), (brain, brain_ignored) = _eyes(config), _brain(config)
    return KeyRules(
        rules=(*eyes, *bridge_rules(config).rules, *brain), ignored=(*eyes_ignored, *brain_ignored)
    )


__all__ = ["bridge_rules", "rules"]
