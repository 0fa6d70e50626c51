"""Adapters in PEFT's folder format: adapter_config.json with adapter_model.safetensors, in and out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mmjax.checkpoints.files import TensorReader, read_json
from mmjax.checkpoints.weights import named_tensors, write_json
from mmjax.errors import CheckpointError, ConfigError
from mmjax.models.family import family_of_model
from mmjax.nn import parameter_specs
from mmjax.training.lora import TABLE, Adapter, LoraConfig, changed_path
from mmjax.training.outcome import Outcome
from mmjax.training.parts import chosen, load_parts, read_parts
from mmjax.training.peft_names import modules_of, name_in_memory, other_names, shares_matrix, target_names
from mmjax.training.state import flatten, merge

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# As peft called them before, and what LLaVA's original repository leaves beside them.
_TORCH_WEIGHTS, _BESIDE_THEM = "adapter_model.bin", "non_lora_trainables.bin"
_PREFIX = "base_model.model."
_KEY = re.compile(
    re.escape(_PREFIX) + r"(?P<module>.+)\.lora_((?P<part>[AB])\.weight|embedding_(?P<side>[AB]))"
)
# peft's name for what the adapter of a module is beside. It saves that too where a vocabulary is targeted.
_BESIDE = re.compile(r"\.base_layer(?=\.(weight|bias)$)")
_ONE_MATRIX = (
    "is an adapter of the embedding or of the output, but this model has one matrix for both "
    "(tie_word_embeddings): leave both out of target_modules, or untie the base model"
)
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
# What the tensors of the file say by themselves, and what is about the making of the folder.
_IGNORED = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type"),
    *("inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("megatron_core", "megatron_config", "runtime_config", "qalora_group_size", "bias", "init_lora_weights"),
    *("ensure_weight_tying", "parent_library", "modules_to_save"),
}
# Initial values that leave the base as it is; others, such as PiSSA's, change it when a folder is opened.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def load_adapter(folder: str | os.PathLike[str], model: Any) -> tuple[dict[str, Any], LoraConfig]:
    """Open an adapter that peft (or `save_adapter`) wrote.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors (or adapter_model.bin).
        model: the model that it belongs to.

    Returns:
        The adapter and its config, for `mmjax.training.lora`.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor has no place in the model, or the folder uses
            a kind of adapter that is not LoRA as such (DoRA, trained biases, PiSSA, ...) or holds whole
            modules beside it (see `load_tuned`).
    """
    adapter, config, whole = load_tuned(folder, model)
    if whole:
        raise CheckpointError(
            f"{folder}: beside the adapter it holds {next(iter(whole))} whole: use load_tuned"
        )
    return adapter, config


def load_tuned(
    folder: str | os.PathLike[str], model: Any
) -> tuple[dict[str, Any], LoraConfig, dict[str, jax.Array]]:
    """Open an adapter with the parameters that were trained whole beside it, such as a bridge.

    Args:
        folder, model: as in `load_adapter`.

    Returns:
        The adapter, its config, and the whole parameters, flat by path (see `with_parts`), those of
        LLaVA's non_lora_trainables.bin among them. An adapter of the output or the embedding comes with
        that matrix, which peft saves along and puts into its base too.

    Raises:
        CheckpointError: as `load_adapter`, but for whole modules.
    """
    folder = Path(folder)
    where = folder / CONFIG
    hub = read_json(where)
    _check(hub, where)
    modules = modules_of(model)
    file = next((folder / n for n in (WEIGHTS, _TORCH_WEIGHTS) if (folder / n).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder / WEIGHTS}: no such file, and no {_TORCH_WEIGHTS} either")
    with contextlib.ExitStack() as stack:
        reader = TensorReader([file], stack)
        flat, others = _read_changes(reader, model, modules, file)
        whole = read_parts(reader, model, others, str(file))
    if hub.get("modules_to_save") and not whole:
        raise CheckpointError(
            f"{where}: modules_to_save={hub['modules_to_save']!r}, but {file.name} has no tensors of theirs"
        )
    # Beside safetensors it would be of an earlier training.
    if file.name == _TORCH_WEIGHTS and (folder / _BESIDE_THEM).is_file():
        whole |= load_parts(folder / _BESIDE_THEM, model)
    return merge(flat), _config(hub, flat, modules, where), whole


def _read_changes(
    reader: TensorReader, model: Any, modules: Mapping[str, list[str]], where: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The adapter, flat; and the other tensors of the file, with the names that folders have for them."""
    places = {module: path for path, names in modules.items() for module in names}
    flat: dict[str, Any] = {}
    others: dict[str, str] = {}
    for name in reader.shapes:
        match = _KEY.fullmatch(name)
        if match is None and name.startswith(_PREFIX):
            others[name] = _BESIDE.sub("", name.removeprefix(_PREFIX))
            continue
        path = places.get(match["module"]) if match else None
        if match is None or path is None or path.endswith(TABLE) != bool(match["side"]):
            shared = match is not None and shares_matrix(model, match["module"])
            raise CheckpointError(
                f"{where}: {name} {_ONE_MATRIX if shared else 'has no place in this model'}"
            )
        part = (match["part"] or match["side"]).lower()
        array = np.ascontiguousarray(reader.read(name).T)
        flat[f"{path.rpartition('/')[0]}/{part}"] = jnp.asarray(array)
    return flat, others


def save_adapter(
    folder: str | os.PathLike[str],
    model: Any,
    adapter: Adapter,
    config: LoraConfig,
    *,
    base: str | None = None,
    whole: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter that peft opens on top of the model's own folder.

    Args:
        folder: made if it does not exist.
        model: the model that the adapter belongs to.
        adapter, config: as `mmjax.training.lora` has them.
        base: name or path of the base model's folder, as the adapter's folder should name it.
        whole: parameters that were trained whole, flat by path; peft loads the modules that they are of.

    Raises:
        CheckpointError: a kernel is part of a fused tensor in the checkpoint, so that PEFT has no name for
            it, a table is the output's matrix too, or the folder cannot be written.
    """
    flat, modules = flatten(dict(adapter)), modules_of(model)
    specs = flatten(parameter_specs(model))
    paths = list(dict.fromkeys(changed_path(path.rpartition("/")[0], specs) for path in flat))
    nameless = [path for path in paths if path not in modules]
    if nameless:
        shared = shares_matrix(model, nameless[0].removesuffix(TABLE).replace("/", "."))
        reason = "no tensor of its own in the checkpoint, so PEFT has no name for it"
        raise CheckpointError(f"{nameless[0]}: {_ONE_MATRIX if shared else reason}")
    tensors = {
        _key_of(modules[path][0], path, part): np.ascontiguousarray(
            np.asarray(flat[f"{path.rpartition('/')[0]}/{part}"]).T
        )
        for path in paths
        for part in ("a", "b")
    }
    tensors |= _whole_tensors(model, whole or {}, {modules[path][0] for path in paths})
    odd = {path: config.rank_and_alpha(path) for path in paths}
    hub = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if "ForCausalLM" in family_of_model(model)[1] else None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "rank_pattern": {modules[p][0]: rank for p, (rank, _) in odd.items() if rank != config.rank},
        "alpha_pattern": {modules[p][0]: alpha for p, (_, alpha) in odd.items() if alpha != config.alpha},
        "target_modules": target_names(paths, modules),
        "modules_to_save": _modules_to_save(whole or {}, paths),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod((folder / WEIGHTS).stat().st_mode | 0o044)
        write_json(folder / CONFIG, hub)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportAdapter:
    """An experiment's `export`: the adapters in PEFT's format (a folder each, where there are several).

    Args:
        whole: regular expression of whole paths; parameters of the base that match it were trained too, and
            are written with the adapter.
    """

    whole: str = ""

    def __call__(self, outcome: Outcome, folder: Path) -> None:
        configs = dict(outcome.model.configs)
        whole = chosen(outcome.params["base"], self.whole) if self.whole else None
        for name, config in configs.items():
            place = folder if len(configs) == 1 else folder / name
            adapter, base = outcome.params["lora"][name], outcome.model.base
            save_adapter(place, outcome.model.model, adapter, config, base=base, whole=whole)
            tokenizer = getattr(outcome.processor, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save(place)


export_adapter = ExportAdapter()


def export_merged(outcome: Outcome, folder: Path) -> None:
    """An experiment's `export`: the whole model with the adapters merged into it, in hub format."""
    from mmjax.models.hub import save

    save(folder, outcome.model.model, outcome.model.merged(outcome.params), outcome.processor)


def _key_of(module: str, path: str, part: str) -> str:
    """Name in the file of one half of a kernel's or table's adapter."""
    end = f"embedding_{part.upper()}" if path.endswith(TABLE) else f"{part.upper()}.weight"
    return f"{_PREFIX}{module}.lora_{end}"


def _whole_tensors(model: Any, whole: Mapping[str, Any], adapted: Container[str]) -> dict[str, np.ndarray]:
    """Parameters under the names that they have in peft's model, where some modules have adapters."""
    rules, found = family_of_model(model)[0].rules(model), {}
    for name, array in named_tensors(rules, merge(whole)):
        module, _, leaf = name_in_memory([name, *other_names(model, name)]).rpartition(".")
        beside = ".base_layer" if module in adapted else ""
        found[f"{_PREFIX}{module}{beside}.{leaf}" if module else _PREFIX + leaf] = array
    return found


def _modules_to_save(whole: Mapping[str, Any], adapted: Sequence[str]) -> list[str] | None:
    """Modules that peft is to keep whole copies of: those with adapters inside cannot be, and need not be.

    A tensor that is under its own name in the file is put into peft's base model.
    """
    taken = {path.split("/")[0] for path in adapted}
    return sorted({path.split("/")[0] for path in whole if "/" in path} - taken) or None


def _check(hub: Mapping[str, Any], where: Path) -> None:
    if hub.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type {hub.get('peft_type')!r} is not LORA")
    if hub.get("bias", "none") != "none":
        raise CheckpointError(
            f"{where}: bias={hub['bias']!r}: adapters with trained biases are not supported"
        )
    start = hub.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{where}: init_lora_weights={start!r} changes the base model; convert the adapter with peft "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in hub.items():
        if name not in _READ and name not in _IGNORED and value:
            raise CheckpointError(f"{where}: {name}={value!r} is not supported")


def _config(
    hub: Mapping[str, Any], flat: Mapping[str, Any], modules: Mapping[str, list[str]], where: Path
) -> LoraConfig:
    rank, alpha, alphas = hub.get("r", 8), hub.get("lora_alpha", 8), hub.get("alpha_pattern") or {}
    paths = list(dict.fromkeys(changed_path(path.rpartition("/")[0], modules) for path in flat))
    exceptions = []
    for path in paths:
        own = flat.get(path.rpartition("/")[0] + "/a")
        known = [value for pattern, value in alphas.items() if _means(pattern, modules[path], where)]
        mine = rank if own is None else own.shape[1], known[0] if known else alpha
        if mine != (rank, alpha):
            exceptions.append((re.escape(path), int(mine[0]), float(mine[1])))
    try:
        return LoraConfig(
            targets="|".join(re.escape(path) for path in paths),
            rank=rank,
            alpha=float(alpha),
            dropout=float(hub.get("lora_dropout") or 0.0),
            rslora=bool(hub.get("use_rslora")),
            exceptions=tuple(exceptions),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _means(pattern: str, modules: list[str], where: Path) -> bool:
    """Whether a pattern of PEFT's means a module: a regular expression for the end of its name."""
    try:
        return any(re.match(rf"(.*\.)?({pattern})$", module) for module in modules)
    except (re.error, TypeError) as error:
        raise CheckpointError(
            f"{where}: alpha_pattern {pattern!r} is no regular expression ({error})"
        ) from None
