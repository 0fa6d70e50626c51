"""Ids of folders without tokenizer.json beside transformers' own classes, live."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="live comparison needs the parity extra: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="live comparison needs the parity extra: pip install -e '.[parity]'"
)

from mmjax.models import Processor  # noqa: E402
from tests.language.spm_models import HARD, TEXTS, byte_pair_folder, spm_folder  # noqa: E402

transformers.logging.set_verbosity_error()

OPT_END = {
    "__type": "AddedToken",
    "content": "</s>",
    "normalized": True,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
}
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False}
GEMMA = dict(
    add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>"
)


def assert_same_ids(folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    processor = Processor.from_folder(folder)
    assert processor is not None and processor.tokenizer is not None
    ours = processor.tokenizer
    for role in ("bos_token", "eos_token", "unk_token", "padding_side"):
        assert getattr(ours, role) == getattr(theirs, role), role
    chance = random.Random(0)
    made = ["".join(chance.choices("ab cat<s></s>\n\u2581é日 .1'", k=12)) for _ in range(100)]
    marked = [
        chance.choice(TEXTS) + chance.choice(["</s>", " <s> ", "<unk>", "<|im_end|>"]) + text
        for text in TEXTS
    ]
    for text in (*HARD, *made, *marked):
        ids = theirs(text).input_ids
        assert ours(text)["input_ids"][0].tolist() == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize(
    "config",
    [
        {"legacy": False},
        {"legacy": True},
        {"add_eos_token": True},
        {"add_prefix_space": False},
        {
            "pad_token": "<pad>",
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True, "normalized": False, **FLAGS},
                "1": {"content": "<s>", "special": True, "normalized": False, **FLAGS},
                "2": {"content": "</s>", "special": True, "normalized": False, **FLAGS},
            },
        },
    ],
    ids=["as Vicuna", "legacy", "end", "no space", "tokens named"],
)
def test_llama(config: dict[str, Any], tmp_path: Path) -> None:
    named = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    assert_same_ids(spm_folder(tmp_path, {**named, **config}))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_internlm2(tmp_path: Path) -> None:
    assert_same_ids(
        spm_folder(tmp_path, {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": True}, "internlm2")
    )


def test_gemma(tmp_path: Path) -> None:
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}
    assert_same_ids(spm_folder(tmp_path, config, "gemma", **GEMMA))


@pytest.mark.parametrize(
    ("kind", "special", "config"),
    [
        (
            "opt",
            ("<s>", "<pad>", "</s>", "<unk>"),
            {
                "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False,
                "unk_token": OPT_END, "bos_token": OPT_END, "eos_token": OPT_END, "pad_token": "<pad>",
            },
        ),
        ("opt", ("<|endoftext|>",), {}),
        ("opt", ("<|endoftext|>",), {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        (
            "qwen2",
            (),
            {
                "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "added_tokens_decoder": {
                    str(360 + number): {"content": token, "special": True, "normalized": False, **FLAGS}
                    for number, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
                },
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            },
        ),
    ],
    ids=["opt", "opt without a config", "space before", "qwen2"],
)  # fmt: skip
def test_byte_pairs(kind: str, special: tuple[str, ...], config: dict[str, Any], tmp_path: Path) -> None:
    assert_same_ids(byte_pair_folder(tmp_path, config, kind, special))
