"""Whatever is wrong with a folder, `load` says where and what to do, runs nothing, and fetches nothing."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmjax
from mmjax.errors import CheckpointError, MmjaxError
from tests.models.folders import CONFIG, INDEX, WEIGHTS, refused

pytestmark = pytest.mark.usefixtures("no_network")


def test_the_folders_that_are_damaged_here_load(folder, clip):
    for path in (folder, clip):
        model, params, processor = mmjax.load(path)
        assert processor is None
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_no_folder(tmp_path, monkeypatch):
    refused(tmp_path / "nowhere", "no such folder", error=CheckpointError)
    refused(str(tmp_path / "nowhere"), "no such folder; give a folder with config.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for name in (
        "a/b",
        "./b",
        "../b",
        "/b",
        "a/b/c",
        "b/",
        "~/no-such-folder-of-mmjax",
        "~nobody-here/b",
        "",
    ):
        refused(name, "no such folder", error=CheckpointError)
    refused(Path("org/name"), "no such folder", error=CheckpointError)


def test_a_file_is_no_folder(folder):
    refused(folder / WEIGHTS, "is a file, not a folder", error=CheckpointError)
    refused(str(folder / CONFIG), "is a file, not a folder")


@pytest.mark.parametrize("path", [None, 3, b"folder", ["folder"]])
def test_what_is_no_path_at_all(path):
    with pytest.raises(CheckpointError, match="expected the path of a folder or a hub id"):
        mmjax.load(path)


@pytest.mark.parametrize("name", ["org/name", "name", "openai/clip-vit-base-patch32", "a.b/c_d-1.0"])
def test_a_hub_id_is_fetched_once_and_without_pickles(folder, name, monkeypatch, tmp_path):
    calls = []

    def download(repo, **options):
        calls.append((repo, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    mmjax.load(name)
    [(repo, options)] = calls
    assert repo == name
    assert options.keys() == {"allow_patterns"}
    wanted = huggingface_hub.utils.filter_repo_objects(
        [CONFIG, INDEX, WEIGHTS, "model-00001-of-00002.safetensors", "preprocessor_config.json",
         "tokenizer.json", "merges.txt", "spiece.model", "vocab.json",
         "pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.pkl", "x.pickle", "tf_model.h5", "x.py",
         "flax_model.msgpack", "training_args.bin", "x.npz", "x.onnx", "x.so", "README.md"],
        **options,
    )  # fmt: skip
    assert set(wanted) == {
        CONFIG, INDEX, WEIGHTS, "model-00001-of-00002.safetensors", "preprocessor_config.json",
        "tokenizer.json", "merges.txt", "spiece.model", "vocab.json",
    }  # fmt: skip


def hub_errors():
    # The client library behind huggingface_hub has changed its name between versions.
    base = next(c for c in huggingface_hub.errors.HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    http = sys.modules[base.__module__.partition(".")[0]]
    response = http.Response(404, request=http.Request("GET", "https://huggingface.co/org/name"))
    yield huggingface_hub.errors.RepositoryNotFoundError("404 Client Error.\nNot Found", response=response)
    yield huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand no cached copy")
    yield huggingface_hub.errors.OfflineModeIsEnabled("offline")
    yield huggingface_hub.errors.HFValidationError("bad name")
    yield http.ConnectError("cannot connect")
    yield http.ReadTimeout("")
    yield ConnectionResetError(104, "reset")
    yield OSError()
    yield PermissionError(13, "denied")


@pytest.mark.parametrize("error", list(hub_errors()), ids=lambda error: type(error).__name__)
def test_a_hub_failure_is_one_line(error, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder here, and the hub did not give it") as info:
        mmjax.load("org/name")
    assert str(info.value).startswith("org/name: ") and "\n" not in str(info.value)
    assert info.value.__suppress_context__


# Damage that nobody thought of

FUZZ = settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3)


def damaged(whole, flips, start=0):
    changed = bytearray(whole)
    for place, byte in flips:
        changed[start + place % (len(changed) - start)] = byte
    return bytes(changed)


def loads_or_is_refused(folder):
    try:
        _, params, _ = mmjax.load(folder)
    except MmjaxError as error:
        assert str(error)
    else:
        assert jax.tree.leaves(params)


@FUZZ
@given(FLIPS)
def test_flipped_bytes_in_the_config(folder, flips):
    whole = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(damaged(whole, flips))
    try:
        loads_or_is_refused(folder)
    finally:
        (folder / CONFIG).write_bytes(whole)


@FUZZ
@given(FLIPS)
def test_flipped_bytes_in_the_header(folder, flips):
    whole = (folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    (folder / WEIGHTS).write_bytes(damaged(whole[:end], flips) + whole[end:])
    try:
        loads_or_is_refused(folder)
    finally:
        (folder / WEIGHTS).write_bytes(whole)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 70_000) | st.floats() | st.sampled_from(["", "gelu", "8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab0"), inner, max_size=2),
    max_leaves=4,
)


@FUZZ
@given(st.data())
def test_any_value_for_any_attribute(folder, clip, siglip, data):
    path = data.draw(st.sampled_from([folder, clip, siglip]))
    whole = (path / CONFIG).read_text()
    config = json.loads(whole)
    section = data.draw(
        st.sampled_from([s for s in ("vision_config", "text_config") if s in config] + [None])
    )
    part = config if section is None else config[section]
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
    (path / CONFIG).write_text(json.dumps(config))
    try:
        loads_or_is_refused(path)
    finally:
        (path / CONFIG).write_text(whole)
