"""`mmjax convert` keeps every bit, or the values in another dtype."""

from __future__ import annotations

import json

import jax
import numpy as np

import mmjax
from mmjax.checkpoints.files import open_tensors


def same_tree(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_convert_keeps_every_bit(run, report, clip_folder, tmp_path):
    found = report("convert", clip_folder, tmp_path / "copy", "--shard-size", "10kB")
    assert sum(name.endswith(".safetensors") for name in found["files"]) > 1
    assert "model.safetensors.index.json" in found["files"] and found["dtypes"] == ["float32"]
    first, second = mmjax.load(clip_folder), mmjax.load(tmp_path / "copy")
    same_tree(first[1], second[1])
    assert first[0] == second[0] and second[2] is not None
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    code, out, _ = run("convert", clip_folder, tmp_path / "again")
    assert code == 0 and "model.safetensors" in out


def test_convert_to_another_dtype(report, clip_folder, tmp_path):
    (tmp_path / "half").mkdir()
    assert report("convert", clip_folder, tmp_path / "half", "--dtype", "bfloat16")["dtypes"] == ["bfloat16"]
    wanted = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), mmjax.load(clip_folder)[1])
    same_tree(mmjax.load(tmp_path / "half")[1], wanted)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def stored(folder):
    """Every tensor of a folder's files by name: its dtype and its bytes."""
    with open_tensors(folder) as reader:
        return {name: (reader.dtypes[name], reader.read(name).tobytes()) for name in reader.shapes}


def test_convert_keeps_all_of_a_llava(report, llava_folder, tmp_path):
    """Each tensor under its name, in its own dtype; template, processor, and what ends an answer."""
    found = report("convert", llava_folder, tmp_path / "copy", "--shard-size", "10kB")
    assert found["dtypes"] == ["float16", "float32"]
    before = stored(llava_folder)
    assert stored(tmp_path / "copy") == before
    assert len(before) == len(jax.tree.leaves(mmjax.load(llava_folder)[1]))
    names = {path.name for path in llava_folder.iterdir()} - {"model.safetensors"}
    assert {"chat_template.jinja", "generation_config.json", "processor_config.json"} < names
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (llava_folder / name).read_bytes(), name
    assert {name for name in found["files"] if "safetensors" not in name} == names


def test_convert_a_llava_to_another_dtype(report, llava_folder, tmp_path):
    assert report("convert", llava_folder, tmp_path / "half", "--dtype", "bfloat16")["dtypes"] == ["bfloat16"]
    model, params, processor = mmjax.load(llava_folder)
    found, half, again = mmjax.load(tmp_path / "half")
    same_tree(half, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params))
    assert found.config.text_config == model.config.text_config
    assert (again.image_processor, again.image_tokens) == (processor.image_processor, processor.image_tokens)


def test_convert_bad_input(fails, clip_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "is not empty" in fails("convert", clip_folder, tmp_path / "full")
    assert "is not empty" in fails("convert", clip_folder, clip_folder)
    assert "is a file" in fails("convert", clip_folder, tmp_path / "full" / "file")
    assert "no such folder; make it first" in fails("convert", clip_folder, tmp_path / "a" / "b")
    assert "no such folder" in fails("convert", tmp_path / "none", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_convert_leaves_nothing_behind_when_it_fails(fails, clip_folder, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mmjax, "save", full, raising=False)
    assert fails("convert", clip_folder, tmp_path / "new") == "No space left on device"
    assert list(tmp_path.iterdir()) == []
