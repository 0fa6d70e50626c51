"""Folders of LLaVA's original repository, and files that torch.save wrote."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.checkpoints.files import TensorReader
from mmjax.commands.info import inspect
from mmjax.errors import CheckpointError, ConfigError
from mmjax.models import CLIPConfig, CLIPModel, CLIPTextConfig, Processor
from mmjax.training import flatten, load_parts
from tests.generation.seeing import TOKENIZER, make, picture
from tests.language.spm_models import spm_model
from tests.tiny import random_params
from tests.torch_writer import write_torch


@pytest.fixture(params=["llava", "llava_next"])
def original(request, tmp_path):
    """An original folder made of a tiny model's tensors, and what it should open as."""
    model, params, processor = make(request.param)
    mmjax.save(tmp_path / "hf", model, params, processor)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    eyes, config = tmp_path / "eyes", model.config
    clip = CLIPModel(
        CLIPConfig(
            vision_config=config.vision_config,
            text_config=CLIPTextConfig(
                vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=4, eos_token_id=8,
            ),
        )
    )  # fmt: skip
    mmjax.save(eyes, clip, {**random_params(clip), "vision_model": params["vision_tower"]})
    from mmjax.vision.processing import ImageProcessor

    Processor(ImageProcessor(size=8, crop_size=8)).save(eyes)
    names = {
        "multi_modal_projector.linear_1": "model.mm_projector.0",
        "multi_modal_projector.linear_2": "model.mm_projector.2",
        "image_newline": "model.image_newline",
        "language_model.": "",
    }
    renamed = {}
    for name, value in tensors.items():
        for old, new in names.items():
            if name.startswith(old):
                renamed[name.replace(old, new, 1)] = value
    folder = tmp_path / "original"
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors")
    brain = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    hub = {
        **brain, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(eyes), "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 8,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "square",
        "mm_use_im_start_end": False, "tune_mm_mlp_adapter": False, "use_mm_proj": True,
    }  # fmt: skip
    if request.param == "llava_next":
        hub |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        hub["image_grid_pinpoints"] = [[w, h] for h, w in config.image_grid_pinpoints]
    (folder / "config.json").write_text(json.dumps(hub))
    TOKENIZER.save(folder)
    return folder, model, params, processor


def test_an_original_folder_opens_and_goes_to_the_other_layout(original, tmp_path):
    folder, model, params, processor = original
    found, found_params, found_processor = mmjax.load(folder)
    image = picture(9, 20)
    batch = processor(images=image, text="<image>a cat")
    again = found_processor(images=image, text="<image>a cat")
    for name, value in batch.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    expected = model.apply({"params": params}, **batch).logits
    np.testing.assert_array_equal(found.apply({"params": found_params}, **again).logits, expected)
    mmjax.save(tmp_path / "back", found, found_params, found_processor)
    back, back_params, opened = mmjax.load(tmp_path / "back")
    assert back.config.model_type == model.config.model_type and opened.image_tokens == processor.image_tokens
    np.testing.assert_array_equal(back.apply({"params": back_params}, **again).logits, expected)


def test_an_original_folder_as_it_was_published(original):
    """Its weights in files of torch.save, its tokenizer a sentencepiece model."""
    folder, model, params, _ = original
    tensors = load_file(folder / "model.safetensors")
    half = dict(list(tensors.items())[::2])
    files = {
        "pytorch_model-00001-of-00002.bin": half,
        "pytorch_model-00002-of-00002.bin": {n: x for n, x in tensors.items() if n not in half},
    }
    for file, part in files.items():
        write_torch(folder / file, part)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (folder / "tokenizer.model").write_bytes(spm_model(vocab_size=400))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    hub = json.loads((folder / "config.json").read_text())
    size = hub["vocab_size"]
    found, found_params, processor = mmjax.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found_params["vision_tower"], params["vision_tower"])
    table = found_params["language_model"]["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(
        table[:size], params["language_model"]["model"]["embed_tokens"]["embedding"]
    )
    batch = processor(images=picture(9, 20), text="<image>a cat")
    ids = batch["input_ids"][0].tolist()
    assert ids[0] == 1 and processor.image_token_id == max(ids) >= 259


def test_its_headers_say_what_it_holds(original, monkeypatch):
    folder, model, params, _ = original
    monkeypatch.setattr(TensorReader, "read", lambda *arguments: pytest.fail("a tensor was read"))
    found = inspect(str(folder))
    assert found["config"]["model_type"] == model.config.model_type
    assert {tensor["path"] for tensor in found["tensors"]} == flatten_dict(params, sep="/").keys()
    assert found["parameters"] == sum(leaf.size for leaf in flatten_dict(params).values())
    # Both of a folder's files are told, its own and that of its eyes, though they have one name.
    eyes = folder.parent / "eyes" / "model.safetensors"
    assert found["files"].keys() == {"model.safetensors", str(eyes)}
    assert {tensor["file"] for tensor in found["tensors"] if "vision" in tensor["path"]} == {str(eyes)}


def test_original_folders_that_are_refused(original):
    folder = original[0]
    hub = json.loads((folder / "config.json").read_text())

    def refused(words, **changes):
        (folder / "config.json").write_text(json.dumps({**hub, **changes}))
        with pytest.raises((ConfigError, CheckpointError), match=words):
            mmjax.load(folder)

    refused("mm_projector_type 'qformer' is none of", mm_projector_type="qformer")
    refused("nowhere/at/all", mm_vision_tower="./nowhere/at/all")
    refused("mm_use_im_start_end", mm_use_im_start_end=True)
    refused("unknown attribute surprise=1", surprise=1)
    refused("mm_vision_tower None is no name", mm_vision_tower=None)


def bridge_tensors(params, prefix, places):
    """A bridge's tensors, and the end of rows where there is one, under the original repository's names."""
    made = {}
    for name, place in places.items():
        layer = params["multi_modal_projector"][name]
        made[f"{prefix}mm_projector{place}.weight"] = np.ascontiguousarray(np.asarray(layer["kernel"]).T)
        made[f"{prefix}mm_projector{place}.bias"] = np.asarray(layer["bias"])
    if "image_newline" in params:
        made["model.image_newline"] = np.asarray(params["image_newline"])
    return made


def assert_bridge(found, params):
    wanted = {path: x for path, x in flatten(params).items() if not path.startswith(("vision_", "language_"))}
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("projector", ["linear", "mlp2x"])
def test_a_bridge_of_the_original_repository_goes_onto_a_model(projector, kind, prefix, tmp_path):
    model, _, _ = make(kind)
    model = type(model)(dataclasses.replace(model.config, projector=projector))
    params = random_params(model)
    places = {"linear_1": ""} if projector == "linear" else {"linear_1": ".0", "linear_2": ".2"}
    tensors = bridge_tensors(params, prefix, places)
    write_torch(tmp_path / "mm_projector.bin", tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    for path in (tmp_path / "mm_projector.bin", tmp_path, tmp_path / "other.safetensors"):
        assert_bridge(load_parts(path, model), params)
    (tmp_path / "mm_projector.bin").unlink()
    (tmp_path / "other.safetensors").rename(tmp_path / "mm_projector.safetensors")
    assert_bridge(load_parts(tmp_path, model), params)


def test_bridges_that_are_refused(tmp_path):
    model, params, _ = make("llava")
    with pytest.raises(CheckpointError, match="has none of parts.safetensors, mm_projector.bin"):
        load_parts(tmp_path, model)
    tensors = bridge_tensors(params, "model.", {"linear_1": ".0", "linear_2": ".2"})
    file = tmp_path / "mm_projector.bin"
    write_torch(file, tensors, extra=("os", "system"))
    with pytest.raises(CheckpointError, match=r"mm_projector.bin: .* names os.system"):
        load_parts(tmp_path, model)
    write_torch(file, {"model.mm_projector.0.weight": tensors["model.mm_projector.0.weight"][:-1]})
    with pytest.raises(CheckpointError, match=r"mm_projector.bin: model.mm_projector.0.weight is .*expected"):
        load_parts(tmp_path, model)
    write_torch(file, {"model.mm_projector.weight": tensors["model.mm_projector.0.weight"]})
    with pytest.raises(CheckpointError, match=r"model.mm_projector.weight has no place in this model"):
        load_parts(file, model)


def test_a_folder_of_a_bridge_says_what_it_is(original):
    """Before anything else is looked for; beside other weights it is only one of the files."""
    folder, model, params, _ = original
    words = r"mm_projector.* is a bridge only, .*mmjax.training.load_parts, or .*LlavaFromParts\(bridge"
    (folder / "model.safetensors").rename(folder / "mm_projector.safetensors")
    hub = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hub, "mm_vision_tower": "./nowhere/at/all"}))
    for opens in (mmjax.load, inspect):
        with pytest.raises(CheckpointError, match=words):
            opens(folder)
    (folder / "mm_projector.safetensors").unlink()
    tensors = bridge_tensors(params, "model.", {"linear_1": ".0", "linear_2": ".2"})
    write_torch(folder / "mm_projector.bin", tensors)
    with pytest.raises(CheckpointError, match=words):
        mmjax.load(folder)
    assert_bridge(load_parts(folder, model), params)
    (folder / "config.json").write_text(json.dumps(hub))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: not read as tensors"):
        mmjax.load(folder)


def test_what_ends_its_answers_goes_to_the_other_layout(original, tmp_path):
    folder = original[0]
    (folder / "generation_config.json").write_bytes(b'{"eos_token_id": [1, 7]}\r\n')
    model, params, processor = mmjax.load(folder)
    mmjax.save(tmp_path / "back", model, params, processor)
    assert (tmp_path / "back" / "generation_config.json").read_bytes() == b'{"eos_token_id": [1, 7]}\r\n'
