"""Weights in several files, onto several devices, one tensor at a time, and never half a save."""

from __future__ import annotations

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
from mmjax.nn import parameter_specs, transpose_kernels
from mmjax.nn.quantized import dequantize, quantize
from mmjax.parallel import make_mesh, param_shardings
from mmjax.training import save_parts
from tests.models.folders import (
    CONFIG,
    INDEX,
    VIT,
    WEIGHTS,
    assert_same_params,
    files,
)
from tests.tiny import CLIP, MODELS, random_batch, random_params

pytestmark = pytest.mark.usefixtures("no_network")


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


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    (tmp_path / "plain").write_text("")
    mmjax.save(tmp_path, VIT, random_params(VIT))
    mode = (tmp_path / "plain").stat().st_mode
    assert {(tmp_path / name).stat().st_mode for name in (CONFIG, WEIGHTS)} == {mode}


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


@pytest.mark.parametrize("store", [quantize, transpose_kernels])
def test_stored_kernels_are_refused_and_nothing_is_written(tmp_path, store):
    model = MODELS["CLIPModel"]
    params = store(random_params(model), r".*layers_0/mlp/fc1/kernel")
    kind = r"(Int8Kernel|TransposedKernel), which hub folders cannot hold; save .*dequantize\(params\)"
    with pytest.raises(CheckpointError, match=rf"layers_0/mlp/fc1/kernel is stored as {kind}"):
        mmjax.save(tmp_path / "new", model, params)
    assert not (tmp_path / "new").exists()
    mmjax.save(tmp_path / "new", model, dequantize(params))
    with pytest.raises(CheckpointError, match=f"stored as {kind}"):
        save_parts(tmp_path / "parts", model, params, ".*layers_0/mlp/fc1/kernel")
    assert not (tmp_path / "parts").exists()


def test_a_model_of_no_family(tmp_path):
    class Mine(CLIPModel):
        pass

    with pytest.raises(ConfigError, match="Mine is not a model class of a family that mmjax knows"):
        mmjax.save(tmp_path / "new", Mine(CLIP), random_params(MODELS["CLIPModel"]))
    assert not (tmp_path / "new").exists()


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
