"""Folders that transformers' Flax classes saved: what they computed there is computed here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize, to_bytes
from flax.traverse_util import flatten_dict, unflatten_dict

import mmjax
from mmjax.checkpoints.files import FLAX_INDEX, FLAX_WEIGHTS, TORCH_WEIGHTS, weight_names
from mmjax.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden" / "flax"


@pytest.fixture(params=sorted(path.name for path in GOLDEN.iterdir()))
def folder(request, tmp_path):
    shutil.copytree(GOLDEN / request.param, tmp_path / request.param)
    return tmp_path / request.param


@pytest.fixture
def opt(tmp_path):
    shutil.copytree(GOLDEN / "opt", tmp_path / "opt")
    return tmp_path / "opt"


def outputs(model, params, expected):
    pixels, ids = expected["pixels"].transpose(0, 2, 3, 1), expected["ids"]
    if "image_embeds" in expected:
        out = model.apply({"params": params}, pixel_values=pixels, input_ids=ids)
    else:
        seeing = hasattr(model.config, "patch_size") or hasattr(model.config, "vision_config")
        out = model.apply({"params": params}, pixels if seeing else ids)
    return {name: getattr(out, name) for name in expected.files if name not in ("pixels", "ids")}


def test_the_same_outputs_here_and_after_a_save(folder, tmp_path):
    expected = np.load(folder / "expected.npz")
    model, params, processor = mmjax.load(folder)
    found = outputs(model, params, expected)
    assert found
    for name, value in found.items():
        bound = 1e-6 * np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=max(bound, 1e-6))
    mmjax.save(tmp_path / "back", model, params, processor)
    jax.tree.map(np.testing.assert_array_equal, mmjax.load(tmp_path / "back")[1], params)
    assert weight_names(tmp_path / "back") == ["model.safetensors"]


def test_bfloat16_and_several_files(opt):
    """As large models were saved, with an index that names parameters in Flax's way."""
    _, params, _ = mmjax.load(opt, dtype="bfloat16")
    flat = flatten_dict(msgpack_restore((opt / FLAX_WEIGHTS).read_bytes()))
    (opt / FLAX_WEIGHTS).unlink()
    keys, weight_map = sorted(flat), {}
    for number in range(2):
        file = f"flax_model-{number + 1:05d}-of-00002.msgpack"
        part = {key: jnp.asarray(flat[key], jnp.bfloat16) for key in keys[number::2]}
        (opt / file).write_bytes(to_bytes(unflatten_dict(part)))
        weight_map |= dict.fromkeys(("/".join(key) for key in part), file)
    (opt / FLAX_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _, again, _ = mmjax.load(opt)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    (opt / FLAX_INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"2 msgpack files but no {FLAX_INDEX}"):
        mmjax.load(opt)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no msgpack",
        b"\xc1",
        msgpack_serialize({"a": {"kernel": np.zeros((1, 1, 1, 1, 1))}}),
        b"\x93" * 99,
    ],
    ids=["empty", "text", "reserved", "axes", "deep"],
)
def test_what_is_no_such_file_is_one_line(opt, content):
    (opt / FLAX_WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{FLAX_WEIGHTS}: not read as Flax parameters") as caught:
        mmjax.load(opt)
    assert "\n" not in str(caught.value)


def test_damage_is_one_line_or_other_numbers(opt):
    whole = (opt / FLAX_WEIGHTS).read_bytes()
    for at in range(0, len(whole), 389):
        (opt / FLAX_WEIGHTS).write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            mmjax.load(opt)
        except CheckpointError:
            continue


def test_it_is_fetched_where_there_is_nothing_else(opt, monkeypatch, tmp_path):
    calls = []

    def download(repo, allow_patterns):
        names = ["config.json", TORCH_WEIGHTS, FLAX_WEIGHTS, "tf_model.h5"]
        calls.append([*huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)])
        if FLAX_WEIGHTS in calls[-1]:
            (hidden / FLAX_WEIGHTS).rename(opt / FLAX_WEIGHTS)
        return str(opt)

    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (opt / FLAX_WEIGHTS).rename(hidden / FLAX_WEIGHTS)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    mmjax.load("org/name")
    assert calls == [["config.json"], [TORCH_WEIGHTS], [FLAX_WEIGHTS]]
