"""Every set of tensors that `load` refuses: missing, lying, cut short, elsewhere, or pickled."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.checkpoints.files import TORCH_WEIGHTS
from mmjax.errors import CheckpointError
from tests.models.folders import (
    CONFIG,
    INDEX,
    WEIGHTS,
    edit_config,
    edit_tensors,
    parts,
    refused,
    shard,
    write_index,
    write_parts,
)

pytestmark = pytest.mark.usefixtures("no_network")

CLS = "vit.embeddings.cls_token"
BIAS = "classifier.bias"
KERNEL = "classifier.weight"


def test_missing_extra_and_misshapen_tensors_are_listed_together(folder):
    def change(tensors):
        del tensors[CLS], tensors["vit.layernorm.bias"]
        tensors["vit.encoder.layer.1.layernorm_before.weight"] = np.zeros(8, np.float32)
        tensors["lm_head.weight"] = np.zeros((2, 3), np.float32)
        tensors[KERNEL] = np.zeros((8, 3), np.float32)
        tensors[BIAS] = np.zeros((1, 3), np.float32)

    edit_tensors(folder, change)
    message = refused(folder, "6 tensors do not fit the model that config.json describes; check that")
    assert message.splitlines()[1:] == [
        "  extra: lm_head.weight [2, 3] has no place in this model",
        "  extra: vit.encoder.layer.1.layernorm_before.weight [8] has no place in this model",
        "  misshapen: classifier.bias is [1, 3], expected [3]",
        "  misshapen: classifier.weight is [8, 3], expected [3, 8]",
        "  missing: vit.embeddings.cls_token (for vision_model/embeddings/class_embedding)",
        "  missing: vit.layernorm.bias (for vision_model/post_layernorm/bias)",
    ]


def test_config_of_another_size(folder):
    edit_config(folder, hidden_size=16, num_hidden_layers=2)
    message = refused(folder, "tensors do not fit the model")
    assert "misshapen: vit.embeddings.cls_token is [1, 1, 8], expected [1, 1, 16]" in message
    assert "missing: vit.encoder.layer.1.output.dense.bias" in message


def test_weights_of_another_family(folder, clip):
    shutil.copy(clip / WEIGHTS, folder / WEIGHTS)
    message = refused(folder, "tensors do not fit")
    assert "missing: classifier.weight" in message and "extra: logit_scale []" in message


def test_doubled_tensors(folder):
    edit_tensors(folder, lambda t: t.update({CLS.removeprefix("vit."): t[CLS].copy()}))
    refused(folder, f"doubled: {CLS} and embeddings.cls_token are the same parameter")


def test_scalar_and_empty_shapes(folder):
    edit_tensors(folder, lambda t: t.update({BIAS: np.ones((), np.float32), KERNEL: np.zeros((0, 8), "f4")}))
    message = refused(folder, "2 tensors do not fit")
    assert "classifier.bias is [], expected [3]" in message
    assert "classifier.weight is [0, 8], expected [3, 8]" in message


@pytest.mark.parametrize("share", [0, 1e-9, 0.001, 0.1, 0.3, 0.5, 0.9, 0.9999])
def test_truncated_weights(folder, share):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: min(int(np.ceil(len(whole) * share)), len(whole) - 1)])
    refused(folder, "not a whole safetensors file .*download it again", error=CheckpointError, file=WEIGHTS)


def test_bytes_after_the_end(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0")
    refused(folder, "not a whole safetensors file", error=CheckpointError, file=WEIGHTS)


@pytest.mark.parametrize("size", [0, 1, -1, +1, 2**24, 2**31, 2**63, 2**64 - 1])
def test_header_length_that_lies(folder, size):
    header, data = parts(folder)
    text = json.dumps(header).encode()
    write_parts(folder, text, data, size=len(text) + size if abs(size) == 1 else size)
    refused(folder, "not a whole safetensors file", error=CheckpointError, file=WEIGHTS)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff" * 16, b"[" * 100_000, b'{"a": 1}', b'{"a": {"dtype": "F32"}}'],
    ids=lambda text: repr(text[:12]),
)
def test_header_that_is_no_header(folder, text):
    write_parts(folder, text, b"\0" * 64)
    refused(folder, "not a whole safetensors file", error=CheckpointError, file=WEIGHTS)


def lie(**entry):
    return lambda header, size: header[KERNEL].update(entry)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, size: header[KERNEL].update(data_offsets=[0, 96]),
        lambda header, size: header[KERNEL].update(data_offsets=[size, size + 96]),
        lambda header, size: header[KERNEL].update(data_offsets=[size - 95, size + 1]),
        lambda header, size: header[KERNEL].update(data_offsets=header[KERNEL]["data_offsets"][::-1]),
        lie(data_offsets=[-96, 0]),
        lie(data_offsets=[2**64, 2**64 + 96]),
        lie(data_offsets=[0]),
        lie(data_offsets=None),
        lie(shape=[3, 9]),
        lie(shape=[-3, -8]),
        lie(shape=[2**32, 2**32]),
        lie(shape=[2**63, 2]),
        lie(shape="38"),
        lie(dtype="F16"),
        lie(dtype=None),
        lambda header, size: header.pop(KERNEL),
        lambda header, size: header.update(again=header[KERNEL]),
        lambda header, size: header.update(__metadata__={"format": 3}),
        lambda header, size: header.update(__metadata__=["pt"]),
    ],
)
def test_entries_that_lie(folder, change):
    header, data = parts(folder)
    change(header, len(data))
    write_parts(folder, header, data)
    refused(folder, "not a whole safetensors file", error=CheckpointError, file=WEIGHTS)


def test_the_same_name_twice_in_one_header(folder):
    header, data = parts(folder)
    text = json.dumps(header).encode()
    twice = text[:-1] + b', "classifier.bias": ' + json.dumps(header[KERNEL]).encode() + b"}"
    write_parts(folder, twice, data)
    refused(folder, error=CheckpointError)


def test_unreadable_places(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refused(folder, "not a whole safetensors file", error=CheckpointError, file=WEIGHTS)
    (folder / WEIGHTS).rmdir()
    (folder / WEIGHTS).symlink_to(folder / "gone.safetensors")
    refused(folder, error=CheckpointError)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, "no model.safetensors; the folder has no weights", error=CheckpointError)


def test_files_that_nothing_puts_in_order(folder):
    shard(folder)
    (folder / INDEX).unlink()
    refused(folder, f"2 safetensors files but no {INDEX}", error=CheckpointError)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_and_not_opened(folder, name):
    marker = folder / "ran"
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Evil(marker)))
    reason = "nothing in it was run" if name == TORCH_WEIGHTS else "opening a pickle can run code; convert it"
    refused(folder, reason, error=CheckpointError, file=name)
    assert not marker.exists()
    # The payload is one that works: unpickling it would have left the file.
    pickle.loads((folder / name).read_bytes()).close()
    assert marker.exists()


def test_a_pickle_beside_safetensors_is_left_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder / "ran")))
    mmjax.load(folder)
    assert not (folder / "ran").exists()


def test_a_pickle_under_a_safetensors_name(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Evil(folder / "ran")))
    refused(folder, "not a whole safetensors file", error=CheckpointError, file=WEIGHTS)
    assert not (folder / "ran").exists()


# The index


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "..",
        ".",
        "",
        "config.json",
        "pytorch_model-00001-of-00002.bin",
        "a\0.safetensors",
        None,
        7,
        ["model.safetensors"],
    ],
    ids=repr,
)
def test_index_that_points_elsewhere(folder, file):
    (folder / "sub").mkdir()
    outside = [
        folder.parent / "outside.safetensors",
        folder / "sub" / WEIGHTS,
        folder / "sub\\model.safetensors",
    ]
    for path in outside:
        shutil.copy(folder / WEIGHTS, path)
    weight_map = shard(folder)
    write_index(folder, {**weight_map, CLS: "/" + str(folder.parent) + file if file == "/outside" else file})
    refused(folder, "is not a safetensors file of this folder; refused", error=CheckpointError, file=INDEX)


def test_index_with_an_absolute_path(folder):
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / WEIGHTS, outside)
    write_index(folder, {name: str(outside) for name in load_file(outside)})
    refused(folder, "is not a safetensors file of this folder; refused", error=CheckpointError, file=INDEX)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors", 3])
def test_index_without_a_map(folder, weight_map):
    write_index(folder, weight_map)
    refused(folder, "no weight_map; download the file again", error=CheckpointError, file=INDEX)


def test_index_that_is_not_json(folder):
    (folder / INDEX).write_text("{")
    refused(folder, "not valid JSON", error=CheckpointError, file=INDEX)


def test_index_of_a_missing_file(folder):
    weight_map = shard(folder)
    first = sorted(weight_map.values())[0]
    (folder / first).unlink()
    refused(folder, f"named in {INDEX} but missing; download it", error=CheckpointError, file=first)


def test_index_that_is_of_other_files(folder):
    weight_map = shard(folder)
    first, second = sorted(set(weight_map.values()))
    write_index(folder, {**weight_map, "ghost": first})
    refused(folder, f"tensor ghost is not in {first}", error=CheckpointError, file=INDEX)
    wrong = second if weight_map[CLS] == first else first
    write_index(folder, {**weight_map, CLS: wrong})
    refused(folder, f"tensor {CLS} is not in {wrong} but in", error=CheckpointError, file=INDEX)
    write_index(folder, {k: v for k, v in weight_map.items() if k != CLS})
    refused(folder, f"does not list {CLS}", error=CheckpointError, file=INDEX)


def test_a_tensor_in_two_shards(folder):
    weight_map = shard(folder)
    first, second = sorted(set(weight_map.values()))
    tensors = {name: load_file(folder / file)[name] for name, file in weight_map.items()}
    for file in (first, second):
        other = {name: tensors[name] for name, place in weight_map.items() if place == file or name == CLS}
        save_file(other, folder / file)
    refused(folder, f"tensor {CLS} is also in {first}", error=CheckpointError, file=second)


def test_one_shard_cut_short(folder):
    second = sorted(set(shard(folder).values()))[1]
    whole = (folder / second).read_bytes()
    (folder / second).write_bytes(whole[:-1])
    refused(folder, "not a whole safetensors file", error=CheckpointError, file=second)


def test_links_to_files_are_followed_as_the_hub_cache_needs(folder):
    weight_map = shard(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate([*set(weight_map.values()), CONFIG, INDEX]):
        (folder / file).rename(blobs / str(number))
        (folder / file).symlink_to(blobs / str(number))
    mmjax.load(folder)
