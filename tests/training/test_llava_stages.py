"""LLaVA's stages at toy size: what moves and what does not, and batches that hold their own images."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mmjax.data.instructions import InstructionData
from mmjax.errors import ConfigError, DataError
from mmjax.language import DecoderConfig
from mmjax.models import CLIPVisionConfig, Llava, LlavaConfig
from mmjax.models.llava.layout import ImageTokens
from mmjax.models.llava.processor import LlavaProcessor
from mmjax.parallel import batch_sharding, make_mesh, replicated
from mmjax.training import FROZEN, Constant, Cosine, NextToken, Rule, create_state, mean_loss
from mmjax.training.features import check_features, keep_features
from mmjax.training.optimizer import label_parameters, make_optimizer, trained_rules
from mmjax.training.state import flatten
from mmjax.training.step import make_train_step
from mmjax.vision.tiles import SquareImageProcessor, TileImageProcessor
from tests.data.seeing import TOKENIZER, row, write_images, write_rows
from tests.tiny import random_params

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
EYES = CLIPVisionConfig(image_size=8, patch_size=4, num_hidden_layers=2, **SIZES)
BRAIN = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, max_position_embeddings=512, num_hidden_layers=2, **SIZES
)
IMAGE = TOKENIZER.token_to_id("<image>")
CONFIGS = {
    "llava": LlavaConfig(vision_config=EYES, text_config=BRAIN, image_token_id=IMAGE),
    "llava_next": LlavaConfig(
        model_type="llava_next",
        vision_config=EYES,
        text_config=BRAIN,
        image_token_id=IMAGE,
        image_grid_pinpoints=((8, 16), (16, 8), (16, 16)),
    ),
}


def processor_of(kind: str) -> LlavaProcessor:
    config = CONFIGS[kind]
    eyes: Any = SquareImageProcessor(size=8, crop_size=8)
    if kind != "llava":
        eyes = TileImageProcessor(size=8, crop_size=8, image_grid_pinpoints=config.image_grid_pinpoints)
    return LlavaProcessor(eyes, TOKENIZER, image_tokens=ImageTokens.of(config))


@functools.cache
def model_of(kind: str) -> tuple[Llava, Any]:
    model = Llava(CONFIGS[kind])
    return model, random_params(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("llava")
    names = write_images(work / "images", [(8, 8), (16, 9), (9, 21), (30, 10), (5, 5)])
    rows = [row(name, "<image>\nwhat is this?", "a red cat" * n) for n, name in enumerate(names, start=1)]
    rows += [row(names[:2], "<image><image>\nthe mat?", "sat."), row(None, "what?", "the dog, the dog.")]
    write_rows(work / "rows.json", rows)
    return work


def data_of(folder: Path, **options: Any) -> InstructionData:
    plain = {"path": str(folder / "rows.json"), "images": str(folder / "images"), "sequence_length": 192}
    return InstructionData(**{**plain, "template": "vicuna", "num_threads": 0, **options})


def batch_of(folder: Path, kind: str, batch_size: int = 8, **options: Any) -> dict[str, Any]:
    data = data_of(folder, **{"arrange": "group", **options})
    batch = data.build(processor=processor_of(kind), batch_size=batch_size, seed=0).batch(0)
    return {name: x for name, x in batch.items() if name != "ids"}


KEY = jax.random.key(0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_with_images_of_their_own_have_the_loss_of_each_alone(folder, kind):
    model, params = model_of(kind)
    processor = processor_of(kind)
    source = data_of(folder).conversations(dataclasses.replace(processor, tokenizer=TOKENIZER))
    losses, weights = [], []
    sums = jax.jit(lambda batch: NextToken().sums(model, params, batch))
    for number in range(len(source)):
        talk = source._talk(source.entries[number])
        sample = processor.encode(
            talk.messages, source.images(number) or None, return_assistant_tokens_mask=True
        )
        labels = np.where(sample.pop("assistant_masks"), sample["input_ids"], -100)
        batch = processor.collate([{**sample, "labels": labels}], length=192, images=2, tiles=5)
        names = ("input_ids", "labels", "pixel_values", "image_index", "image_weights")
        loss, share = sums({n: batch[n] for n in names if n in batch})
        losses.append(float(loss))
        weights.append(float(share))
    for arrange in ("pack", "group"):
        data = data_of(folder, arrange=arrange)
        batches = data.build(processor=processor, batch_size=1, seed=0)
        made = [batches.batch(number) for number in range(batches.samples)]
        np.testing.assert_allclose(mean_loss(model, params, made), sum(losses) / sum(weights), rtol=2e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_kept_features_give_the_same_loss_without_the_images(folder, tmp_path, kind):
    (model, params), processor = model_of(kind), processor_of(kind)
    data = data_of(folder)
    kept = keep_features(tmp_path, model, params, processor, data, batch_size=4, dtype="float32")
    ready = dataclasses.replace(data, features=str(kept), images=str(tmp_path))
    blind = {**params, "vision_tower": jax.tree.map(np.zeros_like, params["vision_tower"])}
    pixels, features = (
        each.build(processor=processor, batch_size=4, seed=0).batch(0) for each in (data, ready)
    )
    assert "tiles" in pixels and "tile_features" in features
    np.testing.assert_allclose(
        mean_loss(model, blind, [features]), mean_loss(model, params, [pixels]), rtol=2e-6
    )


def test_features_of_other_eyes_are_refused(folder, tmp_path):
    (model, params), processor = model_of("llava"), processor_of("llava")
    kept = keep_features(tmp_path, model, params, processor, data_of(folder), batch_size=4)
    ready, flat = data_of(folder, features=str(kept)), flatten(jax.device_put(params))
    bridge = {path for path in flat if path.startswith("multi_modal_projector")}
    check_features(data_of(folder), model, flat, processor, set(flat))
    check_features(ready, model, flat, processor, bridge)
    kernel = next(path for path in flat if path.startswith("vision_tower") and flat[path].ndim == 2)
    deeper = Llava(dataclasses.replace(model.config, vision_feature_layer=-1))
    padded = data_of(folder, features=str(kept), pad_images=True)
    for data, seen, values in (
        (ready, model, {**flat, kernel: flat[kernel].at[0, 0].add(1.0)}),
        (ready, deeper, flat),
        (padded, model, flat),
    ):
        with pytest.raises(DataError, match="the features are of other eyes, or of images prepared in"):
            check_features(data, seen, values, processor, bridge)
    with pytest.raises(ConfigError, match="data.features: vision_tower/.* trains, but it is not used"):
        check_features(ready, model, flat, processor, {*bridge, kernel})
    adapted = {f"base/{path}": leaf for path, leaf in flat.items()}
    check_features(ready, model, adapted, processor, {"lora/default/language_model/x"})
    with pytest.raises(ConfigError, match="data.features: lora/default/vision_tower/x trains"):
        check_features(ready, model, adapted, processor, {"lora/default/vision_tower/x"})


def test_features_of_one_name_in_two_folders_are_refused(folder, tmp_path):
    (model, params), processor = model_of("llava"), processor_of("llava")
    for name in ("one", "other"):
        shutil.copytree(folder / "images", tmp_path / name)
        shutil.copy(folder / "rows.json", tmp_path / name)
    data = data_of(folder, path=f"{tmp_path}/one/rows.json::{tmp_path}/other/rows.json", images=None)
    with pytest.raises(DataError, match="features are kept by the names of images, which lie in .* and in"):
        keep_features(tmp_path / "kept", model, params, processor, data)
    kept = keep_features(tmp_path / "kept", model, params, processor, data_of(folder), batch_size=4)
    with pytest.raises(DataError, match="set images to one folder and name them from there"):
        dataclasses.replace(data, features=str(kept)).build(processor=processor, batch_size=4, seed=0)


STAGES = {
    "alignment": (Rule("multi_modal_projector/.*", Cosine(peak=1e-2)), Rule(".*", FROZEN)),
    "instruction": (
        Rule("vision_tower/.*", FROZEN),
        Rule("multi_modal_projector/.*", Constant(value=1e-2)),
        Rule("language_model/.*", Constant(value=1e-4)),
    ),
}


def stepped(
    folder: Path, stage: str, *, steps: int = 2, mesh: Any = None, **options: Any
) -> tuple[Any, Any, Any]:
    model, params = model_of("llava")
    flat = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    labels = label_parameters(flat, STAGES[stage], stage)
    rules = trained_rules(STAGES[stage])
    trained = frozenset(path for path, label in labels.items() if label in rules)
    optimizer = make_optimizer(
        {path: labels[path] for path in trained},
        {index: schedule.build(10) for index, schedule in rules.items()},
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    state = create_state(flat, trained, optimizer, KEY)
    step = jax.jit(make_train_step(model, NextToken(), optimizer, mesh=mesh, **options))
    batch: Any = batch_of(folder, "llava")
    if mesh is not None:
        state, batch = jax.device_put(state, replicated(mesh)), jax.device_put(batch, batch_sharding(mesh))
    metrics = None
    for _ in range(steps):
        state, metrics = step(state, batch)
    return flat, state, metrics


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_cost_nothing_and_stay_bitwise(folder, stage):
    before, state, metrics = stepped(folder, stage)
    moving = "multi_modal_projector/" if stage == "alignment" else "(multi_modal_projector|language_model)/"
    assert set(state.params) == {path for path in before if re.match(moving, path)}
    assert set(state.frozen) == set(before) - set(state.params)
    for path, leaf in state.frozen.items():
        np.testing.assert_array_equal(leaf, before[path])
    for path, leaf in state.params.items():
        assert np.abs(np.asarray(leaf) - before[path]).max() > 0, path
    # Moments are kept for what trains and for nothing else.
    held = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert held == 2 * sum(x.size for x in state.params.values())
    assert np.isfinite(metrics["loss"])


def test_the_bridge_has_a_rate_of_its_own(folder):
    before, state, _ = stepped(folder, "instruction", steps=1)
    moved = {path: np.abs(np.asarray(x) - before[path]).max() for path, x in state.params.items()}
    bridge = [change for path, change in moved.items() if path.startswith("multi_modal")]
    brain = [change for path, change in moved.items() if path.startswith("language_model")]
    # Adam's first step is the rate, whatever the gradient.
    np.testing.assert_allclose(bridge, 1e-2, rtol=0.02)
    np.testing.assert_allclose(max(brain), 1e-4, rtol=0.02)


def test_micro_batches_and_devices_give_the_same_step(folder):
    _, whole, metrics = stepped(folder, "instruction", steps=1)
    for options in ({"accumulate": 4}, {"mesh": make_mesh({"data": 4}, jax.devices()[:4])}):
        _, state, found = stepped(folder, "instruction", steps=1, **options)
        np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    model, params = model_of("llava")
    batch = batch_of(folder, "llava")
    shared = {
        "input_ids": batch["input_ids"],
        "image_index": batch["image_index"],
        "pixel_values": batch["tiles"][:, 0],
    }
    with pytest.raises(ConfigError, match="image_index counts in the images of the whole batch"):
        NextToken()(model, params, shared, KEY, micro_batches=2)
