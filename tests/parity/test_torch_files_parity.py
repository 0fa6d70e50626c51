"""Files that torch itself wrote, opened without it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

REASON = "live comparison needs the parity extra: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

import mmjax  # noqa: E402
from mmjax.checkpoints.files import TensorReader  # noqa: E402
from mmjax.errors import CheckpointError  # noqa: E402


def read(path: Path) -> dict[str, np.ndarray]:
    with ExitStack() as stack:
        reader = TensorReader([path], stack)
        return {name: reader.read(name) for name in reader.shapes}


def numbers(tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_every_dtype(dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = (torch.randn(6, 5) * 9).to(getattr(torch, dtype))
    parts = {"whole": whole, "turned": whole.T, "cut": whole[1:4, ::2], "one": whole[2, 3], "again": whole}
    parts |= {"row": whole[:1].expand(4, 5), "none": whole[:0]}
    torch.save(parts, tmp_path / "x.bin")
    found = read(tmp_path / "x.bin")
    assert found.keys() == parts.keys()
    for name, tensor in parts.items():
        assert found[name].dtype == numbers(tensor).dtype and found[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(found[name], numbers(tensor), err_msg=name)


def test_a_model_with_tied_weights(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path)
    ids = np.arange(6)[None]
    expected = mmjax_logits(tmp_path, ids)
    (tmp_path / "model.safetensors").unlink()
    # With the attributes that a state dict has, and both names of the one matrix.
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    np.testing.assert_array_equal(mmjax_logits(tmp_path, ids), expected)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(expected, theirs, atol=1e-5, rtol=1e-5)


def mmjax_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    model, params, _ = mmjax.load(folder)
    return np.asarray(model.apply({"params": params}, ids).logits)


@pytest.mark.parametrize("what", ["older", "model", "numbers", "negated"])
def test_what_torch_writes_and_is_not_read(what: str, tmp_path: Path) -> None:
    value = {
        "older": {"a": torch.ones(2)},
        "model": torch.nn.Linear(2, 2),
        "numbers": {"a": 3},
        "negated": {"a": torch._neg_view(torch.ones(3))},
    }[what]
    torch.save(value, tmp_path / "x.bin", _use_new_zipfile_serialization=what != "older")
    with pytest.raises(CheckpointError, match=r"x.bin: not .*write it as safetensors"):
        read(tmp_path / "x.bin")
