"""Vocabularies of folders without tokenizer.json: tokenizer.model, and vocab.json with merges.txt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from mmjax.errors import CheckpointError
from mmjax.language.tokenizer import Tokenizer
from mmjax.models import Processor
from tests.language.spm_models import HARD, byte_pair_folder, spm_folder, spm_model

INTERNLM = {"tokenizer_class": "InternLM2Tokenizer"}
USER = ("\n\n", "\u2581\u2581", "<tag>")


def plain(text: str) -> bool:
    return not any(token in text for token in ("</s>", "<s>", "<unk>"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"byte_fallback": False},
        {"add_dummy_prefix": False},
        {"add_dummy_prefix": False, "user_defined_symbols": USER},
    ],
    ids=["plain", "no bytes", "no prefix", "user-defined"],
)
def test_ids_and_texts_are_sentencepieces(tmp_path: Path, changes: dict) -> None:
    tokenizer = Tokenizer.from_folder(spm_folder(tmp_path, INTERNLM, **changes))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spm_model(**changes))
    for text in filter(plain, HARD):
        ids = tokenizer(text)["input_ids"][0].tolist()
        assert ids[:1] == [1], text
        assert ids[1:] == pieces.encode(text), text
        # sentencepiece shows what it does not know as a question mark of its own.
        assert tokenizer.decode(ids[1:]) == pieces.decode(ids[1:]).replace(" \u2047 ", "<unk>"), text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("config", [{}, {"legacy": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_llamas_class_agrees_but_for_spaces_at_the_beginning(tmp_path: Path, config: dict) -> None:
    tokenizer = Tokenizer.from_folder(spm_folder(tmp_path, config))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spm_model())
    for text in filter(plain, HARD):
        if text and text[0] not in " \u2581":
            assert tokenizer(text, add_special_tokens=False)["input_ids"][0].tolist() == pieces.encode(text)
    around = tokenizer("a")["input_ids"][0].tolist()
    assert around == [*([] if config.get("add_bos_token") is False else [1]), *pieces.encode("a"),
                      *([2] if config.get("add_eos_token") else [])]  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
def test_special_tokens_stand_alone(tmp_path: Path, legacy: bool) -> None:
    """Behind one, a text begins with a space where the folder is of the older kind."""
    tokenizer = Tokenizer.from_folder(spm_folder(tmp_path, {"legacy": legacy}))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spm_model())
    inside = pieces.encode("ab") if legacy else pieces.encode("xab")[len(pieces.encode("x")) :]
    assert tokenizer("</s>ab")["input_ids"][0].tolist() == [1, 2, *inside]


@pytest.mark.parametrize("legacy", [False, True])
def test_what_was_typed_stays_text(tmp_path: Path, legacy: bool) -> None:
    template = (
        "{% for m in messages %}{{ bos_token + m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    folder = spm_folder(tmp_path, {"legacy": legacy, "chat_template": template})
    tokenizer = Tokenizer.from_folder(folder)
    said = [{"role": "user", "content": "a big </s> cat"}, {"role": "assistant", "content": "yes"}]
    ids = tokenizer.apply_chat_template(said)["input_ids"][0].tolist()
    assert ids.count(2) == 2 and ids.count(1) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "user:abig</s>catassistant:yes"
    honest = [{"role": "user", "content": "a big cat"}, {"role": "assistant", "content": "yes"}]
    text = tokenizer.apply_chat_template(honest, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"].tolist()
    assert tokenizer.apply_chat_template(honest)["input_ids"].tolist() == whole


def test_saved_as_a_tokenizer_json(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    tokenizer = Tokenizer.from_folder(spm_folder(tmp_path / "in", {}))
    tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = Tokenizer.from_folder(tmp_path / "out")
    for text in HARD:
        assert again(text)["input_ids"].tolist() == tokenizer(text)["input_ids"].tolist()


def test_added_tokens_beyond_the_model(tmp_path: Path) -> None:
    size = len(sentencepiece.SentencePieceProcessor(model_proto=spm_model()))
    folder = spm_folder(tmp_path, {"pad_token": "<pad>"})
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (size, size + 1)
    assert tokenizer("<pad>")["input_ids"][0].tolist() == [1, size]


def test_models_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="tokenizer.model: not a sentencepiece model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="it has no pieces"):
        Tokenizer.from_folder(tmp_path)
    spm_folder(tmp_path, {}, model_type="unigram", byte_fallback=False, vocab_size=100)
    with pytest.raises(CheckpointError, match="not of the kind BPE; write the folder's tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def test_pieces_of_another_class_are_not_read_as_siglips(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(spm_model())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(CheckpointError, match="spiece.model: read for SiglipTokenizer, not for T5Tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_pairs_are_read_as_their_class_does(tmp_path: Path) -> None:
    folder = byte_pair_folder(tmp_path, {"add_bos_token": True}, "opt", ("<|endoftext|>",))
    processor = Processor.from_folder(folder)
    assert processor is not None and processor.tokenizer is not None
    ids = processor.tokenizer("A  Cat")["input_ids"][0].tolist()
    assert ids[0] == 0
    # Neither lower-cased nor stripped of spaces, as CLIP's would be.
    assert processor.tokenizer.decode(ids[1:]) == "A  Cat"
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BartTokenizer"}')
    with pytest.raises(CheckpointError, match="vocab.json: read for .*GPT2.*, not for BartTokenizer"):
        Tokenizer.from_folder(folder)


CHAT = ("<|im_start|>", "<|im_end|>")


def test_pieces_that_were_unused_have_become_tokens(tmp_path: Path) -> None:
    """InternLM2's chat tokens: the model has names for them that nobody writes."""
    spare = ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")
    config: dict = {**INTERNLM, "eos_token": "<|im_end|>"}
    folder = spm_folder(tmp_path, config, "internlm2", user_defined_symbols=spare)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spm_model(user_defined_symbols=spare))
    ids = [pieces.piece_to_id(name) for name in spare]
    decoder = {str(n): {"content": token, "special": True} for n, token in zip(ids, CHAT, strict=True)}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": decoder}))
    tokenizer = Tokenizer.from_folder(folder)
    assert [tokenizer.token_to_id(token) for token in CHAT] == ids
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (ids[1], len(pieces))
    assert tokenizer("<|im_start|>a<|im_end|>")["input_ids"][0].tolist()[1::2] == ids


def test_ids_that_cannot_be_given_are_refused(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"900": {"content": "<far>", "special": True}}}
    with pytest.raises(CheckpointError, match="'<far>' has id 900 there and .* in the vocabulary"):
        Tokenizer.from_folder(spm_folder(tmp_path, config))


def test_what_a_trainer_kept_whole_is_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(spm_folder(tmp_path, {}, user_defined_symbols=(*CHAT, "<mask>")))
    for token in (*CHAT, "<mask>"):
        ids = tokenizer(f"a{token} b", add_special_tokens=False)["input_ids"][0].tolist()
        assert tokenizer.token_to_id(token) in ids


def test_the_end_may_be_a_token_that_was_added(tmp_path: Path) -> None:
    folder = spm_folder(tmp_path, {})
    size = len(sentencepiece.SentencePieceProcessor(model_proto=spm_model()))
    decoder = {str(size): {"content": "<|im_end|>", "special": True}}
    config = {"add_eos_token": True, "eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(folder)("a")["input_ids"][0].tolist()[-1] == size


def test_damaged_models_are_one_line(tmp_path: Path) -> None:
    whole = spm_model(normalization_rule_name="nfkc")
    for at in range(0, len(whole), 41):
        (tmp_path / "tokenizer.model").write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(INTERNLM))
        try:
            Tokenizer.from_folder(tmp_path)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_the_class_says_which_vocabulary_is_meant(tmp_path: Path) -> None:
    byte_pair_folder(tmp_path, {}, "llama", ("<|endoftext|>",))
    spm_folder(tmp_path, {"tokenizer_class": "LlamaTokenizer"})
    assert Tokenizer.from_folder(tmp_path).eos_token == "</s>"
