"""Folders of LLaVA's original repository, and files that torch.save wrote."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.checkpoints.files import TensorReader
from mmjax.checkpoints.torch_files import read_torch_file
from mmjax.commands.info import inspect
from mmjax.errors import CheckpointError, ConfigError
from mmjax.models import CLIPConfig, CLIPModel, CLIPTextConfig, Processor
from tests.generation.seeing import TOKENIZER, make, picture
from tests.tiny import random_params


def write_torch(path, tensors, extra=None):
    """A file as torch.save writes one: a zip of a pickle and of the tensors' bytes."""
    kinds = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
    out = io.BytesIO()
    writer = pickle._Pickler(out, protocol=2)

    def reference(module, name):
        out_name = f"c{module}\n{name}\n".encode()
        writer.write(out_name)

    with zipfile.ZipFile(path, "w") as archive:
        writer.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK)
        for number, (name, value) in enumerate(tensors.items()):
            archive.writestr(f"archive/data/{number}", value.tobytes())
            writer.save(name)
            reference("torch._utils", "_rebuild_tensor_v2")
            writer.write(pickle.MARK + pickle.MARK)
            writer.save("storage")
            reference("torch", kinds[str(value.dtype)])
            writer.save(str(number))
            writer.save("cpu")
            writer.save(value.size)
            writer.write(pickle.TUPLE + pickle.BINPERSID)
            writer.save(0)
            for numbers in (value.shape, tuple(s // value.itemsize for s in value.strides)):
                writer.write(pickle.MARK)
                for n in numbers:
                    writer.save(n)
                writer.write(pickle.TUPLE)
            writer.write(pickle.NEWFALSE)
            reference("collections", "OrderedDict")
            writer.write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE)
        writer.write(pickle.SETITEMS)
        if extra is not None:
            reference(*extra)
            writer.write(b"(Vecho\ntR")
        writer.write(pickle.STOP)
        archive.writestr("archive/data.pkl", out.getvalue())


def test_tensors_of_a_torch_file(tmp_path):
    numbers = np.random.default_rng(0)
    tensors = {
        "a": numbers.standard_normal((3, 4)).astype(np.float32),
        "b": numbers.standard_normal(5).astype(ml_dtypes.bfloat16),
    }
    write_torch(tmp_path / "x.bin", tensors)
    found = read_torch_file(tmp_path / "x.bin")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_a_torch_file_runs_nothing(tmp_path):
    write_torch(tmp_path / "x.bin", {"a": np.zeros(2, np.float32)}, extra=("os", "system"))
    with pytest.raises(CheckpointError, match="it names os.system, which is no tensor's"):
        read_torch_file(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"y.bin: not read as tensors"):
        read_torch_file(tmp_path / "y.bin")
    with pytest.raises(CheckpointError, match="no such file"):
        read_torch_file(tmp_path / "z.bin")


@pytest.fixture(params=["llava", "llava_next"])
def original(request, tmp_path):
    """An original folder made of a tiny model's tensors, and what it should open as."""
    model, params, processor = make(request.param)
    mmjax.save(tmp_path / "hf", model, params, processor)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    eyes, config = tmp_path / "eyes", model.config
    clip = CLIPModel(
        CLIPConfig(
            vision_config=config.vision_config,
            text_config=CLIPTextConfig(
                vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=4, eos_token_id=8,
            ),
        )
    )  # fmt: skip
    mmjax.save(eyes, clip, {**random_params(clip), "vision_model": params["vision_tower"]})
    from mmjax.vision.processing import ImageProcessor

    Processor(ImageProcessor(size=8, crop_size=8)).save(eyes)
    names = {
        "multi_modal_projector.linear_1": "model.mm_projector.0",
        "multi_modal_projector.linear_2": "model.mm_projector.2",
        "image_newline": "model.image_newline",
        "language_model.": "",
    }
    renamed = {}
    for name, value in tensors.items():
        for old, new in names.items():
            if name.startswith(old):
                renamed[name.replace(old, new, 1)] = value
    folder = tmp_path / "original"
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors")
    brain = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    hub = {
        **brain, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(eyes), "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 8,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "square",
        "mm_use_im_start_end": False, "tune_mm_mlp_adapter": False, "use_mm_proj": True,
    }  # fmt: skip
    if request.param == "llava_next":
        hub |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        hub["image_grid_pinpoints"] = [[w, h] for h, w in config.image_grid_pinpoints]
    (folder / "config.json").write_text(json.dumps(hub))
    TOKENIZER.save(folder)
    return folder, model, params, processor


def test_an_original_folder_opens_and_goes_to_the_other_layout(original, tmp_path):
    folder, model, params, processor = original
    found, found_params, found_processor = mmjax.load(folder)
    image = picture(9, 20)
    batch = processor(images=image, text="<image>a cat")
    again = found_processor(images=image, text="<image>a cat")
    for name, value in batch.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    expected = model.apply({"params": params}, **batch).logits
    np.testing.assert_array_equal(found.apply({"params": found_params}, **again).logits, expected)
    mmjax.save(tmp_path / "back", found, found_params, found_processor)
    back, back_params, opened = mmjax.load(tmp_path / "back")
    assert back.config.model_type == model.config.model_type and opened.image_tokens == processor.image_tokens
    np.testing.assert_array_equal(back.apply({"params": back_params}, **again).logits, expected)


def test_its_headers_say_what_it_holds(original, monkeypatch):
    folder, model, params, _ = original
    monkeypatch.setattr(TensorReader, "read", lambda *arguments: pytest.fail("a tensor was read"))
    found = inspect(str(folder))
    assert found["config"]["model_type"] == model.config.model_type
    assert {tensor["path"] for tensor in found["tensors"]} == flatten_dict(params, sep="/").keys()
    assert found["parameters"] == sum(leaf.size for leaf in flatten_dict(params).values())
    # Both of a folder's files are told, its own and that of its eyes, though they have one name.
    eyes = folder.parent / "eyes" / "model.safetensors"
    assert found["files"].keys() == {"model.safetensors", str(eyes)}
    assert {tensor["file"] for tensor in found["tensors"] if "vision" in tensor["path"]} == {str(eyes)}


def test_original_folders_that_are_refused(original):
    folder = original[0]
    hub = json.loads((folder / "config.json").read_text())

    def refused(words, **changes):
        (folder / "config.json").write_text(json.dumps({**hub, **changes}))
        with pytest.raises((ConfigError, CheckpointError), match=words):
            mmjax.load(folder)

    refused("mm_projector_type 'qformer' is none of", mm_projector_type="qformer")
    refused("nowhere/at/all", mm_vision_tower="./nowhere/at/all")
    refused("mm_use_im_start_end", mm_use_im_start_end=True)
    refused("unknown attribute surprise=1", surprise=1)
    refused("mm_vision_tower None is no name", mm_vision_tower=None)
