"""The layout of LLaVA's original repository: a language model's folder, with a bridge, its eyes elsewhere.

Such a folder's config.json is the language model's with attributes of its own (`mm_...`); its tensors are the
language model's and `model.mm_projector.*`, and those of the eyes where they were trained. Otherwise the eyes
are those of `mm_vision_tower`, a folder or a hub id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mmjax.checkpoints.files import JoinedTensors, open_tensors, read_json, weight_files
from mmjax.checkpoints.weights import load_params
from mmjax.errors import CheckpointError, ConfigError
from mmjax.models.family import family_of_type
from mmjax.models.hub_config import short
from mmjax.models.llava.config import LlavaConfig
from mmjax.models.llava.hub import EYES, PROJECTORS
from mmjax.models.llava.layout import ImageTokens
from mmjax.models.llava.model import Llava
from mmjax.models.llava.processor import LlavaProcessor
from mmjax.models.llava.rules import rules
from mmjax.models.processor import Processor
from mmjax.nn import Execution, parameter_specs
from mmjax.vision.config import VisionConfig
from mmjax.vision.processing import ImageProcessor
from mmjax.vision.tiles import SquareImageProcessor, TileImageProcessor

#: model_type of a folder to that of the language model in it.
BRAINS: Mapping[str, str] = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
# What belongs to the whole and to training, and is read here or changes nothing.
_OURS = (
    *(
        "mm_",
        "image_",
        "freeze_",
        "tune_",
        "unfreeze_",
        "use_mm_",
        "tokenizer_",
        "vision_tower",
        "pos_skipping",
    ),
    *("add_faster_video", "faster_token", "rope_scaling_for"),
)


def is_original(hub: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the original repository.

    >>> is_original({"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"})
    True
    """
    return hub.get("model_type") in BRAINS and "mm_vision_tower" in hub


def _tower_config(folder: Path) -> VisionConfig:
    hub, where = read_json(folder / "config.json"), str(folder / "config.json")
    kind = str(hub.get("model_type"))
    section = hub.get("vision_config") if kind in ("clip", "siglip") else hub
    section = dict(section or {})
    if kind in ("clip", "siglip"):
        kind = f"{kind}_vision_model"
    if kind not in EYES:
        raise ConfigError(f"{where}: model_type {short(kind)} has no eyes that LLaVA can look through")
    section["model_type"] = kind
    return family_of_type(kind, where).read_config(section, EYES[kind], frozenset(), where)


def read_original(hub: Mapping[str, Any], eyes: VisionConfig, where: str) -> LlavaConfig:
    """LlavaConfig of an original folder.

    Args:
        hub: its config.json.
        eyes: the config of its eyes.
        where: the file, for messages.
    """
    kind = BRAINS[hub["model_type"]]
    text = {name: value for name, value in hub.items() if not name.startswith(_OURS)}
    text |= {"model_type": kind, "architectures": []}
    brain = family_of_type(kind, where).read_config(text, "", frozenset(), where)
    projector = hub.get("mm_projector_type", "linear")
    if projector not in PROJECTORS:
        raise ConfigError(f"{where}: mm_projector_type {short(projector)} is none of {', '.join(PROJECTORS)}")
    if hub.get("mm_use_im_start_end"):
        raise ConfigError(f"{where}: mm_use_im_start_end=True is not supported here")
    ratio = str(hub.get("image_aspect_ratio") or "square")
    unpads = "unpad" in str(hub.get("mm_patch_merge_type", ""))
    model_type = "llava"
    if ratio.startswith("anyres"):
        if not unpads:
            raise ConfigError(f"{where}: mm_patch_merge_type of {ratio!r} images has to be 'spatial_unpad'")
        model_type = "llava_onevision" if "max_" in ratio else "llava_next"
    points = hub.get("image_grid_pinpoints") or []
    if model_type != "llava" and not (
        isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)
    ):
        raise ConfigError(f"{where}: image_grid_pinpoints {short(points)} is no list of pairs")
    keeps_cls = hub.get("mm_vision_select_feature", "patch") == "cls_patch" or not eyes.class_token
    layer = hub.get("mm_vision_select_layer", -2)
    try:
        return LlavaConfig(
            model_type=model_type,  # type: ignore[arg-type]
            vision_config=eyes,
            text_config=brain,
            # No id of the vocabulary stands for images there: ours is the first one beyond it.
            image_token_id=brain.vocab_size,
            projector=PROJECTORS[projector],
            vision_feature_layer=tuple(layer) if isinstance(layer, list) else layer,
            vision_feature_select_strategy="full" if keeps_cls else "default",
            # The original counts (width, height).
            image_grid_pinpoints=tuple((h, w) for w, h in points) if model_type != "llava" else (),
            vision_aspect_ratio=ratio if "max_" in ratio else "anyres",
            hub=json.dumps({"model_type": model_type}),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@contextlib.contextmanager
def open_original(folder: Path, hub: Mapping[str, Any], find: Any) -> Iterator[tuple[LlavaConfig, Any]]:
    """The config and the tensors of an original folder, those of its eyes among them.

    Args:
        folder: with config.json and weights.
        hub: its config.json.
        find: name of a folder or hub id to a folder.

    Raises:
        CheckpointError, ConfigError: something is missing, unknown or damaged.
    """
    where = folder / "config.json"
    # A folder without weights is told before its eyes are looked for, which may be on the hub.
    weight_files(folder)
    named = hub["mm_vision_tower"]
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{where}: mm_vision_tower {short(named)} is no name of a folder")
    inside = folder / named
    tower = inside if inside.is_dir() and inside.resolve().is_relative_to(folder.resolve()) else find(named)
    config = read_original(hub, _tower_config(Path(tower)), str(where))
    with open_tensors(folder) as own:
        names = {name: name for name in own.shapes}
        if any("vision_tower." in name for name in names):
            yield config, JoinedTensors((own, names))
            return
        with open_tensors(Path(tower)) as eyes:
            found = {f"vision_tower.{n}": n for n in eyes.shapes if n.startswith("vision_model.")}
            if not found:
                raise CheckpointError(f"{tower}: no tensors of a vision model (vision_model.*)")
            yield config, JoinedTensors((own, names), (eyes, found))


def original_tensors(
    folder: Path, hub: Mapping[str, Any], find: Any
) -> contextlib.AbstractContextManager[tuple[LlavaConfig, Any]] | None:
    """`open_original`; None for a folder that is none."""
    return open_original(folder, hub, find) if is_original(hub) else None


def original_processor(
    folder: Path, hub: Mapping[str, Any], config: LlavaConfig, find: Any
) -> LlavaProcessor:
    """The processor of an original folder: its tokenizer with an image token, its eyes' image processor."""
    named = folder / hub["mm_vision_tower"]
    tower = Processor.parts_of(named if named.is_dir() else find(hub["mm_vision_tower"]))
    plain = Processor.parts_of(folder)
    tokenizer = None if plain is None else plain.tokenizer
    if tokenizer is not None and tokenizer.token_to_id("<image>") is None:
        tokenizer = tokenizer.with_special_tokens(["<image>"])
    images: ImageProcessor | None = None if tower is None else tower.image_processor
    if images is not None:
        settings = {k: v for k, v in images.to_dict().items() if k != "image_processor_type"}
        if config.tiled:
            kind = f"Llava{'Next' if config.model_type == 'llava_next' else 'Onevision'}ImageProcessor"
            points = [list(point) for point in config.image_grid_pinpoints]
            settings |= {"image_processor_type": kind, "image_grid_pinpoints": points}
            images = TileImageProcessor.from_dict(settings)
        else:
            pads = hub.get("image_aspect_ratio") == "pad"
            settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": pads}
            images = SquareImageProcessor.from_dict(settings)
    return LlavaProcessor(images, tokenizer, image_tokens=ImageTokens.of(config))


def load_original(
    folder: Path, hub: Mapping[str, Any], *, dtype: Any, mesh: Any, execution: Any, find: Any
) -> tuple[Llava, dict[str, Any], LlavaProcessor] | None:
    """What `mmjax.load` returns of an original folder; None for a folder that is none.

    The vocabulary is grown by the id that stands for images, so that the model can be saved in llava-hf's
    layout; its rows are the mean of all others, which is never the likeliest token.
    """
    if not is_original(hub):
        return None
    with open_original(folder, hub, find) as (config, reader):
        processor = original_processor(folder, hub, config, find)
        model = Llava(config, execution=execution or Execution())
        specs = parameter_specs(model)
        params = load_params(reader, rules(model), specs, dtype=dtype, mesh=mesh, where=str(folder))
    number = config.image_token_id if processor.tokenizer is None else processor.image_token_id
    brain = config.text_config
    size = max(number + 1, brain.vocab_size)
    config = dataclasses.replace(
        config, image_token_id=number, text_config=dataclasses.replace(brain, vocab_size=size)
    )
    speaks = params["language_model"]
    table = speaks["model"]["embed_tokens"]
    table["embedding"] = _grown(table["embedding"], 0, size)
    if "lm_head" in speaks:
        speaks["lm_head"]["kernel"] = _grown(speaks["lm_head"]["kernel"], 1, size)
    return Llava(config, execution=model.execution), params, processor


def _grown(x: Any, axis: int, size: int) -> Any:
    """More entries along an axis, each the mean of those that there are."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    mean = jnp.mean(x.astype(jnp.float32), axis=axis, keepdims=True).astype(x.dtype)
    return jnp.concatenate([x, jnp.repeat(mean, missing, axis=axis)], axis=axis)


__all__ = [
    "is_original",
    "load_original",
    "open_original",
    "original_processor",
    "original_tensors",
    "read_original",
]
