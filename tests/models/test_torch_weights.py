"""Folders whose weights are pytorch_model.bin, as older versions of transformers wrote them."""

from __future__ import annotations

import json

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.checkpoints.files import TORCH_INDEX, TORCH_WEIGHTS, open_tensors
from mmjax.errors import CheckpointError
from mmjax.parallel import make_mesh
from mmjax.training import FromFolder
from mmjax.training.plan_shapes import folder_shapes
from tests.models.folders import WEIGHTS, edit_tensors, refused
from tests.torch_writer import write_torch


def to_torch(folder, files=1):
    """The folder's weights as older versions of transformers wrote them."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if files == 1:
        write_torch(folder / TORCH_WEIGHTS, tensors)
        return
    names, weight_map = sorted(tensors), {}
    for number in range(files):
        file = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin"
        part = names[number::files]
        write_torch(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / TORCH_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("files", [1, 3])
def test_a_folder_opens_as_it_did(folder, files, tmp_path):
    _, params, _ = mmjax.load(folder)
    to_torch(folder, files)
    (folder / "training_args.bin").write_bytes(b"not looked at")
    model, again, processor = mmjax.load(folder)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    mmjax.save(tmp_path / "new", model, again, processor)
    jax.tree.map(np.testing.assert_array_equal, mmjax.load(tmp_path / "new")[1], params)


def test_safetensors_come_first(folder):
    (folder / TORCH_WEIGHTS).write_bytes(b"not looked at")
    (folder / TORCH_INDEX).write_text("not looked at")
    with open_tensors(folder) as reader:
        assert {reader.file_of(name).name for name in reader.shapes} == {WEIGHTS}


def test_an_index_of_other_files(folder):
    to_torch(folder, 2)
    index = json.loads((folder / TORCH_INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    for other, reason in (
        (f"../{file}", "is not a bin file of this folder; refused"),
        (WEIGHTS, "is not a bin file of this folder; refused"),
        ("none.bin", f"named in {TORCH_INDEX} but missing"),
    ):
        changed = {"weight_map": {**index["weight_map"], name: other}}
        (folder / TORCH_INDEX).write_text(json.dumps(changed))
        refused(folder, reason, error=CheckpointError)
    (folder / TORCH_INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "ghost": file}}))
    refused(folder, f"tensor ghost is not in {file}", error=CheckpointError, file=TORCH_INDEX)


def test_they_are_fetched_where_there_is_nothing_else(folder, monkeypatch, tmp_path):
    calls = []

    def download(repo, allow_patterns):
        names = [WEIGHTS, TORCH_WEIGHTS, "pytorch_model-00001-of-00002.bin", "training_args.bin"]
        calls.append([*huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    to_torch(folder)
    mmjax.load("org/name")
    assert calls == [[WEIGHTS], [TORCH_WEIGHTS, "pytorch_model-00001-of-00002.bin"]]


@pytest.mark.parametrize(
    "beside", ["mm_projector.safetensors", "adapter_model.safetensors", "parts.safetensors"]
)
def test_what_goes_onto_weights_is_none(folder, beside, monkeypatch, tmp_path):
    """A folder of torch's weights is one still, here and on the hub."""
    _, params, _ = mmjax.load(folder)
    to_torch(folder)
    save_file({"other": np.zeros(2, np.float32)}, folder / beside)
    jax.tree.map(np.testing.assert_array_equal, mmjax.load(folder)[1], params)
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: calls.append(k) or str(folder))
    (folder / TORCH_WEIGHTS).rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        mmjax.load("org/name")
    assert len(calls) == 3


def test_files_without_their_index(folder):
    to_torch(folder, 2)
    (folder / TORCH_INDEX).unlink()
    refused(folder, f"2 bin files but no {TORCH_INDEX} that says", error=CheckpointError)


def test_the_whole_file_comes_before_an_index(folder):
    to_torch(folder)
    (folder / TORCH_INDEX).write_text('{"weight_map": {"a": "gone.bin"}}')
    mmjax.load(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_an_adapter_alone_says_what_it_is(folder, name):
    (folder / WEIGHTS).rename(folder / name)
    (folder / "mm_projector.bin").write_bytes(b"")
    refused(folder, f"{name} is an adapter, .*mmjax.training.load_tuned", error=CheckpointError)


def test_a_plan_counts_what_is_stored(folder):
    edit_tensors(folder, lambda tensors: tensors.update({n: x.astype("float16") for n, x in tensors.items()}))
    to_torch(folder)
    shapes = folder_shapes(FromFolder(path=str(folder)), make_mesh({"data": 8})).shapes
    assert {leaf.dtype.name for leaf in shapes.values()} == {"float16"}
