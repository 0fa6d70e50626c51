"""Files that torch.save wrote: what is read, where it is, and that nothing in them runs."""

from __future__ import annotations

import struct
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
    with pytest.raises(CheckpointError, match="w.bin: .*not a file of torch.save"):
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


# Pickles that no torch wrote


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def big(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def called(module, name):
    return f"c{module}\n{name}\n".encode()


TENSOR = called("torch._utils", "_rebuild_tensor_v2")
STORAGE = b"(" + text("storage") + called("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
DICT = called("collections", "OrderedDict") + b")R"
FORGED = (
    DICT
    + b"}("
    + text("dtype")
    + text("F32")
    + text("begin")
    + b"K\x00"
    + text("values")
    + big(1 << 60)
    + b"ub"
)
DOUBLED = b"K\x01" + b"2\x86" * 60


def tensor(storage, size, stride, rest=b""):
    return b"\x80\x02}(" + text("a") + TENSOR + b"(" + storage + b"K\x00" + size + stride + rest + b"tRu."


@pytest.mark.parametrize(
    "made",
    [
        b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b"Nu.",
        b"\x80\x02\x8e" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\x02" + DICT + b"}(" + text("values") + text("x") + b"ub(" + text("a") + b"Nu.",
        b"\x80\x02}(" + DOUBLED + b"K\x01u.",
        b"\x80\x02" + TENSOR + b"N}(" + text("__name__") + text("evil") + b"u\x86b.",
        tensor(FORGED, b"K\x02\x85", b"K\x01\x85"),
        tensor(STORAGE, DOUBLED, b"K\x01\x85"),
        tensor(STORAGE, b"(" + b"K\x01" * 70 + b"t", b"(" + b"K\x01" * 70 + b"t"),
        tensor(STORAGE, b"K\x00" + big(1 << 62) + b"\x86", b"K\x00K\x00\x86"),
        tensor(STORAGE, big(-1) + b"\x85", b"K\x01\x85"),
        tensor(STORAGE, b"K\x02\x85", b"K\x04\x85"),
        tensor(STORAGE, b"\x88\x85", b"K\x01\x85"),
        tensor(STORAGE, b"K\x02\x85", b"K\x01\x85", b"\x89" + DICT + b"}" + text("neg") + b"\x88s"),
        b"\x80\x02t.",
        b"\x80\x02.",
        b"\x80\x02h\x07.",
        b"\x80\x02}(" + text("a") + b"I" + b"1" * 5000 + b"\nu.",
    ],
)
def test_pickles_that_are_made_to_do_harm(tmp_path, made):
    """In no time, in no memory, and with one line."""
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", made)
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(CheckpointError, match="nothing in it was run") as caught:
        read(tmp_path / "x.bin")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_name_of_an_order_of_bytes_is_short(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", bytes(1 << 24))
    with pytest.raises(CheckpointError, match="not little-endian"):
        torch_places(tmp_path / "x.bin")
