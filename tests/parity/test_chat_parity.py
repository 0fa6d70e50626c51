"""Rendered conversations and their ids against transformers, on templates in the published shapes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mmjax.language.chat_formats import CHAT_FORMATS, chat_format  # noqa: E402
from mmjax.language.tokenizer import Tokenizer  # noqa: E402
from tests.language.chats import (  # noqa: E402
    ANSWER,
    ASK,
    CONVERSATIONS,
    SAID,
    SEE,
    SYSTEM,
    TEMPLATES,
    tokenizer,
)


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


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_published_forms_and_their_answers_are_those_of_transformers(name, tmp_path):
    tokenizer("images").with_chat_template(chat_format(name)).save(tmp_path)
    reference, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    for chat in ([SEE, SAID, ASK, ANSWER], [SYSTEM, SEE, ANSWER]):
        text = reference.apply_chat_template(chat, tokenize=False)
        assert ours.apply_chat_template(chat, tokenize=False) == text
        options = {"return_assistant_tokens_mask": True}
        theirs = reference.apply_chat_template(chat, return_dict=True, **options)
        mine = ours.apply_chat_template(chat, **options)
        assert mine["input_ids"].tolist() == [theirs["input_ids"]]
        assert mine["assistant_masks"].tolist() == [theirs["assistant_masks"]]
