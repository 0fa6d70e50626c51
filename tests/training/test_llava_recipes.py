"""LLaVA's recipes at toy size, on ten rows: from eyes and brain to an aligned, then a tuned model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import mmjax
from mmjax.data import ChatData, InstructionData
from mmjax.errors import CheckpointError, ConfigError
from mmjax.language import DecoderConfig, train_bpe_tokenizer
from mmjax.models import (
    CausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Processor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from mmjax.parallel import make_mesh
from mmjax.training import (
    LlavaFromParts,
    LoraConfig,
    LoraFromFolder,
    NextToken,
    flatten,
    load_parts,
    load_tuned,
    mean_loss,
    with_parts,
)
from mmjax.training.cli import load_experiment, main
from mmjax.training.features import eyes_digest
from mmjax.training.lora import merge_lora
from mmjax.training.parts import BRIDGE
from mmjax.training.plan_shapes import batch_shapes
from mmjax.training.state import merge
from mmjax.vision import ImageProcessor
from tests.data.seeing import WORDS, row, write_images, write_rows
from tests.tiny import random_params
from tests.torch_writer import write_torch

FOLDER = Path(__file__).parents[2] / "experiments"
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
SMALL = [
    "--data.sequence_length=192",
    "--data.arrange=pack",
    "--train.steps=2",
    "--train.batch_size=8",
    "--data.num_threads=0",
    "--model.execution.remat=false",
    "--model.execution.dtype=float32",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of eyes and of a brain that knows no images, and ten rows."""
    work = tmp_path_factory.mktemp("parts")
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=6, **SIZES)
    text = CLIPTextConfig(
        vocab_size=32, max_position_embeddings=8, projection_dim=6, eos_token_id=31, **SIZES
    )
    eyes = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=6))
    mmjax.save(work / "eyes", eyes, random_params(eyes), Processor(ImageProcessor(size=8, crop_size=8)))
    tokenizer = train_bpe_tokenizer(WORDS, 300, bos_token="<s>", eos_token="</s>")
    brain = CausalLM(
        DecoderConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **SIZES,
        )
    )
    mmjax.save(work / "brain", brain, random_params(brain), Processor(tokenizer=tokenizer))
    names = write_images(work / "images", [(8, 8), (16, 9), (9, 21), (30, 10), (5, 5)])
    rows = [row(name, "<image>\nwhat is this?", "a red cat" * n) for n, name in enumerate(names, start=1)]
    rows += [row(name, "<image>\nand that?", "a blue dog", "what?", "the mat.") for name in names]
    write_rows(work / "rows.json", rows)
    return work


def run(recipe: str, work: Path, parts: Path, *flags: str) -> Path:
    """Runs a recipe and gives the folder of what it leaves."""
    data = [f"--data.path={parts / 'rows.json'}", f"--data.images={parts / 'images'}"]
    assert main([str(FOLDER / f"{recipe}.py"), "--workdir", str(work), *data, *SMALL, *flags]) == 0
    return work / "models" / recipe.replace("_", "-")


@pytest.fixture(scope="module")
def aligned(parts: Path) -> Path:
    flags = [f"--model.eyes={parts / 'eyes'}", f"--model.brain={parts / 'brain'}", "--model.dtype=float32"]
    return run("llava_1_5_alignment", parts, parts, *flags)


def test_alignment_moves_the_bridge_and_leaves_it_by_itself(parts, aligned):
    model, params, processor = mmjax.load(aligned)
    flat = flatten(params)
    for folder, theirs, ours in (
        ("eyes", "vision_model/", "vision_tower/"),
        ("brain", "", "language_model/"),
    ):
        for path, leaf in flatten(mmjax.load(parts / folder)[1]).items():
            if path.startswith(theirs):
                mine = np.asarray(flat[ours + path.removeprefix(theirs)])
                np.testing.assert_array_equal(mine[tuple(map(slice, leaf.shape))], leaf)
    assert model.config.text_config.vocab_size == 320 and model.config.image_token_id == 300
    table = np.asarray(flat["language_model/model/embed_tokens/embedding"])
    np.testing.assert_allclose(table[300:], np.tile(table[:300].mean(0), (20, 1)), rtol=1e-5)
    batch = processor(
        images=[np.zeros((9, 30, 3), np.uint8)],
        messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
    )
    text = processor.tokenizer.decode([i for i in batch["input_ids"][0] if i != 300])
    assert text.endswith("user's questions. USER: \nwhat? ASSISTANT:")
    assert model.apply({"params": params}, **batch).logits.shape[-1] == 320
    bridge = load_parts(aligned, model)
    assert sorted(bridge) == [
        f"multi_modal_projector/linear_{n}/{kind}" for n in (1, 2) for kind in ("bias", "kernel")
    ]
    for path, leaf in bridge.items():
        np.testing.assert_array_equal(leaf, flat[path])
    assert (aligned / "parts.safetensors").stat().st_size < (aligned / "model.safetensors").stat().st_size / 5


def test_a_bridge_goes_onto_the_same_parts_again(parts, aligned, tmp_path):
    flags = [f"--model.eyes={parts / 'eyes'}", f"--model.brain={parts / 'brain'}", "--model.dtype=float32"]
    flags += [f"--model.bridge={aligned}", "--stages.0.rules.0.schedule.peak=0"]
    again = run("llava_1_5_alignment", tmp_path, parts, *flags)
    for one, other in zip(*(flatten(mmjax.load(f)[1]).values() for f in (aligned, again)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_bridge_of_the_original_repository_begins_a_run(parts, aligned, tmp_path):
    """Its mm_projector.bin by itself, and the brain's generation_config.json for the model's folder."""
    brain, answers = tmp_path / "brain", '{"eos_token_id": [1, 7]}'
    shutil.copytree(parts / "brain", brain)
    (brain / "generation_config.json").write_text(answers)
    stored = load_file(aligned / "parts.safetensors")
    names = {"multi_modal_projector.linear_1": "model.mm_projector.0"}
    names["multi_modal_projector.linear_2"] = "model.mm_projector.2"
    write_torch(
        tmp_path / "mm_projector.bin",
        {names[name.rpartition(".")[0]] + "." + name.rpartition(".")[2]: x for name, x in stored.items()},
    )
    source = LlavaFromParts(eyes=str(parts / "eyes"), brain=str(brain), bridge=str(tmp_path))
    opened = source.open(None, jax.random.key(0), make_mesh({"data": 1}, jax.devices()[:1]))
    params = opened.params()
    for path, leaf in load_parts(aligned, opened.model).items():
        np.testing.assert_array_equal(params[path], leaf, err_msg=path)
    mmjax.save(tmp_path / "whole", opened.model, merge(params), opened.processor)
    assert (tmp_path / "whole" / "generation_config.json").read_text() == answers
    tuned = run("llava_1_5_instruction", tmp_path, parts, f"--model.path={tmp_path / 'whole'}")
    assert (tuned / "generation_config.json").read_text() == answers


def test_full_tuning_moves_bridge_and_brain_and_not_the_eyes(parts, aligned, tmp_path):
    tuned = run("llava_1_5_instruction", tmp_path, parts, f"--model.path={aligned}", "--train.accumulate=1")
    before, after = (flatten(mmjax.load(folder)[1]) for folder in (aligned, tuned))
    for path, leaf in after.items():
        same = np.array_equal(leaf, before[path])
        assert same == path.startswith("vision_tower"), path


def test_an_adapter_of_the_original_repository_goes_onto_the_base(parts, aligned, tmp_path):
    """There it is in files of torch.save, what was trained whole in one of its own."""
    flags = [f"--model.path={aligned}", "--lora=true", "--adapter.rank=2", "--model.dtype=float32"]
    tuned = run("llava_1_5_instruction", tmp_path, parts, *flags)
    model, _, _ = mmjax.load(aligned)
    expected = load_tuned(tuned, model)
    file = tuned / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    (adapter, beside), layers = ({}, {}), {"linear_1": "mm_projector.0", "linear_2": "mm_projector.2"}
    for name, value in tensors.items():
        if ".lora_" in name:
            adapter[name.replace("language_model.model.", "")] = value
        else:
            layer = next(layer for layer in layers if layer in name)
            beside[f"base_model.model.model.{layers[layer]}.{name.rpartition('.')[2]}"] = value
    write_torch(tuned / "adapter_model.bin", adapter)
    write_torch(tuned / "non_lora_trainables.bin", beside)
    hub = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps({**hub, "modules_to_save": None}))
    found = load_tuned(tuned, model)
    assert len(found[2]) == 4
    jax.tree.map(np.testing.assert_array_equal, (found[0], found[2]), (expected[0], expected[2]))


def test_lora_leaves_a_small_folder_that_goes_onto_the_base(parts, aligned, tmp_path):
    flags = [f"--model.path={aligned}", "--lora=true", "--adapter.rank=2", "--model.dtype=float32"]
    flags += ["--adapter.dropout=0", f"--data.test_path={parts / 'rows.json'}"]
    tuned = run("llava_1_5_instruction", tmp_path, parts, *flags)
    model, params, processor = mmjax.load(aligned)
    adapter, config, whole = load_tuned(tuned, model)
    assert config.rank == 2 and all(path.startswith("language_model") for path in flatten(adapter))
    assert len(flatten(adapter)) == 2 * 2 * 7 and len(whole) == 4
    assert (tuned / "adapter_model.safetensors").stat().st_size < (
        aligned / "model.safetensors"
    ).stat().st_size
    merged = merge_lora(with_parts(params, whole), {"x": adapter}, {"x": config})
    changed = {
        path for path, leaf in flatten(merged).items() if not np.array_equal(leaf, flatten(params)[path])
    }
    assert {path.split("/")[0] for path in changed} == {"language_model", "multi_modal_projector"}
    # The loss that the run ended with is that of the base with what it left.
    experiment = load_experiment(str(FOLDER / "llava_1_5_instruction.py"))
    data = dataclasses.replace(
        experiment.data,
        path=str(parts / "rows.json"),
        images=str(parts / "images"),
        sequence_length=192,
        arrange="pack",
    )
    batches = data.build(processor=processor, batch_size=8, seed=0)
    result = json.loads((tmp_path / "output/llava-1-5-instruction/result.json").read_text())
    loss = mean_loss(model, merged, [batches.batch(0), batches.batch(1)])
    np.testing.assert_allclose(loss, result["metrics"]["test_loss"], rtol=1e-5)


@pytest.mark.parametrize("name", ["llava_1_5_alignment", "llava_1_5_instruction"])
def test_recipes_are_hashable_data_with_the_published_settings(name):
    experiment = load_experiment(str(FOLDER / f"{name}.py"))
    assert hash(experiment) == hash(dataclasses.replace(experiment))
    assert experiment.train.steps * experiment.train.batch_size >= (558_128 if "align" in name else 665_298)


def test_parts_that_do_not_fit_are_named(parts, aligned, tmp_path):
    model, *_ = mmjax.load(aligned)
    with pytest.raises(CheckpointError, match="no such file"):
        load_parts(tmp_path / "none.safetensors", model)
    with pytest.raises(CheckpointError, match="has no place in this model"):
        load_parts(parts / "eyes" / "model.safetensors", mmjax.load(parts / "brain")[0])

    for change, words in (
        ({"eyes": str(parts / "brain")}, "has no vision model"),
        ({"brain": str(parts / "eyes")}, "has no tokenizer"),
    ):
        source = LlavaFromParts(**{"eyes": str(parts / "eyes"), "brain": str(parts / "brain"), **change})
        with pytest.raises(ConfigError, match=words):
            source.open(None, jax.random.key(0), make_mesh({"data": 1}, jax.devices()[:1])).params()


def test_eyes_without_a_cls_token_show_all_their_patches(parts, tmp_path):
    vision = SiglipVisionConfig(image_size=8, patch_size=4, **SIZES)
    eyes = SiglipVisionModel(vision)
    mmjax.save(tmp_path, eyes, random_params(eyes), Processor(ImageProcessor(size=8, crop_size=8)))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    for folder, strategy in ((tmp_path, "full"), (parts / "eyes", "default")):
        model = LlavaFromParts(eyes=str(folder), brain=str(parts / "brain")).open_shapes(mesh).model
        assert (model.config.tile_rows, model.config.vision_feature_select_strategy) == (4, strategy)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_parts_become_a_model_that_cuts_images_into_tiles(kind, parts, tmp_path):
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    source = LlavaFromParts(eyes=str(parts / "eyes"), brain=str(parts / "brain"), model_type=kind)
    opened = source.open(None, jax.random.key(0), mesh)
    params = merge(opened.params())
    assert ("image_newline" in params) == (kind != "llava")
    assert source.open_shapes(mesh).shapes == opened.shapes
    largest = {"llava": (), "llava_next": (24, 8), "llava_onevision": (48, 48)}[kind]
    assert max(opened.model.config.image_grid_pinpoints, default=()) == largest
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 29, 3), np.uint8))
    batch = opened.processor(images=image, text="<image>what?")
    assert (batch["pixel_values"].ndim == 5) == (kind != "llava")
    expected = opened.model.apply({"params": params}, **batch).logits
    mmjax.save(tmp_path, opened.model, params, opened.processor)
    model, again, processor = mmjax.load(tmp_path)
    assert model.config == opened.model.config
    same = processor(images=image, text="<image>what?")
    np.testing.assert_array_equal(same["pixel_values"], batch["pixel_values"])
    # Features that were kept before it was saved are its own.
    assert eyes_digest(model, again, processor.image_processor) == eyes_digest(
        opened.model, params, opened.processor.image_processor
    )
    np.testing.assert_array_equal(model.apply({"params": again}, **same).logits, expected)
    with pytest.raises(ConfigError, match="LlavaFromParts.grids: a llava model cuts no images"):
        dataclasses.replace(source, model_type="llava", grids=((1, 2),)).open_shapes(mesh)


def test_plans_see_the_shapes_that_a_run_has(parts, aligned):
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    source = LlavaFromParts(eyes=str(parts / "eyes"), brain=str(parts / "brain"))
    layered = dataclasses.replace(source, feature_layer=(0, -2))
    lora = LoraConfig(targets="language_model/.*_proj/kernel")
    adapters = LoraFromFolder(path=str(aligned), dtype="bfloat16", lora=lora, whole=BRIDGE)
    for each in (source, layered, adapters):
        opened, planned = each.open(None, jax.random.key(0), mesh), each.open_shapes(mesh)
        assert planned.shapes == opened.shapes and planned.shardings.keys() == opened.shardings.keys()
    kernel = "multi_modal_projector/linear_1/kernel"
    widths = [each.open_shapes(mesh).shapes[kernel].shape[0] for each in (source, layered)]
    assert widths[1] == 2 * widths[0] == layered.open(None, jax.random.key(0), mesh).params()[kernel].shape[0]
    made = adapters.open(None, jax.random.key(0), mesh).params()
    assert {str(x.dtype) for path, x in made.items() if "multi_modal" in path} == {"float32"}
    data = InstructionData(
        path=str(parts / "rows.json"), images=str(parts / "images"), sequence_length=192, tiles_per_row=1
    )
    opened = source.open(None, jax.random.key(0), mesh)
    batch = data.build(processor=opened.processor, batch_size=2, seed=0).batch(0)
    planned = batch_shapes(opened.model, NextToken(), data, opened.shapes, 2)
    assert {n: (x.shape, x.dtype) for n, x in planned.items()} == {
        n: (x.shape, x.dtype) for n, x in batch.items() if n != "ids"
    }
    text = batch_shapes(opened.model, NextToken(), ChatData(path="", sequence_length=7), opened.shapes, 2)
    assert text["input_ids"].shape == text["labels"].shape == (2, 7)
