"""Hub folders in and out: what was saved comes back, in every dtype, cut into files, and onto a mesh."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import mmjax
import mmjax.checkpoints.weights
from mmjax.checkpoints.files import TensorReader
from mmjax.errors import CheckpointError, ConfigError
from mmjax.models import CLIPModel
from mmjax.nn import Execution, parameter_specs
from mmjax.parallel import make_mesh, param_shardings
from tests.models.folders import CONFIG, INDEX, VIT, WEIGHTS, edit_config, edit_tensors
from tests.tiny import CLIP, MODELS, random_batch, random_params

pytestmark = pytest.mark.usefixtures("no_network")


def assert_same_params(actual, expected):
    """The same paths with the same bits of the same dtype."""
    actual, expected = flatten_dict(actual, sep="/"), flatten_dict(expected, sep="/")
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype, path
        assert np.asarray(actual[path]).tobytes() == np.asarray(value).tobytes(), path
        assert actual[path].shape == value.shape, path


def as_read(model):
    """A folder has no labels without a classifier, and no pooler with a head."""
    if type(model).__name__ == "ViTModel":
        return dataclasses.replace(model.config, num_labels=2, labels=None)
    if type(model).__name__ == "ViTForImageClassification":
        return dataclasses.replace(model.config, pooling="none")
    return model.config


def files(folder):
    return {path.name for path in folder.iterdir()}


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


# Several files


def test_shards_and_saving_again_over_them(tmp_path):
    model = MODELS["SiglipModel"]
    tensors = {}
    for seed, shard_bytes in enumerate((2_000, 8_000, 2_000, 10**9, 500, 8_000)):
        params = random_params(model, seed)
        mmjax.save(tmp_path, model, params, shard_bytes=shard_bytes)
        shards = sorted(name for name in files(tmp_path) if name.endswith(".safetensors"))
        tensors = [load_file(tmp_path / name) for name in shards]
        if shard_bytes == 10**9:
            assert files(tmp_path) == {CONFIG, WEIGHTS}
        else:
            count = len(shards)
            assert count > 2
            assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            assert files(tmp_path) == {CONFIG, INDEX, *shards}
            for part in tensors:
                assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= shard_bytes
            index = json.loads((tmp_path / INDEX).read_text())
            expected = {name: file for file, part in zip(shards, tensors, strict=True) for name in part}
            assert index["weight_map"] == expected
            assert index["metadata"] == {
                "total_size": sum(x.nbytes for part in tensors for x in part.values())
            }
        assert_same_params(mmjax.load(tmp_path)[1], params)


def test_files_that_are_not_ours_stay(tmp_path):
    others = {"model_backup.safetensors", "model-ema.safetensors", "README.md", "pytorch_model.bin"}
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    mmjax.save(tmp_path, VIT, random_params(VIT), shard_bytes=400)
    mmjax.save(tmp_path, VIT, random_params(VIT))
    assert files(tmp_path) == {CONFIG, WEIGHTS, *others}
    assert all((tmp_path / name).read_bytes() == b"mine" for name in others)


def broken(error, after):
    """A save_file that fails once `after` files are written, in the middle of one."""
    written = []

    def fail(tensors, path, **options):
        if len(written) == after:
            path.write_bytes(b"half of it")
            raise error
        written.append(path)
        save_file(tensors, path, **options)

    return fail


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: full")]
)
@pytest.mark.parametrize("old_shards", [400, 10**9])
def test_a_save_that_fails_halfway_leaves_the_old_folder(error, old_shards, tmp_path, monkeypatch):
    old = random_params(VIT)
    mmjax.save(tmp_path, VIT, old, shard_bytes=old_shards)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    monkeypatch.setattr(mmjax.checkpoints.weights, "save_file", broken(error, after=1))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot be written"):
        mmjax.save(tmp_path, VIT, random_params(VIT, 1), shard_bytes=400)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert_same_params(mmjax.load(tmp_path)[1], old)


def test_a_crash_between_two_moves_is_never_a_mixture(tmp_path, monkeypatch):
    """Old and new shards under one index would load, as a model that nobody trained."""
    mmjax.save(tmp_path, VIT, random_params(VIT), shard_bytes=400)
    moves = []
    replace = mmjax.checkpoints.weights.os.replace

    class Killed(BaseException):
        pass

    def stop(source, target):
        moves.append(target)
        if len(moves) == 3:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(mmjax.checkpoints.weights.os, "replace", stop)
    with pytest.raises(Killed):
        mmjax.save(tmp_path, VIT, random_params(VIT, 1), shard_bytes=400)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"safetensors files but no {INDEX}"):
        mmjax.load(tmp_path)
    new = random_params(VIT, 2)
    mmjax.save(tmp_path, VIT, new)
    assert files(tmp_path) == {CONFIG, WEIGHTS}
    assert_same_params(mmjax.load(tmp_path)[1], new)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=f"{place}: cannot be written"):
            mmjax.save(place, VIT, random_params(VIT))


def test_wrong_params_are_listed_and_nothing_is_written(tmp_path):
    mmjax.save(tmp_path, VIT, random_params(VIT))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    params = random_params(VIT)
    del params["vision_model"]["post_layernorm"]["bias"]
    params["classifier"] = {
        "kernel": jnp.zeros((3, 8)),
        "bias": jnp.zeros(3, jnp.int32),
        "scale": jnp.zeros(3),
    }
    params["vision_model"]["embeddings"]["class_embedding"] = [0.0] * 8
    with pytest.raises(CheckpointError) as info:
        mmjax.save(tmp_path, VIT, params)
    assert str(info.value).splitlines() == [
        "parameters do not fit the model:",
        "  extra: classifier/scale",
        "  misshapen: classifier/kernel is [3, 8], expected [8, 3]",
        "  missing: vision_model/post_layernorm/bias",
        "  no array of floats: classifier/bias is int32",
        "  no array of floats: vision_model/embeddings/class_embedding is list",
    ]
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_model_of_no_family(tmp_path):
    class Mine(CLIPModel):
        pass

    with pytest.raises(ConfigError, match="Mine is not a model class of a family that mmjax knows"):
        mmjax.save(tmp_path / "new", Mine(CLIP), random_params(MODELS["CLIPModel"]))
    assert not (tmp_path / "new").exists()


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


# Onto devices


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("clip"), MODELS["CLIPModel"]
    mmjax.save(folder, model, random_params(model))
    return folder


def assert_on(params, shardings):
    actual, expected = flatten_dict(params, sep="/"), flatten_dict(shardings, sep="/")
    assert actual.keys() == expected.keys()
    for path, value in actual.items():
        assert value.sharding == expected[path], path
        assert len(value.addressable_shards) == 8
        for part in value.addressable_shards:
            assert part.data.shape == expected[path].shard_shape(value.shape), path


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_load_onto_a_mesh(clip_folder, dtype):
    assert len(jax.devices()) == 8
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model, params, _ = mmjax.load(clip_folder, dtype=dtype, mesh=mesh)
    plain = mmjax.load(clip_folder, dtype=dtype)[1]
    assert_same_params(params, plain)
    assert_on(params, param_shardings(mesh, parameter_specs(model)))
    kernel = params["vision_model"]["encoder"]["layers_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (8, 12)
    tokens = params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    assert tokens.sharding.spec == PartitionSpec("tensor", "fsdp")
    batch = random_batch(model, 4)
    out = jax.jit(model.apply)({"params": params}, **batch)
    expected = jax.jit(model.apply)({"params": plain}, **batch)
    tolerance = 1e-5 if dtype is None else 2e-2
    np.testing.assert_allclose(
        out.logits_per_image, expected.logits_per_image, rtol=tolerance, atol=tolerance
    )


def test_load_onto_a_mesh_with_explicit_axes(clip_folder):
    """`jax.make_mesh` makes them unless told otherwise; the model leaves layouts to the compiler."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    model, params, _ = mmjax.load(clip_folder, mesh=mesh)
    plain = mmjax.load(clip_folder)[1]
    assert_same_params(params, plain)
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * 2)
    assert_on(params, param_shardings(auto, parameter_specs(model)))
    batch = random_batch(model, 4)
    out = jax.jit(model.apply)({"params": params}, **batch)
    expected = jax.jit(model.apply)({"params": plain}, **batch)
    np.testing.assert_allclose(out.logits_per_image, expected.logits_per_image, rtol=1e-5, atol=1e-5)


def test_load_onto_a_mesh_with_other_axes(clip_folder):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("x", "tensor"))
    model, params, _ = mmjax.load(clip_folder, mesh=mesh)
    assert_same_params(params, mmjax.load(clip_folder)[1])
    assert_on(params, param_shardings(mesh, parameter_specs(model)))
    kernel = params["vision_model"]["encoder"]["layers_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding == NamedSharding(mesh, PartitionSpec(None, "tensor"))


def test_sharded_params_are_saved_whole(clip_folder, tmp_path):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model, params, _ = mmjax.load(clip_folder, mesh=mesh)
    mmjax.save(tmp_path, model, params)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / file).read_bytes() == (clip_folder / file).read_bytes()


# Memory


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_one_tensor_at_a_time(clip_folder, mesh, monkeypatch):
    """Each tensor is on its devices before the next is read, and none is read twice."""
    events = []
    read, place = TensorReader.read, mmjax.checkpoints.weights._place

    def note_read(self, name):
        events.append(("read", name))
        return read(self, name)

    def note_place(piece, spec, dtype, mesh):
        events.append(("place", piece.size))
        return place(piece, spec, dtype, mesh)

    monkeypatch.setattr(TensorReader, "read", note_read)
    monkeypatch.setattr(mmjax.checkpoints.weights, "_place", note_place)
    mmjax.load(clip_folder, mesh=None if mesh is None else make_mesh(mesh))
    tensors = load_file(clip_folder / WEIGHTS)
    names = [name for kind, name in events if kind == "read"]
    assert sorted(names) == sorted(tensors)
    assert [kind for kind, _ in events] == ["read", "place"] * len(names)
    assert [size for kind, size in events if kind == "place"] == [tensors[name].size for name in names]


def test_one_shard_at_a_time_when_writing(tmp_path, monkeypatch):
    """Nothing past the shard being written has been taken off its device."""
    taken, seen = [], []
    device_get = jax.device_get

    def note(value):
        taken.append(value.nbytes)
        return device_get(value)

    def note_file(tensors, path, **options):
        seen.append((sum(taken), sum(x.nbytes for x in tensors.values())))
        save_file(tensors, path, **options)

    monkeypatch.setattr(mmjax.checkpoints.weights.jax, "device_get", note)
    monkeypatch.setattr(mmjax.checkpoints.weights, "save_file", note_file)
    mmjax.save(tmp_path, VIT, random_params(VIT), shard_bytes=400)
    largest = max(taken)
    written = 0
    for total, shard in seen:
        written += shard
        assert total <= written + largest
    assert len(seen) > 3


def test_loaded_params_do_not_depend_on_the_file(tmp_path):
    params = random_params(VIT)
    mmjax.save(tmp_path, VIT, params)
    loaded = [mmjax.load(tmp_path, mesh=mesh)[1] for mesh in (None, make_mesh({"fsdp": 8}))]
    size = (tmp_path / WEIGHTS).stat().st_size
    with open(tmp_path / WEIGHTS, "r+b") as file:
        file.write(b"\xff" * size)
    for again in loaded:
        assert_same_params(again, params)
