"""Tensors of safetensors files: in pieces, from memory that jax takes over, and from files that change."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmjax.checkpoints import files
from mmjax.checkpoints.files import WEIGHTS, open_tensors
from mmjax.errors import CheckpointError

# Of several sizes, so that bytes do not lie in the order of the names; one has none and one is a scalar.
TENSORS = {
    "a": np.arange(35, dtype=np.int8).reshape(5, 7),
    "b": np.linspace(-1, 1, 1001).astype(ml_dtypes.bfloat16),
    "c": np.array(3.5),
    "d": np.zeros((0, 4), np.float32),
    "e": np.random.default_rng(0).standard_normal((33, 3, 5)).astype(np.float32),
    "f": np.array([True, False, True]),
}


@pytest.fixture(params=[7, 1 << 20], ids=["small pieces", "whole"])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE_BYTES", request.param)
    save_file(TENSORS, tmp_path / WEIGHTS, metadata={"format": "pt"})
    return tmp_path


def test_tensors_are_the_librarys_own(folder):
    expected = load_file(folder / WEIGHTS)
    with open_tensors(folder) as reader:
        assert reader.shapes == {name: x.shape for name, x in TENSORS.items()}
        for name, tensor in expected.items():
            found = reader.read(name)
            assert (found.dtype, found.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
            assert found.tobytes() == tensor.tobytes()


def test_memory_begins_where_jax_takes_it_over(folder):
    with open_tensors(folder) as reader:
        assert all(reader.read(name).ctypes.data % 64 == 0 for name, x in TENSORS.items() if x.size)


def test_a_file_that_is_cut_or_gone_while_it_is_read(folder):
    path = folder / WEIGHTS
    with open_tensors(folder) as reader:
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(CheckpointError, match=f"{WEIGHTS}: tensor . cannot be read .it ended early"):
            for name in TENSORS:
                reader.read(name)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{WEIGHTS}: tensor a cannot be read"):
            reader.read("a")
