"""`mmjax embed`: files that are right, whole and never overwritten by accident."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mmjax

TEXTS = ["a red cat", "b", "c d"]


def test_embed_images_and_texts(run, report, clip_folder, together, images, tmp_path):
    out = tmp_path / "embeds.npz"
    arguments = ["embed", "--model", clip_folder, "--image", *images, "--text", *TEXTS, "--out", out]
    found = report(*arguments)
    assert found["arrays"] == {"image_embeds": [2, 6], "text_embeds": [3, 6]}
    with np.load(out) as arrays:
        assert arrays["image_names"].tolist() == images and arrays["texts"].tolist() == TEXTS
        wanted = together(images, TEXTS)
        np.testing.assert_allclose(arrays["image_embeds"], wanted.image_embeds, atol=1e-6)
        np.testing.assert_allclose(arrays["text_embeds"], wanted.text_embeds, atol=1e-6)
    before = out.read_bytes()
    code, printed, err = run(*arguments)
    assert (code, printed) == (2, "") and "overwrite it with --force" in err
    assert out.read_bytes() == before
    assert run(*arguments, "--force", "--raw")[0] == 0
    assert out.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(Path(i).name for i in images), out.name]
    )


def test_embed_one_kind_to_npy(report, clip_folder, tmp_path):
    lines, out = tmp_path / "lines.txt", tmp_path / "texts.npy"
    lines.write_text("one\n\ntwo\nthree\n", encoding="utf-8")
    report("embed", "--model", clip_folder, "--text-file", lines, "--out", out, "--batch-size", "2")
    assert np.load(out).shape == (3, 6)
    assert json.loads((tmp_path / "texts.npy.names.json").read_text()) == ["one", "two", "three"]


def test_embed_a_dataset_with_labels_and_captions(report, vit_folder, clip_folder, colours, tmp_path):
    report("embed", "--model", vit_folder, "--data", colours / "splits", "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["image_embeds"].shape == (6, 16)
        np.testing.assert_array_equal(arrays["labels"], [0, 0, 1, 1, 2, 2])
        assert arrays["image_names"][0] == "deep_blue/0.png"
    table = ["--data", colours / "pairs.csv", "--captions", "--out", tmp_path / "b.npz"]
    report("embed", "--model", clip_folder, *table)
    with np.load(tmp_path / "b.npz") as arrays:
        assert arrays["image_embeds"].shape == (18, 6) and arrays["text_embeds"].shape == (36, 6)


def test_embed_leaves_nothing_behind_when_writing_fails(fails, clip_folder, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    arguments = ["embed", "--model", clip_folder, "--text", "a", "--out", tmp_path / "a.npz"]
    assert fails(*arguments) == "No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_embed_bad_input(fails, clip_folder, vit_folder, images, tmp_path):
    def fault(*extra, out="x.npz", model=clip_folder):
        return fails("embed", "--model", model, "--out", tmp_path / out, *extra)

    assert "nothing to embed" in fault()
    assert "has to end in .npz or .npy" in fault("--text", "a", out="x.txt")
    assert "one kind" in fault("--text", "a", "--image", images[0], out="x.npy")
    assert "not both" in fault("--image", images[0], "--data", "digits")
    assert "--captions needs --data" in fault("--captions")
    assert "no such folder" in fault("--text", "a", out="none/x.npz")
    assert "a text is empty" in fault("--text", "")
    assert "takes no texts" in fault("--text", "a", model=vit_folder)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "not UTF-8" in fault("--text-file", tmp_path / "latin.txt")
    assert "No such file" in fault("--text-file", tmp_path / "none.txt")


@pytest.mark.parametrize("command", ["zeroshot", "embed"])
def test_embeddings_that_are_not_finite_are_refused(fails, clip_folder, images, tmp_path, command):
    model, params, processor = mmjax.load(clip_folder)
    params["visual_projection"]["kernel"] *= np.nan
    mmjax.save(tmp_path / "nan", model, params, processor)
    arguments = {"zeroshot": ["--labels", "a"], "embed": ["--out", tmp_path / "a.npz"]}[command]
    line = fails(command, "--model", tmp_path / "nan", "--image", *images, *arguments)
    assert line.endswith("nan: 2 of 2 image embeddings are not finite")
