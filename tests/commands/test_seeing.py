"""`mmjax generate` and `mmjax chat` about images, with a tiny model of random parameters."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

import mmjax
from tests.generation.seeing import make, picture, said


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, params, processor = make("llava_next")
    folder = tmp_path_factory.mktemp("models") / "seer"
    mmjax.save(folder, model, params, processor)
    for name, size in (("a", (9, 20)), ("b", (30, 10))):
        picture(*size).save(folder.parent / f"{name}.png")
    return folder


def expected(folder, messages, new):
    model, params, processor = mmjax.load(folder)
    tokenizer = processor.tokenizer
    tokens = mmjax.generate(model, params, processor(messages=messages), new, stop_ids=tokenizer.eos_token_id)
    return tokenizer.decode(np.asarray(tokens)[0], skip_special_tokens=True)


def shown(text):
    from tests.commands.test_generate import visible

    return visible(text)


def test_a_question_about_images(run, folder):
    images = [folder.parent / "a.png", folder.parent / "b.png"]
    options = ("--image", images[0], "--image", images[1], "--prompt", "a <image> cat", "--max-new-tokens", 6)
    code, out, err = run("generate", "--model", folder, *options)
    message = said(*(str(image) for image in images))
    for part, image in zip(message["content"], images, strict=True):
        part |= {"type": "image", "image": str(image)}
        part.pop("text")
    message["content"].append({"type": "text", "text": "a <image> cat"})
    assert (code, out, err) == (0, shown(expected(folder, [message], 6)) + "\n", "")


def test_a_chat_about_images(run, folder, monkeypatch):
    """An image at the start, one on a later turn, and one that is none."""
    a, b = picture(9, 20), picture(30, 10)
    said_lines = ["a cat", "/image nowhere.png", f"/image {folder.parent / 'b.png'}", "and this"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in said_lines)))
    arguments = ("--image", folder.parent / "a.png", "--max-new-tokens", 4)
    code, out, err = run("chat", "--model", folder, *arguments)
    messages = [said(a, "a cat")]
    first = expected(folder, messages, 4)
    messages += [said(first, role="assistant"), said(b, "and this")]
    assert (code, out) == (0, f"{shown(first)}\n{shown(expected(folder, messages, 4))}\n")
    assert err.startswith("error: nowhere.png: cannot be read") and err.count("\n") == 1


def test_images_that_are_none(fails, folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    start = ("generate", "--model", folder, "--prompt", "a", "--image")
    assert "missing.png: cannot be read (No such file or directory)" in fails(
        *start, tmp_path / "missing.png"
    )
    assert "broken.png: truncated" in fails(*start, tmp_path / "broken.png")
    assert "the prompt is empty" in fails(
        "generate", "--model", folder, "--image", folder.parent / "a.png", "--prompt", " "
    )
    assert "PROMPT was given twice" in fails("generate", "--model", folder, "a", "--prompt", "b")
