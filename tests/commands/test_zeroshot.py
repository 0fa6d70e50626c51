"""`mmjax zeroshot`: the model's own probabilities, as a table and as JSON."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np

from mmjax import cli

LABELS = ["a cat", "a [bold]dog[/bold]", "something\x1b[31m else"]


def test_zeroshot_json_is_the_models_softmax(report, clip_folder, together, images):
    found = report("zeroshot", "--model", clip_folder, "--image", *images, "--labels", *LABELS)
    logits = np.asarray(together(images, [f"a photo of {label}" for label in LABELS]).logits_per_image)
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = [[image["probabilities"][label] for label in LABELS] for image in found["images"]]
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    assert [image["image"] for image in found["images"]] == images
    assert [image["best"] for image in found["images"]] == [LABELS[i] for i in logits.argmax(axis=1)]
    assert found["templates"] == ["a photo of {}"]


def test_zeroshot_table_is_plain_when_piped(run, clip_folder, images, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    arguments = ["--template", "{}", "--template", "the {}", "--top", "2"]
    code, out, err = run(
        "zeroshot", "--model", clip_folder, "--image", *images, "--labels", *LABELS, *arguments
    )
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].split() == ["image", "label", "probability"]
    assert len(lines) == 1 + 2 * 2 and [image in out for image in images] == [True, True]
    assert "a [bold]dog[/bold]" in out or "something\\x1b[31m else" in out


def test_zeroshot_table_on_a_terminal(clip_folder, images, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["zeroshot", "--model", clip_folder, "--image", images[1], "--labels", *LABELS]) == 0
    assert "[bold]dog[/bold]" in shown.getvalue() and "\x1b[31m" not in shown.getvalue()


def test_zeroshot_in_half_precision(report, clip_folder, images):
    arguments = ["zeroshot", "--model", clip_folder, "--image", *images, "--labels", *LABELS]
    full, half = (
        [list(image["probabilities"].values()) for image in report(*arguments, *extra)["images"]]
        for extra in ([], ["--dtype", "bfloat16"])
    )
    assert full != half
    np.testing.assert_allclose(half, full, atol=0.1)


def test_zeroshot_bad_input(fails, clip_folder, vit_folder, bare_folder, images, tmp_path):
    def fault(model=clip_folder, image=images[0], labels=("a", "b"), extra=()):
        return fails("zeroshot", "--model", model, "--image", image, "--labels", *labels, *extra)

    (tmp_path / "broken.png").write_bytes(Path(images[0]).read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    assert fault(image=tmp_path / "none.png").endswith("none.png: no such file")
    assert "is a folder" in fault(image=tmp_path)
    assert "broken.png (truncated)" in fault(image=tmp_path / "broken.png")
    assert "text.png (not_an_image)" in fault(image=tmp_path / "text.png")
    assert "'a' is given twice" in fault(labels=("a", "a"))
    assert "empty" in fault(labels=("a", " "))
    assert "has no {}" in fault(extra=("--template", "a photo"))
    assert "takes no texts" in fault(model=vit_folder)
    assert "no preprocessor_config.json" in fault(model=bare_folder)
    assert "no such folder" in fault(model=f"{tmp_path}/nothing")
    assert "config.json: no such file" in fault(model=tmp_path)
