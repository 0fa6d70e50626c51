"""Rendered conversations and their ids against transformers, on templates in the published shapes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mmjax.language.tokenizer import Tokenizer  # noqa: E402
from tests.language.chats import ANSWER, ASK, CONVERSATIONS, TEMPLATES, tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    for name in TEMPLATES:
        tokenizer(name).save(root / name)
    return {name: root / name for name in TEMPLATES}


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_and_ids_are_those_of_transformers(name, folders):
    reference = transformers.AutoTokenizer.from_pretrained(folders[name])
    ours = Tokenizer.from_folder(folders[name])
    assert ours.chat_template == reference.chat_template == TEMPLATES[name]
    for chat in CONVERSATIONS[name]:
        for prompt in (False, True):
            options = {"add_generation_prompt": prompt}
            text = reference.apply_chat_template(chat, tokenize=False, **options)
            assert ours.apply_chat_template(chat, tokenize=False, **options) == text
            ids = reference.apply_chat_template(chat, return_dict=True, **options)["input_ids"]
            assert ours.apply_chat_template(chat, **options)["input_ids"].tolist() == [ids]


def test_tools_batches_and_final_messages(folders):
    reference = transformers.AutoTokenizer.from_pretrained(folders["mistral"])
    ours = Tokenizer.from_folder(folders["mistral"])
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds <b>two</b> & more — é"}}]
    for each in (ours, reference):
        assert "Adds <b>two</b> & more — é" in each.apply_chat_template([ASK], tools=tools, tokenize=False)
    chats = [[ASK], [ASK, ANSWER]]
    assert ours.apply_chat_template(chats, tokenize=False) == reference.apply_chat_template(
        chats, tokenize=False
    )
    expected = reference.apply_chat_template(chats, padding=True, return_dict=True)
    found = ours.apply_chat_template(chats, padding=True)
    assert {k: v.tolist() for k, v in found.items()} == {k: expected[k] for k in found}
    for name in ("chatml", "llama-2", "gemma"):
        options = {"tokenize": False, "continue_final_message": True}
        theirs = transformers.AutoTokenizer.from_pretrained(folders[name])
        mine = Tokenizer.from_folder(folders[name])
        assert mine.apply_chat_template([ASK, ANSWER], **options) == theirs.apply_chat_template(
            [ASK, ANSWER], **options
        )


def test_named_templates_go_both_ways(folders, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(folders["chatml"])
    theirs.chat_template = {"default": TEMPLATES["chatml"], "tool_use": "{{ tools | tojson }}"}
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Tokenizer.from_folder(tmp_path / "theirs")
    assert ours.chat_template == theirs.chat_template
    ours.save(tmp_path / "ours")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template == theirs.chat_template
    shutil.rmtree(tmp_path / "theirs" / "additional_chat_templates")
    assert Tokenizer.from_folder(tmp_path / "theirs").chat_template == TEMPLATES["chatml"]
