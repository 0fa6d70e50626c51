"""Where a run's model comes from: a config, or a folder of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding

from mmjax.errors import ConfigError
from mmjax.parallel import param_shardings, replicated
from mmjax.training.state import flatten


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model ready to be trained.

    Attributes:
        model: the Linen module.
        processor: what turns images and text into the model's inputs, or None.
        shapes: parameter path to jax.ShapeDtypeStruct.
        shardings: parameter path to sharding.
        params: makes or reads the parameters, flat and sharded, and keeps none of them: whoever trains them
            may donate them. Not called when a checkpoint has them.
    """

    model: nn.Module
    processor: Any
    shapes: dict[str, jax.ShapeDtypeStruct]
    shardings: dict[str, NamedSharding]
    params: Callable[[], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromConfig:
    """A model with new parameters.

    Args:
        config: the family's config.
        model: called as model(config, execution=execution), or model(config) without an execution.
        execution: how the model computes (dtype, scan, remat).
        processor: called with the experiment's data; returns the processor. It has to give the
            same processor every time, since a resumed run calls it again.
    """

    config: Any
    model: Callable[..., nn.Module]
    execution: Any = None
    processor: Callable[[Any], Any] | None = None

    def open(self, data: Any, key: jax.Array, mesh: Mesh) -> OpenedModel:
        """Build the module and processor; parameters wait until they are asked for."""
        extra = {} if self.execution is None else {"execution": self.execution}
        model = self.model(self.config, **extra)
        processor = self.processor(data) if self.processor is not None else None
        _check_tokenizer(self.config, processor)

        def init(key: jax.Array) -> Mapping[str, Any]:
            batch = model.example_batch(batch_size=1)  # type: ignore[attr-defined]
            return flatten(model.init(key, **batch)["params"])

        shapes = dict(jax.eval_shape(init, key))
        shardings = _shardings(model, mesh, shapes)
        return OpenedModel(
            model=model,
            processor=processor,
            shapes=shapes,
            shardings=shardings,
            params=lambda: dict(
                jax.jit(init, out_shardings=shardings, compiler_options=quick_to_compile(mesh))(key)
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromFolder:
    """A model with the weights of a hub-format folder.

    Args:
        path: the folder, or a hub id.
        dtype: the parameters' dtype; None keeps the folder's.
        execution: how the model computes; None takes the loader's default.
        processor: called with the experiment's data, in place of the folder's processor.
    """

    path: str
    dtype: str | None = None
    execution: Any = None
    processor: Callable[[Any], Any] | None = None

    def open(self, data: Any, key: jax.Array, mesh: Mesh) -> OpenedModel:
        """Read all but the weights, which go straight into the mesh when they are asked for."""
        from mmjax.models.hub import find_folder, load, open_folder

        folder = find_folder(self.path)
        with open_folder(folder, self.dtype, mesh) as opened:
            model, processor = opened.model, opened.processor
            shapes = flatten(opened.shapes())
        if self.execution is not None:
            model = model.clone(execution=self.execution)
        if self.processor is not None:
            processor = self.processor(data)
        return OpenedModel(
            model=model,
            processor=processor,
            shapes=shapes,
            shardings=_shardings(model, mesh, shapes),
            params=lambda: flatten(load(folder, self.dtype, mesh)[1]),
        )


def quick_to_compile(mesh: Mesh) -> dict[str, int]:
    """A program that runs once: on a CPU, optimising it takes seconds and saves none."""
    return {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else {}


# Configs from before the field was right say 2; pooling then takes the largest id of a row.
_EOS_UNSET = 2


def _check_tokenizer(config: Any, processor: Any) -> None:
    """A new model whose ids are not its tokenizer's would train on nonsense without a sign of it."""
    tokenizer = getattr(processor, "tokenizer", None)
    text = getattr(config, "text_config", config)
    if tokenizer is None or not hasattr(text, "vocab_size"):
        return
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"text_config.vocab_size={text.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens"
        )
    eos = getattr(text, "eos_token_id", _EOS_UNSET)
    if getattr(text, "pooling", None) == "eos" and eos not in (_EOS_UNSET, tokenizer.eos_token_id):
        raise ConfigError(
            f"text_config.eos_token_id={eos}, but the tokenizer's texts end with {tokenizer.eos_token_id}"
        )


def _shardings(model: nn.Module, mesh: Mesh, paths: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """The model's own layout; a module that names no axes is whole on every device."""
    from mmjax.nn import parameter_specs

    if mesh.size == 1:
        return dict.fromkeys(paths, replicated(mesh))
    return flatten(param_shardings(mesh, parameter_specs(model)))
