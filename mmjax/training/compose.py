"""A LLaVA model put together from the folder of its eyes and the folder of its brain, with a new bridge."""

from __future__ import annotations

import dataclasses
import itertools
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mmjax.errors import ConfigError
from mmjax.parallel import param_shardings
from mmjax.training.source import OpenedModel, quick_to_compile
from mmjax.training.state import flatten
from mmjax.vision.config import pair

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
# Rows and columns of tiles that the published models cut images into.
_GRIDS = {
    "llava_next": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    "llava_onevision": tuple(itertools.product(range(1, 7), repeat=2)),
}
_MULTIPLE = 64  # the vocabulary's size is rounded up, so that it can be split over devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaFromParts:
    """LLaVA before its training: eyes and brain as they come, and a bridge that knows nothing yet.

    Args:
        eyes: folder or hub id of a model with a vision transformer, such as CLIP.
        brain: folder or hub id of a causal language model; with a tokenizer.
        model_type: "llava" (1.0, 1.5), "llava_next" or "llava_onevision".
        grids: (rows, columns) of tiles that images are cut into, where they are; None: those of the published
            models.
        projector: kind of the bridge, "linear" (1.0) or "mlp2x" (1.5).
        bridge: file or folder with a bridge that was saved before, here or by LLaVA's original repository
            (mm_projector.bin; see `load_parts`); None: a new one.
        feature_layer, feature_select: which of the eyes' features are seen (see `LlavaConfig`); by default
            all patches of the last layer but one, without a CLS token.
        template: chat template that the model's folder gets, one of `mmjax.language.CHAT_FORMATS`; None: the
            brain's own.
        pad: whether images are padded to squares, where they are not cut into tiles.
        dtype: the parameters' dtype; None keeps the folders'. The bridge, which trains, is float32.
        execution: how the model computes.
    """

    eyes: str
    brain: str
    model_type: str = "llava"
    grids: tuple[tuple[int, int], ...] | None = None
    projector: str = "mlp2x"
    bridge: str | None = None
    feature_layer: int | tuple[int, ...] = -2
    feature_select: str | None = None
    template: str | None = "vicuna"
    pad: bool = True
    dtype: str | None = None
    execution: Any = None

    def open(self, data: Any, key: jax.Array, mesh: Mesh) -> OpenedModel:
        """Read all but the weights of both folders; with a bridge between they are read when asked for."""
        from mmjax.models.hub import find_folder, load, open_folder
        from mmjax.models.llava import Llava
        from mmjax.nn import Execution, parameter_specs
        from mmjax.training.parts import BRIDGE, load_parts

        folders = find_folder(self.eyes), find_folder(self.brain)
        with open_folder(folders[0], self.dtype, mesh) as seeing:
            tower = flatten(_tower(seeing.shapes(), self.eyes))
        with open_folder(folders[1], self.dtype, mesh) as speaking:
            brain = flatten(speaking.shapes())
        tokenizer = getattr(speaking.processor, "tokenizer", None)
        if tokenizer is None:
            raise ConfigError(f"LlavaFromParts.brain: {self.brain} has no tokenizer")
        tokenizer = tokenizer.with_special_tokens(self._tokens())
        config = self._config(seeing.model, speaking.model, tokenizer)
        processor = self._processor(config, seeing.processor, tokenizer)
        model = Llava(config, execution=self.execution or Execution())
        nested = parameter_specs(model)
        specs = flatten(nested)
        shardings: dict[str, NamedSharding] = flatten(param_shardings(mesh, nested))

        def params() -> dict[str, jax.Array]:
            eyes, speaks = (load(folder, self.dtype, mesh)[1] for folder in folders)
            flat = {f"vision_tower/{path}": x for path, x in flatten(_tower(eyes, self.eyes)).items()}
            flat |= {f"language_model/{path}": x for path, x in flatten(speaks).items()}
            made = {} if self.bridge is None else load_parts(self.bridge, model)
            drawn = jax.random.fold_in(key, zlib.crc32(b"bridge"))
            bridge = {path: x for path, x in shardings.items() if re.fullmatch(BRIDGE, path)}
            flat |= _new_bridge(model, drawn, bridge, quick_to_compile(mesh))
            flat |= {path: x.astype(jnp.float32) for path, x in made.items()}
            return {
                path: _placed(flat.pop(path), spec.shape, shardings[path]) for path, spec in specs.items()
            }

        shapes = _shapes(specs, tower, brain)
        return OpenedModel(
            model=model, processor=processor, shapes=shapes, shardings=shardings, params=params
        )

    def open_shapes(self, mesh: Mesh) -> OpenedModel:
        """The same as shapes, for a plan: the headers of both folders are read, and no tokenizer."""
        from mmjax.models.llava import Llava
        from mmjax.nn import Execution, parameter_specs
        from mmjax.training.plan_shapes import folder_shapes
        from mmjax.training.source import FromFolder

        seeing, speaking = (
            folder_shapes(FromFolder(path=path, dtype=self.dtype), mesh) for path in (self.eyes, self.brain)
        )
        config = self._config(seeing.model, speaking.model)
        model = Llava(config, execution=self.execution or Execution())
        nested = parameter_specs(model)
        eyes = {path.removeprefix("vision_model/"): x for path, x in seeing.shapes.items()}
        shapes = _shapes(flatten(nested), eyes, speaking.shapes)
        shardings = flatten(param_shardings(mesh, nested))
        return OpenedModel(model=model, processor=None, shapes=shapes, shardings=shardings, params=dict)

    def _tokens(self) -> list[str]:
        """Special tokens that the brain does not know."""
        return [IMAGE_TOKEN, VIDEO_TOKEN] if self.model_type == "llava_onevision" else [IMAGE_TOKEN]

    def _config(self, seeing: Any, speaking: Any, tokenizer: Any = None) -> Any:
        """The model's config; without a tokenizer its vocabulary is taken to be full."""
        from mmjax.models.llava import LlavaConfig

        vision = getattr(seeing.config, "vision_config", seeing.config)
        text = speaking.config
        new = self._tokens()
        known = text.vocab_size + len(new) if tokenizer is None else tokenizer.vocab_size
        ids = [
            text.vocab_size + n if tokenizer is None else tokenizer.token_to_id(t) for n, t in enumerate(new)
        ]
        size = max(text.vocab_size, known)
        if size > text.vocab_size:
            size = -(-size // _MULTIPLE) * _MULTIPLE
        patches = "default" if vision.class_token else "full"
        tiled = self.model_type != "llava"
        height, width = pair(vision.image_size, "image_size")
        grids = _GRIDS.get(self.model_type, ()) if self.grids is None else self.grids
        if self.grids is not None and not tiled:
            raise ConfigError("LlavaFromParts.grids: a llava model cuts no images; set model_type=llava_next")
        return LlavaConfig(
            model_type=self.model_type,  # type: ignore[arg-type]
            image_grid_pinpoints=tuple((rows * height, columns * width) for rows, columns in grids),
            vision_aspect_ratio="anyres_max_9" if self.model_type == "llava_onevision" else "anyres",
            vision_config=vision,
            text_config=dataclasses.replace(text, vocab_size=size),
            image_token_id=ids[0],
            video_token_id=ids[1] if len(ids) > 1 else None,
            projector=self.projector,
            vision_feature_layer=self.feature_layer,
            vision_feature_select_strategy=self.feature_select or patches,  # type: ignore[arg-type]
        )

    def _processor(self, config: Any, eyes: Any, tokenizer: Any) -> Any:
        from mmjax.language import chat_format
        from mmjax.models.llava import ImageTokens
        from mmjax.models.llava.processor import LlavaProcessor
        from mmjax.vision.processing import ImageProcessor
        from mmjax.vision.tiles import SquareImageProcessor, TileImageProcessor

        own = getattr(eyes, "image_processor", None)
        if own is None:
            raise ConfigError(f"LlavaFromParts.eyes: {self.eyes} has no preprocessor_config.json")
        names = [field.name for field in dataclasses.fields(ImageProcessor)]
        settings = {name: getattr(own, name) for name in names if name != "image_processor_type"}
        if self.template is not None:
            tokenizer = tokenizer.with_chat_template(chat_format(self.template))
        seeing: Any = SquareImageProcessor(**settings, do_pad=self.pad)
        if config.tiled:
            kind = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[config.model_type]
            settings["image_grid_pinpoints"] = config.image_grid_pinpoints
            seeing = TileImageProcessor(**settings, image_processor_type=f"{kind}ImageProcessor")
        return LlavaProcessor(
            seeing,
            tokenizer,
            image_tokens=ImageTokens.of(config),
            image_token=IMAGE_TOKEN,
        )


def _tower(params: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if "vision_model" not in params:
        raise ConfigError(f"LlavaFromParts.eyes: {where} has no vision model that LLaVA can look through")
    return params["vision_model"]


def _shapes(
    specs: Mapping[str, Any], eyes: Mapping[str, Any], brain: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The whole's parameters, in the dtypes that eyes and brain have; the bridge's are float32."""
    kept = {f"vision_tower/{path}": x.dtype for path, x in eyes.items()}
    kept |= {f"language_model/{path}": x.dtype for path, x in brain.items()}
    return {
        path: jax.ShapeDtypeStruct(spec.shape, kept.get(path, jnp.float32)) for path, spec in specs.items()
    }


def _new_bridge(
    model: Any, key: jax.Array, shardings: Mapping[str, NamedSharding], options: dict[str, int]
) -> dict[str, jax.Array]:
    """A new model's parameters at some paths; nothing else of it is made."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten(model.init(key, **model.example_batch())["params"])
        return {path: flat[path] for path in shardings}

    return jax.jit(init, out_shardings=dict(shardings), compiler_options=options)(key)


def _placed(x: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    if x.shape == shape:
        return jax.device_put(x, sharding)
    return jax.jit(_grown, static_argnums=1, out_shardings=sharding)(x, shape)


def _grown(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A table with rows (or columns) for new tokens, which begin as the mean of all others."""
    for axis, (have, want) in enumerate(zip(x.shape, shape, strict=True)):
        if want > have:
            mean = jnp.mean(x, axis=axis, keepdims=True, dtype=np.float32).astype(x.dtype)
            new = jnp.broadcast_to(mean, (*x.shape[:axis], want - have, *x.shape[axis + 1 :]))
            x = jnp.concatenate([x, new], axis=axis)
    return x


__all__ = ["LlavaFromParts"]
