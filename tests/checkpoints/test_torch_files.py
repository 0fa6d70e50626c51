"""Files that torch.save wrote: what is read, where it is, and that nothing in them runs."""

from __future__ import annotations

import zipfile
from contextlib import ExitStack

import ml_dtypes
import numpy as np
import pytest

from mmjax.checkpoints.files import TensorReader
from mmjax.checkpoints.torch_files import torch_places
from mmjax.errors import CheckpointError
from tests.torch_writer import write_torch


def read(path):
    with ExitStack() as stack:
        reader = TensorReader([path], stack)
        return {name: reader.read(name) for name in reader.shapes}


def some_tensors():
    numbers = np.random.default_rng(0)
    base = numbers.standard_normal((5, 7)).astype(np.float32)
    return {
        "a": numbers.standard_normal((3, 4)).astype(np.float32),
        "b": numbers.standard_normal(5).astype(ml_dtypes.bfloat16),
        "turned": base.T,
        "cut": base[1:4, 2:],
        "whole numbers": np.arange(6).reshape(1, 6),
        "scalar": np.array(2.5, np.float64),
        "none": np.zeros((0, 3), np.float16),
    }


def assert_same(found, tensors):
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("order", [None, b"little"])
def test_tensors_are_read_as_they_are(tmp_path, order):
    write_torch(tmp_path / "x.bin", some_tensors(), order=order)
    assert_same(read(tmp_path / "x.bin"), some_tensors())


def test_a_large_tensor_is_read_in_pieces(tmp_path):
    tensors = {"a": np.random.default_rng(0).standard_normal((1100, 1024)).astype(np.float32)}
    write_torch(tmp_path / "x.bin", {"before": np.ones(3, np.float16), **tensors})
    np.testing.assert_array_equal(read(tmp_path / "x.bin")["a"], tensors["a"])


def test_nothing_in_it_is_run(tmp_path):
    write_torch(tmp_path / "x.bin", {"a": np.zeros(2, np.float32)}, extra=("os", "system"))
    with pytest.raises(CheckpointError, match="it names os.system, which is no tensor's"):
        torch_places(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "storage 0 is compressed or encrypted"),
        ({"count": 7}, "storage 0 has 8 bytes and claims 7 values"),
        ({"order": b"big"}, "its numbers are not little-endian"),
    ],
    ids=["compressed", "count", "order"],
)
def test_what_is_not_as_it_should_be(tmp_path, changes, reason):
    write_torch(tmp_path / "x.bin", {"a": np.zeros(2, np.float32)}, **changes)
    with pytest.raises(CheckpointError, match=rf"x.bin: .*{reason}"):
        torch_places(tmp_path / "x.bin")


def test_what_is_no_such_file(tmp_path):
    (tmp_path / "y.bin").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"y.bin: not read as tensors"):
        torch_places(tmp_path / "y.bin")
    with pytest.raises(CheckpointError, match="no such file"):
        torch_places(tmp_path / "z.bin")
    with zipfile.ZipFile(tmp_path / "w.bin", "w") as archive:
        archive.writestr("something.txt", b"else")
    with pytest.raises(CheckpointError, match="w.bin: not a file of torch.save"):
        torch_places(tmp_path / "w.bin")


def test_a_file_cut_short(tmp_path):
    write_torch(tmp_path / "x.bin", some_tensors())
    whole = (tmp_path / "x.bin").read_bytes()
    for keep in range(0, len(whole), 97):
        (tmp_path / "x.bin").write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"x.bin: not read as tensors"):
            torch_places(tmp_path / "x.bin")


def test_flipped_bytes_are_an_error_or_other_numbers(tmp_path):
    """Never anything else: what the file says about places is checked against the file."""
    write_torch(tmp_path / "x.bin", some_tensors())
    whole = (tmp_path / "x.bin").read_bytes()
    for at in range(0, len(whole), 3):
        (tmp_path / "x.bin").write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            found = read(tmp_path / "x.bin")
        except CheckpointError:
            continue
        assert all(isinstance(value, np.ndarray) for value in found.values())
