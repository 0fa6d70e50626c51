"""Tokenizer: ids from golden files, every kind of folder, purity, bad input."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmjax.errors import CheckpointError, ConfigError, DataError
from mmjax.language.learned import train_bpe_tokenizer
from mmjax.language.tokenizer import Tokenizer, train_clip_tokenizer
from tests.golden.make_processor_golden import CALLS, CORPUS, TEXTS, TOKENIZER, TOKENS

GOLDEN = json.loads(TOKENS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TOKENIZER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))


def assert_same(ours: dict[str, np.ndarray], other: dict[str, Any]) -> None:
    assert set(ours) == set(other)
    for name, array in ours.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, other[name])


def write(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def as_old_clip_folder(folder: Path) -> None:
    """Only vocab.json and merges.txt, as the first CLIP folders had them."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    write(folder / "vocab.json", model["vocab"])
    write(folder / "merges.txt", "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_ids_equal_the_reference(tokenizer: Tokenizer, number: int) -> None:
    assert_same(tokenizer(TEXTS, **CALLS[number]), GOLDEN["calls"][number])


@pytest.mark.parametrize("skip", [False, True])
def test_decoding_equals_the_reference(tokenizer: Tokenizer, skip: bool) -> None:
    ids = np.array(GOLDEN["calls"][0]["input_ids"])
    assert tokenizer.batch_decode(ids, skip_special_tokens=skip) == GOLDEN["decoded"][str(skip)]


def test_what_the_folder_says(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|startoftext|>", 558)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 559)
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 559
    assert tokenizer.mask_token is None and tokenizer.mask_token_id is None
    assert (tokenizer.vocab_size, tokenizer.model_max_length, tokenizer.padding_side) == (560, 16, "right")
    assert tokenizer.token_to_id("the</w>") is not None and tokenizer.token_to_id("nonesuch") is None


def test_one_text_is_a_batch_of_one(tokenizer: Tokenizer) -> None:
    assert_same(tokenizer("a red cat"), tokenizer(["a red cat"]))


def test_calls_leave_nothing_behind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = tokenizer(["one"])
    for call in CALLS:
        tokenizer(TEXTS, **call)
        tokenizer.decode([1, 2, 3])
        assert_same(tokenizer(["one"]), plain)
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["padding"] is None and saved["truncation"] is None


def test_max_length_alone_truncates_and_a_batch_of_long_texts_stays(tokenizer: Tokenizer) -> None:
    assert tokenizer(["a " * 30], max_length=5)["input_ids"].shape == (1, 5)
    assert tokenizer(["a " * 30], padding="max_length")["input_ids"].shape == (1, 32)
    assert tokenizer(["a " * 30], max_length=2)["input_ids"].tolist() == [[558, 559]]


def test_saving_and_pickling_keep_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    for copy in (Tokenizer.from_folder(tmp_path / "new" / "folder"), pickle.loads(pickle.dumps(tokenizer))):
        for call in CALLS:
            assert_same(copy(TEXTS, **call), tokenizer(TEXTS, **call))


def test_saving_over_another_tokenizer_leaves_none_of_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("special_tokens_map.json", "added_tokens.json"):
        write(tmp_path / name, {"pad_token": "a"} if name.startswith("special") else {"zebra": 7000})
    write(tmp_path / "spiece.model", "old")
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert_same(Tokenizer.from_folder(tmp_path)(TEXTS, padding=True), tokenizer(TEXTS, padding=True))


def test_old_clip_folder(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    as_old_clip_folder(folder)
    old = Tokenizer.from_folder(folder)
    old.save(tmp_path / "saved")
    for opened in (old, Tokenizer.from_folder(tmp_path / "saved")):
        assert_same(opened(TEXTS, padding=True), tokenizer(TEXTS, padding=True))


def test_sides_lengths_and_outputs_come_from_the_configuration(folder: Path) -> None:
    config = {"padding_side": "left", "truncation_side": "left", "model_max_length": 6, "pad_token": "!"}
    write(folder / "tokenizer_config.json", {**config, "model_input_names": ["input_ids"]})
    tokenizer = Tokenizer.from_folder(folder, tokenizer_class="CLIPTokenizer")
    batch = tokenizer(["a red cat number one zero", "a"], padding=True, truncation=True)
    assert set(batch) == {"input_ids"}
    long, short = batch["input_ids"]
    assert tokenizer.decode(long, skip_special_tokens=True) == "number one zero"
    assert short.tolist()[:3] == [0, 0, 0] and short.tolist()[-1] == 559
    masked = tokenizer(["a", "a red cat"], padding=True, return_attention_mask=True)["attention_mask"]
    assert masked.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_padding_kept_in_tokenizer_json_counts_where_the_configuration_is_silent(folder: Path) -> None:
    body = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    body["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
    body["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    body["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    write(folder / "tokenizer.json", body)
    write(folder / "tokenizer_config.json", {})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token) == ("left", "left", "!")
    assert tokenizer(["a red cat number"])["input_ids"].shape == (1, 6)


def test_special_tokens_of_older_files(folder: Path) -> None:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizerFast"})
    write(folder / "special_tokens_map.json", {"pad_token": {"content": "<pad>", **flags}})
    write(folder / "added_tokens.json", {"<pad>": 560, "zebra": 561})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (560, 562)
    assert tokenizer("a zebra")["input_ids"].tolist() == [[558, tokenizer.token_to_id("a</w>"), 561, 559]]


def test_extra_special_tokens_are_added(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(
        folder / "tokenizer_config.json",
        {**config, "extra_special_tokens": ["<image>"], "box_token": "<box>"},
    )
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer("<box><image>")["input_ids"]
    assert ids.tolist() == [[558, 560, 561, 559]]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == ""


def test_special_tokens_can_be_left_as_text(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(folder / "tokenizer_config.json", {**config, "split_special_tokens": True})
    assert 559 not in Tokenizer.from_folder(folder)("<|endoftext|>")["input_ids"][0, 1:-1]


def test_no_limit_is_none(folder: Path) -> None:
    write(
        folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": int(1e30)}
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.model_max_length is None
    assert tokenizer(["a " * 200], truncation=True)["input_ids"].shape == (1, 202)
    with pytest.raises(DataError, match="needs max_length"):
        tokenizer(["a"], padding="max_length")


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (["a", "a red cat"], {}, "pass padding=True"),
        (["a", "a " * 99], {"padding": "max_length"}, "pass truncation=True"),
        ([], {}, "no texts"),
        (["a", None], {}, "text 1 is a NoneType"),
        ([b"a"], {}, "text 0 is a bytes"),
        (["ok", "\ud800"], {}, "text 1 has half a surrogate"),
        (["a"], {"padding": "shortest"}, "padding"),
        (["a"], {"truncation": "only_first"}, "truncation"),
        (["a b c"], {"truncation": True, "max_length": 1}, "leaves no room"),
        (["a b c"], {"truncation": True, "max_length": 0, "add_special_tokens": False}, "leaves no room"),
        (["a"], {"padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 8}, "multiple"),
    ],
)
def test_texts_that_cannot_be_tokenized(
    tokenizer: Tokenizer, texts: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        tokenizer(texts, **options)
    assert "\n" not in str(caught.value)


def test_other_bad_calls(tokenizer: Tokenizer, folder: Path) -> None:
    with pytest.raises(ConfigError, match="padding_side"):
        tokenizer(["a"], padding_side="top")
    for ids in ([560], [-1]):
        with pytest.raises(DataError, match="outside the vocabulary of 560"):
            tokenizer.decode(ids)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "pad_token": None})
    with pytest.raises(DataError, match="no pad_token"):
        Tokenizer.from_folder(folder)(["a"], padding=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer file"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer file"),
        ("tokenizer_config.json", "{'a': 1}", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", '{"pad_token": {"id": 3}}', "special token in it has no text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": "x"}}', "special token in it has no text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "special token in it has no text"),
        ("tokenizer_config.json", '{"padding_side": "top"}', "padding_side"),
        ("tokenizer_config.json", '{"model_max_length": "long"}', "model_max_length"),
        ("special_tokens_map.json", "nul", "special_tokens_map.json: not valid JSON"),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, content: str, words: str) -> None:
    write(folder / name, content)
    with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_damaged_old_folders_are_named(folder: Path) -> None:
    as_old_clip_folder(folder)
    merges = (folder / "merges.txt").read_text(encoding="utf-8")
    for content in ("a b c\n", "zebra stripes\n"):
        write(folder / "merges.txt", merges + content)
        with pytest.raises(CheckpointError, match="merges.txt does not fit vocab.json"):
            Tokenizer.from_folder(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer in this folder"):
        Tokenizer.from_folder(folder)


def test_training_lays_the_vocabulary_out_as_clip_does() -> None:
    tokenizer = train_clip_tokenizer(CORPUS, vocab_size=530, max_length=9)
    assert (tokenizer.vocab_size, tokenizer.model_max_length) == (530, 9)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (528, 529)
    assert (tokenizer.token_to_id("!"), tokenizer.token_to_id("!</w>")) == (0, 256)
    text = "never seen \U0001f389 日本 ω"
    assert tokenizer.decode(tokenizer(text)["input_ids"][0], skip_special_tokens=True) == text


def test_training_stops_where_nothing_is_left_and_refuses_less_than_bytes() -> None:
    assert train_clip_tokenizer(["ab"], vocab_size=9999).vocab_size == 515
    assert train_clip_tokenizer([], vocab_size=514).vocab_size == 514
    with pytest.raises(ConfigError, match="vocab_size: .*514"):
        train_clip_tokenizer(CORPUS, vocab_size=513)


def test_training_gives_the_same_vocabulary_in_every_process(tmp_path: Path) -> None:
    ties = " ".join(a + b for a in "abcdefgh" for b in "stuvwxyz")
    program = (
        "import sys; from mmjax.language.tokenizer import train_clip_tokenizer as train; "
        f"train([{ties!r}], vocab_size=540).save(sys.argv[1])"
    )
    folders = [tmp_path / str(number) for number in range(2)]
    for each in folders:
        subprocess.run([sys.executable, "-c", program, str(each)], check=True)
    files = [(each / "tokenizer.json").read_bytes() for each in folders]
    assert files[0] == files[1]


def test_special_tokens_can_be_added(tmp_path):
    made = train_bpe_tokenizer(["a cat"], 260, chat_template="{{ messages[0].content }}")
    more = made.with_special_tokens(["<image>", "<|endoftext|>"])
    assert more.token_to_id("<image>") == made.vocab_size == more.vocab_size - 1
    assert made.token_to_id("<image>") is None and more.chat_template == made.chat_template
    ids = more("a<image>cat")["input_ids"]
    assert (ids == made.vocab_size).sum() == 1
    more.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    np.testing.assert_array_equal(again("a<image>cat")["input_ids"], ids)
    assert again.with_special_tokens(["<box>"]).token_to_id("<box>") == more.vocab_size
    # A special token that is typed in a message stays text.
    typed = more.apply_chat_template([{"role": "user", "content": "<image>"}])["input_ids"]
    assert not (typed == made.vocab_size).any()
