"""Tiny models of sentencepiece, and folders with vocab.json and merges.txt, to open."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tests.golden.make_processor_golden import CORPUS

TEXTS = [*CORPUS, *(" ".join(CORPUS[i::3]) for i in range(3)), "Héllo wörld 日本語 😀", "a  b   c\n\n\td"]
#: Texts with spaces, line ends, marks and characters in places where tokenizers differ.
HARD = [
    *(
        "",
        " ",
        "  ",
        "\n",
        "a",
        " a",
        "a ",
        "  a  b ",
        "\ta\n\n b",
        "\u2581",
        "\u2581a",
        "é e\u0301",
        "日 本 x",
        "😀",
    ),
    *("</s>", "a</s>b", "a </s> b", "<s> a</s>  <s>b", "<unk>a", "<0x41>", "don't I'LL 1234 !!?"),
    *TEXTS,
]


@functools.cache
def spm_model(**changes: Any) -> bytes:
    """A tokenizer.model with LLaMA's settings, or others."""
    model = io.BytesIO()
    settings: dict[str, Any] = dict(
        vocab_size=420, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=0.98,
        minloglevel=9, hard_vocab_limit=False,
    )  # fmt: skip
    changes = {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}
    texts = iter(TEXTS * 4)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, **settings | changes
    )
    return model.getvalue()


def spm_folder(folder: Path, config: dict[str, Any], kind: str = "llama", **changes: Any) -> Path:
    """A folder with a tokenizer.model."""
    (folder / "tokenizer.model").write_bytes(spm_model(**changes))
    return _with_configs(folder, config, kind)


def byte_pair_folder(folder: Path, config: dict[str, Any], kind: str, special: tuple[str, ...]) -> Path:
    """A folder with vocab.json and merges.txt."""
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(TEXTS * 4, trainer)
    made = json.loads(learned.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(made["vocab"]), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in made["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    return _with_configs(folder, config, kind)


def _with_configs(folder: Path, config: dict[str, Any], kind: str) -> Path:
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    return folder
