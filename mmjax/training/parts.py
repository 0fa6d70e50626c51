"""Some of a model's parameters by themselves, such as its bridge: small files that are put onto a base."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from mmjax.checkpoints.files import TensorReader
from mmjax.checkpoints.rules import expand
from mmjax.checkpoints.weights import named_tensors
from mmjax.errors import CheckpointError, ConfigError
from mmjax.models.family import family_of_model
from mmjax.nn import parameter_specs
from mmjax.training.outcome import Outcome, export_hub
from mmjax.training.state import flatten, merge

PARTS = "parts.safetensors"
# What a folder's file of parts may be called; the last two are bridges of LLaVA's original repository.
_FILES = (PARTS, "mm_projector.bin", "mm_projector.safetensors")
BRIDGE = "multi_modal_projector/.*|image_newline"
"""The parameters of a LLaVA model's bridge."""


def chosen(params: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """The parameters whose whole path matches a regular expression, flat by path.

    Raises:
        ConfigError: none does.

    >>> chosen({"bridge": {"kernel": 1}, "brain": {"kernel": 2}}, "bridge/.*")
    {'bridge/kernel': 1}
    """
    found = {path: x for path, x in flatten(dict(params)).items() if re.fullmatch(pattern, path)}
    if not found:
        raise ConfigError(f"no parameter matches {pattern!r} (it has to match the whole path)")
    return found


def save_parts(
    folder: str | os.PathLike[str], model: Any, params: Mapping[str, Any], pattern: str = BRIDGE
) -> Path:
    """Write some of a model's parameters under the names that its family's folders have for them.

    Args:
        folder: made if it does not exist.
        model: the model.
        params: its parameters, nested.
        pattern: regular expression of whole paths.

    Returns:
        The file, parts.safetensors.

    Raises:
        CheckpointError: it cannot be written, or a parameter has no tensor of its own.
        ConfigError: nothing matches.
    """
    rules = family_of_model(model)[0].rules(model)
    tensors = dict(named_tensors(rules, merge(chosen(params, pattern))))
    path = Path(folder) / PARTS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(path.stat().st_mode | 0o044)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def load_parts(path: str | os.PathLike[str], model: Any) -> dict[str, jax.Array]:
    """Read some of a model's parameters.

    Args:
        path: a safetensors file, or one of torch.save (.bin, .pt, .pth; nothing in it is executed), under
            any names that folders of the family have; or a folder with parts.safetensors or, as LLaVA's
            original repository leaves it, mm_projector.bin.
        model: the model that they belong to.

    Returns:
        The parameters, flat by path; see `with_parts`.

    Raises:
        CheckpointError: the file is missing or damaged, or a tensor has no place in the model.
    """
    path = _file_of_parts(Path(path))
    with contextlib.ExitStack() as stack:
        reader = TensorReader([path], stack)
        # What was trained beside an adapter has peft's names.
        names = {name: name.removeprefix("base_model.model.") for name in reader.shapes}
        return read_parts(reader, model, names, str(path))


def _file_of_parts(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: has none of {', '.join(_FILES)}; name the file with the parts")
        return found[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return path


def with_parts(params: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """A model's parameters with some replaced, each in the dtype that it had.

    Args:
        params: nested parameters.
        parts: flat by path, as `load_parts` gives them.

    >>> params = {"bridge": {"bias": jnp.zeros(2)}, "brain": {"bias": jnp.zeros(2)}}
    >>> with_parts(params, {"bridge/bias": jnp.ones(2)})["bridge"]["bias"].tolist()
    [1.0, 1.0]
    """
    flat = flatten(dict(params))
    for path, part in parts.items():
        flat[path] = jnp.asarray(part, flat[path].dtype, device=getattr(flat[path], "sharding", None))
    return merge(flat)


def read_parts(
    reader: TensorReader, model: Any, names: Mapping[str, str], where: str
) -> dict[str, jax.Array]:
    """Parameters from tensors of an open file.

    Args:
        reader: the file.
        model: that they belong to.
        names: of tensors in the file, and the names that the family has for them.
        where: the file, for messages.

    Raises:
        CheckpointError: a tensor has no place in the model, or another shape.
    """
    specs = flatten(parameter_specs(model))
    known = {
        name: rule
        for rule in expand(family_of_model(model)[0].rules(model), specs)
        for name in (rule.source, *rule.aliases)
        if "{e}" not in name
    }
    found: dict[str, jax.Array] = {}
    for stored, name in names.items():
        if name not in known:
            raise CheckpointError(f"{where}: {stored} has no place in this model")
        rule = known[name]
        expected = rule.transform.source_shape([specs[target].shape for target in rule.targets])
        if tuple(reader.shapes[stored]) != tuple(expected):
            raise CheckpointError(
                f"{where}: {stored} is {list(reader.shapes[stored])}, expected {list(expected)}"
            )
        pieces = rule.transform.load(reader.read(stored))
        found |= {t: jnp.array(np.asarray(x)) for t, x in zip(rule.targets, pieces, strict=True)}
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportParts:
    """An experiment's `export`: the whole model in hub format, and some parameters in a small file beside it.

    Args:
        pattern: regular expression of the whole paths of those.
        alone: leave out the whole model.
    """

    pattern: str = BRIDGE
    alone: bool = False

    def __call__(self, outcome: Outcome, folder: Path) -> None:
        if not self.alone:
            export_hub(outcome, folder)
        save_parts(folder, outcome.model, outcome.params, self.pattern)
