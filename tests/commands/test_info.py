"""`mmjax info` counts what `load` gives, from headers alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import mmjax


def test_info_counts_what_load_gives(report, clip_folder):
    found = report("info", clip_folder)
    params = mmjax.load(clip_folder)[1]
    leaves = jax.tree.leaves(params)
    assert found["parameters"] == sum(leaf.size for leaf in leaves)
    assert found["bytes"] == sum(leaf.nbytes for leaf in leaves)
    assert (found["model"], found["dtypes"]) == ("CLIPModel", ["float32"])
    assert found["config"]["vision_config"]["image_size"] == [8, 8]
    shapes = {tuple(t["path"].split("/")): tuple(t["shape"]) for t in found["tensors"]}
    assert shapes["text_model", "encoder", "layers_1", "mlp", "fc1", "kernel"] == (16, 24)
    assert shapes["logit_scale",] == ()
    assert "tokenizer.json" in found["processor"]


def test_info_tree_takes_equal_layers_together(run, clip_folder):
    code, out, err = run("info", clip_folder)
    assert (code, err) == (0, "")
    assert "layers_0 ... layers_1 (2 alike)" in out and "\x1b" not in out
    code, out, _ = run("info", clip_folder, "--all")
    assert code == 0 and "alike" not in out and "layers_1" in out and "4 x 4 x 3 x 16" in out
    code, out, _ = run("info", clip_folder, "--depth", "1")
    assert code == 0 and "layers_0" not in out and "vision_model" in out


def test_info_tells_a_llava_s_modules_and_kind(run, report, llava_folder):
    found = report("info", llava_folder)
    params = mmjax.load(llava_folder)[1]
    listed = {tensor["path"]: (tensor["shape"], tensor["dtype"]) for tensor in found["tensors"]}
    assert listed == {
        path: (list(leaf.shape), leaf.dtype.name) for path, leaf in flatten_dict(params, sep="/").items()
    }
    assert found["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert (found["model"], found["dtypes"]) == ("Llava", ["float16", "float32"])
    kind = llava_folder.name
    assert (found["config"]["model_type"], "image_newline" in listed) == (kind, kind != "llava")
    assert {"chat_template.jinja", "processor_config.json"} <= set(found["processor"])
    code, out, _ = run("info", llava_folder, "--depth", "1")
    assert code == 0
    facts, modules = out.split("\n\n")
    assert {tuple(line.split()) for line in facts.splitlines()} >= {
        ("model_type", kind),
        ("projector", "mlp2x"),
    }
    assert [line.split()[0] for line in modules.splitlines()[1:]] == sorted(params)


def test_info_reads_no_weights(report, clip_folder, monkeypatch):
    from mmjax.checkpoints.files import TensorReader

    monkeypatch.setattr(TensorReader, "read", lambda *arguments: pytest.fail("a tensor was read"))
    assert report("info", clip_folder)["parameters"] > 0


def test_info_bad_input(fails, run, clip_folder, tmp_path):
    assert "no such folder" in fails("info", tmp_path / "none")
    assert "config.json: no such file" in fails("info", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not valid JSON" in fails("info", tmp_path)
    shutil.copy(Path(clip_folder, "config.json"), tmp_path)
    assert "no weights" in fails("info", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert "model.safetensors: not a whole safetensors file" in fails("info", tmp_path)
    save_file({"visual_projection.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    code, out, err = run("info", tmp_path)
    assert (code, out) == (2, "") and "missing: logit_scale" in err and "misshapen: visual_projection" in err
