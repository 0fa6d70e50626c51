"""Hub folders in and out: what was saved comes back, in every dtype, cut into files, and onto a mesh."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmjax
import mmjax.checkpoints.weights
from mmjax.checkpoints.files import TensorReader
from mmjax.models.hub import open_folder
from mmjax.nn import Execution
from tests.models.folders import (
    CONFIG,
    VIT,
    WEIGHTS,
    assert_same_params,
    edit_config,
    edit_tensors,
    files,
)
from tests.models.test_decoders import FOLDER
from tests.tiny import MODELS, random_params

pytestmark = pytest.mark.usefixtures("no_network")


def as_read(model):
    """A folder has no labels without a classifier, and no pooler with a head."""
    if type(model).__name__ == "ViTModel":
        return dataclasses.replace(model.config, num_labels=2, labels=None)
    if type(model).__name__ == "ViTForImageClassification":
        return dataclasses.replace(model.config, pooling="none")
    return model.config


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    model, params = MODELS[name], random_params(MODELS[name])
    mmjax.save(tmp_path / "first", model, params)
    again, params_again, processor = mmjax.load(tmp_path / "first")
    assert type(again) is type(model)
    assert again.config == as_read(model)
    assert processor is None
    assert_same_params(params_again, params)
    mmjax.save(tmp_path / "second", again, params_again)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    config = json.loads((tmp_path / "second" / CONFIG).read_text())
    assert config["architectures"] == [name] and config["dtype"] == "float32"
    assert files(tmp_path / "first") == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "gemma2", "opt", "qwen3_moe"])
def test_shapes_are_known_before_anything_is_read(name, turned, tmp_path, monkeypatch):
    model = MODELS[name] if name in MODELS else mmjax.load(FOLDER / name)[0]
    mmjax.save(tmp_path, model, random_params(model))

    def narrow_one(tensors):
        first = next(iter(tensors))
        tensors[first] = tensors[first].astype("float16")

    edit_tensors(tmp_path, narrow_one)
    reads = []
    plain = TensorReader.read
    monkeypatch.setattr(TensorReader, "read", lambda self, name: reads.append(name) or plain(self, name))
    for dtype in (None, "bfloat16"):
        with open_folder(tmp_path, dtype, transpose_kernels=turned) as folder:
            shapes = folder.shapes()
            assert not reads
            params = folder.read()
        assert reads
        reads.clear()
        expected, found = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (shapes, params))
        assert expected == found


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_folders_or_a_choice(stored, tmp_path):
    model = MODELS["CLIPModel"]
    params = jax.tree.map(lambda x: x.astype(stored), random_params(model))
    mmjax.save(tmp_path, model, params)
    assert json.loads((tmp_path / CONFIG).read_text())["dtype"] == stored
    assert_same_params(mmjax.load(tmp_path)[1], params)
    for wanted in ("float32", "bfloat16", jnp.float16):
        cast = jax.tree.map(lambda x, dtype=wanted: x.astype(dtype), params)
        assert_same_params(mmjax.load(tmp_path, dtype=wanted)[1], cast)


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    params = random_params(VIT)
    params["classifier"] = jax.tree.map(lambda x: x.astype("float16"), params["classifier"])
    mmjax.save(tmp_path, VIT, params)
    assert json.loads((tmp_path / CONFIG).read_text())["dtype"] == "float32"
    assert_same_params(mmjax.load(tmp_path)[1], params)


def test_execution_is_the_callers(tmp_path):
    execution = Execution(dtype="bfloat16", scan_layers=True)
    mmjax.save(tmp_path, VIT, random_params(VIT))
    model, params, _ = mmjax.load(tmp_path, execution=execution)
    assert model.execution == execution
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


# What a config carries along


def test_attributes_that_change_nothing_survive(tmp_path):
    model = MODELS["CLIPModel"]
    mmjax.save(tmp_path, model, random_params(model))
    edit_config(tmp_path, _name_or_path="org/name", transformers_version="4.20.1", torch_dtype="float16")
    edit_config(tmp_path, "vision_config", dropout=0.25, problem_type=None, num_beams=4)
    edit_config(tmp_path, "text_config", bos_token_id=7, pad_token_id=1, prefix="x")
    before = json.loads((tmp_path / CONFIG).read_text())
    again, params, _ = mmjax.load(tmp_path)
    mmjax.save(tmp_path / "again", again, params)
    after = json.loads((tmp_path / "again" / CONFIG).read_text())
    del before["torch_dtype"]  # Today's name is dtype, and both would be one too many.
    assert after == before
    assert mmjax.load(tmp_path / "again")[0].config == again.config


def test_a_changed_field_is_written(tmp_path):
    model = MODELS["CLIPModel"]
    mmjax.save(tmp_path, model, random_params(model))
    edit_config(tmp_path, "text_config", bos_token_id=7)
    # A section of the years before, which decides about its fields.
    text = json.loads((tmp_path / CONFIG).read_text())["text_config"]
    edit_config(tmp_path, text_config_dict=text)
    again, params, _ = mmjax.load(tmp_path)
    config = dataclasses.replace(
        again.config, text_config=dataclasses.replace(again.config.text_config, layer_norm_eps=0.5)
    )
    mmjax.save(tmp_path, type(model)(config), params)
    assert mmjax.load(tmp_path)[0].config == config
    written = json.loads((tmp_path / CONFIG).read_text())
    assert "text_config_dict" not in written
    assert written["text_config"] == {**text, "layer_norm_eps": 0.5}


def test_labels_survive(tmp_path):
    config = dataclasses.replace(VIT.config, labels=("cat", "dog", "eel"))
    mmjax.save(tmp_path, type(VIT)(config), random_params(VIT))
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["id2label"] == {"0": "cat", "1": "dog", "2": "eel"}
    assert written["label2id"] == {"cat": 0, "dog": 1, "eel": 2}
    assert mmjax.load(tmp_path)[0].config.labels == ("cat", "dog", "eel")


# Names that older and newer tools write


def test_counted_positions_are_ignored(tmp_path):
    model = MODELS["CLIPModel"]
    params = random_params(model)
    mmjax.save(tmp_path, model, params)
    edit_tensors(
        tmp_path,
        lambda t: t.update(
            {
                "text_model.embeddings.position_ids": np.arange(8)[None],
                "vision_model.embeddings.position_ids": np.arange(7)[None],
            }
        ),
    )
    assert_same_params(mmjax.load(tmp_path)[1], params)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("CLIPVisionModel", "vision_model."),
        ("CLIPTextModel", "text_model."),
        ("SiglipVisionModel", "vision_model."),
        ("SiglipTextModel", "text_model."),
        ("ViTModel", "vit."),
    ],
)
def test_towers_with_a_prefix(name, prefix, tmp_path):
    model, params = MODELS[name], random_params(MODELS[name])
    mmjax.save(tmp_path, model, params)
    tensors = load_file(tmp_path / WEIGHTS)
    assert not any(key.startswith(prefix) for key in tensors)
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / WEIGHTS)
    again, params_again, _ = mmjax.load(tmp_path)
    assert again.config == as_read(model)
    assert_same_params(params_again, params)


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_vit_under_the_names_of_transformers_5_in_memory(prefix, tmp_path):
    model, params = MODELS["ViTModel"], random_params(MODELS["ViTModel"])
    mmjax.save(tmp_path, model, params)
    new = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    renamed = {}
    for key, value in load_file(tmp_path / WEIGHTS).items():
        for old, name in new.items():
            key = key.replace(old, name)
        renamed[prefix + key] = value
    assert (
        prefix + "layers.1.attention.o_proj.bias" in renamed and prefix + "layers.0.mlp.fc2.weight" in renamed
    )
    save_file(renamed, tmp_path / WEIGHTS)
    assert_same_params(mmjax.load(tmp_path)[1], params)


def test_a_vit_without_pooler_and_a_head_with_one(tmp_path):
    model, params = MODELS["ViTModel"], random_params(MODELS["ViTModel"])
    mmjax.save(tmp_path, model, params)
    pooler = [key for key in load_file(tmp_path / WEIGHTS) if key.startswith("pooler.")]
    edit_tensors(tmp_path, lambda t: [t.pop(key) for key in pooler])
    bare, bare_params, _ = mmjax.load(tmp_path)
    assert bare.config.pooling == "none"
    del params["vision_model"]["pooler"]
    assert_same_params(bare_params, params)

    head, params = MODELS["ViTForImageClassification"], random_params(MODELS["ViTForImageClassification"])
    mmjax.save(tmp_path / "head", head, params)
    edit_tensors(
        tmp_path / "head", lambda t: t.update({"vit.pooler.dense.weight": np.zeros((16, 16), np.float32)})
    )
    assert_same_params(mmjax.load(tmp_path / "head")[1], params)


def test_a_tower_out_of_a_joint_config(tmp_path):
    """A config.json of the whole CLIP whose architecture is one tower."""
    joint, tower = MODELS["CLIPModel"], MODELS["CLIPVisionModel"]
    mmjax.save(tmp_path / "joint", joint, random_params(joint))
    params = random_params(tower)
    mmjax.save(tmp_path, tower, params)
    (tmp_path / CONFIG).write_bytes((tmp_path / "joint" / CONFIG).read_bytes())
    edit_config(tmp_path, architectures=["CLIPVisionModel"])
    model, params_again, _ = mmjax.load(tmp_path)
    assert type(model) is type(tower) and model.config == tower.config
    assert_same_params(params_again, params)
    mmjax.save(tmp_path / "again", model, params)
    assert mmjax.load(tmp_path / "again")[0].config == tower.config
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["model_type"] == "clip_vision_model"


@pytest.mark.parametrize("name", ["ViTModel", "CLIPModel", "SiglipTextModel"])
def test_without_architectures_the_model_type_decides(name, tmp_path):
    mmjax.save(tmp_path, MODELS[name], random_params(MODELS[name]))
    edit_config(tmp_path, architectures=None)
    assert type(mmjax.load(tmp_path)[0]) is type(MODELS[name])
