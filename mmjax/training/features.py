"""Features of frozen eyes, computed once for all images of instruction data."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mmjax.data.config import Progress, Split
from mmjax.data.faults import BadSample
from mmjax.data.features import FeatureStore, write_features
from mmjax.data.sources import digest
from mmjax.errors import ConfigError, DataError
from mmjax.training.outcome import Outcome
from mmjax.training.progress import Reading
from mmjax.training.state import flatten

if TYPE_CHECKING:
    from mmjax.data.instruction_source import Conversations
    from mmjax.data.instructions import InstructionData

# Beside adapters, a model's own parameters are below "base".
_EYES = re.compile(r"(base/|lora/[^/]+/)?vision_tower/")
Picture = tuple[str, tuple[int, int], np.ndarray]


def keep_features(
    folder: str | os.PathLike[str],
    model: Any,
    params: Mapping[str, Any],
    processor: Any,
    data: InstructionData,
    *,
    split: Split = "train",
    batch_size: int = 32,
    dtype: str = "bfloat16",
    identity: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compute what a model's eyes see in the images of instruction data, and keep it.

    Training then reads features in place of images (`InstructionData.features`), as long as the eyes stay
    frozen: every image goes through them once, and not once an epoch. Images that are broken are left out.

    Args:
        folder: for the features; they take tiles * P * Dv numbers.
        model: has `vision_features`, as `Llava` has.
        params: its parameters, nested.
        processor: the model's.
        data: its images are kept, each once.
        split: whose images.
        batch_size: tiles that go through the eyes together.
        dtype: kept as "bfloat16", "float16" or "float32".
        identity: tells these features from others; None: a digest of the eyes' parameters.
        progress: called with (conversations done, conversations).

    Returns:
        The folder.

    Raises:
        DataError: there is no image that can be read, or the folder cannot be written.
    """
    see = jax.jit(lambda params, pixels: model.apply({"params": params}, pixels, method="vision_features"))

    def features(pictures: list[Picture]) -> Iterator[Picture]:
        tiles = np.concatenate([tiles for _, _, tiles in pictures])
        tiles = tiles.reshape(-1, *tiles.shape[-3:])
        count = len(tiles)
        full = -(-count // batch_size) * batch_size
        tiles = np.concatenate([tiles, np.zeros((full - count, *tiles.shape[1:]), tiles.dtype)])
        seen = [see(params, tiles[n : n + batch_size]) for n in range(0, full, batch_size)]
        rows = np.concatenate([np.asarray(part, np.float32) for part in seen])
        for key, size, own in pictures:
            yield key, size, rows[: len(own)]
            rows = rows[len(own) :]

    source = data.conversations(processor, split)
    source.check_names()

    def all_features() -> Iterator[Picture]:
        waiting: list[Picture] = []
        for picture in _pictures(source, progress):
            waiting.append(picture)
            if sum(len(tiles) for _, _, tiles in waiting) >= batch_size:
                yield from features(waiting)
                waiting = []
        if waiting:
            yield from features(waiting)

    eyes = eyes_digest(model, params, data.fitted(processor).image_processor)
    return write_features(folder, all_features(), dtype=dtype, identity=identity or eyes, eyes=eyes)


def eyes_digest(model: Any, params: Mapping[str, Any], image_processor: Any) -> str:
    """Changes with whatever changes what a model sees in an image.

    Args:
        model: as `Llava`.
        params: its parameters, nested or by path; of the eyes, they have to lie here whole.
        image_processor: what makes pixels of images.
    """
    config = model.config
    names = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
    computed = [getattr(config.vision_config, name) for name in names]
    seen = config.feature_layers, config.vision_feature_select_strategy, config.image_grid_pinpoints
    return digest(_digest(params), repr((computed, seen, image_processor.to_dict())))


def check_features(
    data: Any, model: Any, params: Mapping[str, Any], processor: Any, trained: Collection[str]
) -> None:
    """Refuse kept features that are not what a stage's eyes would see.

    Args:
        data: of the stage.
        model, processor: of the run.
        params: by path.
        trained: paths of those that train.

    Raises:
        ConfigError: the eyes train.
        DataError: the features are of other eyes, other layers or other pixels.
    """
    folder = getattr(data, "features", None)
    if folder is None:
        return
    eyes = next((path for path in sorted(trained) if _EYES.match(path)), None)
    if eyes is not None:
        raise ConfigError(
            f"data.features: {eyes} trains, but it is not used where features were kept; freeze it"
        )
    seeing = [leaf for path, leaf in params.items() if _EYES.match(path)]
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(seeing)):
        return  # of eyes that lie on several hosts no process has all
    if FeatureStore(folder).eyes != eyes_digest(model, params, data.fitted(processor).image_processor):
        raise DataError(
            f"{folder}: the features are of other eyes, or of images prepared in another way; keep them anew "
            "(mmjax.training.keep_features, or an experiment's prepare)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepFeatures:
    """An experiment's `prepare`: `keep_features`, unless the same features are there.

    Args:
        folder, split, batch_size, dtype: as for `keep_features`.
        data: its images are kept; its own `features` are not looked at.
    """

    folder: str
    data: Any
    split: Split = "train"
    batch_size: int = 32
    dtype: str = "bfloat16"

    def __call__(self, outcome: Outcome, say: Callable[[str], None]) -> None:
        data = dataclasses.replace(self.data, features=None)
        eyes = eyes_digest(outcome.model, outcome.params, data.fitted(outcome.processor).image_processor)
        identity = digest(eyes, repr(data), self.split, self.dtype)
        with contextlib.suppress(DataError):
            if FeatureStore(self.folder).identity == identity:
                return
        began = time.monotonic()
        keep_features(
            self.folder,
            outcome.model,
            outcome.params,
            outcome.processor,
            data,
            split=self.split,
            batch_size=self.batch_size,
            dtype=self.dtype,
            identity=identity,
            progress=Reading(say, "keeping what the eyes see: conversations"),
        )
        kept = len(FeatureStore(self.folder))
        say(f"kept what the eyes see in {kept:,} images in {self.folder} ({time.monotonic() - began:.0f} s)")


def _pictures(source: Conversations, progress: Progress | None) -> Iterator[Picture]:
    """Every image once: its key, its size and its tiles."""
    done: set[str] = set()
    for number in range(len(source)):
        try:
            names = source.names(number)
            if not all(source.key(name, len(names)) in done for name in names):
                found = source.pictures(number)
                yield from (picture for picture in found if picture[0] not in done)
                done.update(key for key, _, _ in found)
        except BadSample:
            pass  # a run counts it under its cause
        if progress is not None:
            progress(number + 1, len(source))


def _digest(params: Mapping[str, Any]) -> str:
    state = hashlib.blake2b(digest_size=8)
    for path, leaf in sorted(flatten(dict(params)).items()):
        if _EYES.match(path):
            state.update(path.removeprefix("base/").encode())
            for part in jax.tree.leaves(leaf):
                state.update(np.asarray(part).tobytes())
    return state.hexdigest()
