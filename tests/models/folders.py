"""Tiny hub folders to damage, and ways to damage them."""

from __future__ import annotations

import functools
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.errors import MmjaxError
from mmjax.models import ViTConfig, ViTForImageClassification
from tests.tiny import MODELS, random_params

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

VIT = ViTForImageClassification(
    ViTConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
)


@functools.cache
def _template(name: str) -> Path:
    model = VIT if name == "vit" else MODELS[{"clip": "CLIPModel", "siglip": "SiglipModel"}[name]]
    folder = Path(tempfile.mkdtemp(prefix=f"mmjax-{name}-"))
    mmjax.save(folder, model, random_params(model))
    return folder


def make(folder: Path, name: str = "vit") -> Path:
    """A whole folder that loads: "vit" (one layer), "clip" or "siglip" (two layers a tower)."""
    shutil.copytree(_template(name), folder, dirs_exist_ok=True)
    return folder


def edit_config(folder: Path, section: str | None = None, **changes: Any) -> None:
    """Set attributes of config.json, or of a section of it."""
    config = json.loads((folder / CONFIG).read_text())
    (config if section is None else config[section]).update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Rewrite model.safetensors after `change` has worked on its tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of model.safetensors."""
    whole = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def write_parts(folder: Path, header: Any, data: bytes, size: int | None = None) -> None:
    """Write model.safetensors by hand; `size` is the length that it claims its header to have."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if size is None else size
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", claimed) + text + data)


def shard(folder: Path) -> dict[str, str]:
    """Split the weights over two files with an index; returns its weight_map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(
    path: Any, match: str | None = None, *, error: type[Exception] = MmjaxError, file: str | None = None
) -> str:
    """The message of a load that has to fail: its first line names the file and is not long."""
    with pytest.raises(error, match=match) as info:
        mmjax.load(path)
    first, *others = str(info.value).splitlines()
    named = str(path if file is None else Path(path) / file)
    assert named in first, first
    assert len(first) < 1000
    assert all(line.startswith("  ") for line in others)
    return str(info.value)


def assert_same_params(actual: Any, expected: Any) -> None:
    """The same paths with the same bits of the same dtype."""
    actual, expected = flatten_dict(actual, sep="/"), flatten_dict(expected, sep="/")
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype, path
        assert np.asarray(actual[path]).tobytes() == np.asarray(value).tobytes(), path
        assert actual[path].shape == value.shape, path


def files(folder: Path) -> set[str]:
    """Names of all files of a folder."""
    return {path.name for path in folder.iterdir()}
