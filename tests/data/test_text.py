"""Text and conversations as packed rows: every token once, segments apart, places to go back to."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmjax.data import ChatData, TextData
from mmjax.data.packing import cut_into_rows, fit_into_rows
from mmjax.errors import ConfigError, DataError
from mmjax.language import train_bpe_tokenizer
from mmjax.models import Processor

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
PROCESSOR = Processor(
    tokenizer=train_bpe_tokenizer(["the cat sat on the mat"], 264, eos_token="</s>", chat_template=TEMPLATE)
)
END = PROCESSOR.tokenizer.eos_token_id


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for number in range(7):
        words = "the cat sat on the mat " * (1 + number)
        (tmp_path / f"{number}.txt").write_text(f"{number}: {words}é", encoding="utf-8")
    (tmp_path / "notes.csv").write_text("not read")
    return tmp_path


def build(data: Any, **options: Any) -> Any:
    return data.build(**{"processor": PROCESSOR, "batch_size": 4, "seed": 0, **options})


def take(batches: Any, number: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(batches, number))


@pytest.mark.parametrize("arrange", [cut_into_rows, fit_into_rows])
def test_rows_hold_every_token_once(arrange):
    lengths = np.random.default_rng(0).integers(0, 30, 200).tolist()
    rows = arrange(lengths, 16)
    kept = [min(n, 16) if arrange is fit_into_rows else n for n in lengths]
    seen = [(d, t) for row in rows for d, begin, end in row for t in range(begin, end)]
    assert sorted(seen) == [(d, t) for d, length in enumerate(kept) for t in range(length)]
    sizes = [sum(end - begin for _, begin, end in row) for row in rows]
    assert max(sizes) <= 16 and min(sizes) >= 1
    if arrange is cut_into_rows:
        assert set(sizes[:-1]) == {16}
    else:
        assert sum(sizes) / (16 * len(rows)) > 0.97
        assert all(begin == 0 and end == kept[d] for row in rows for d, begin, end in row)


def test_a_batch_is_documents_one_after_another(texts):
    data = TextData(path=str(texts), sequence_length=20)
    dataset = build(data)
    documents = {}
    rows = {int(i): (b, k) for b in take(dataset, 40) for k, i in enumerate(b["ids"])}
    assert sorted(rows) == list(range(dataset.samples))
    stream: list[int] = []
    for row in range(dataset.samples):
        batch, k = rows[row]
        ids, mask, segments = batch["input_ids"][k], batch["attention_mask"][k] != 0, batch["segment_ids"][k]
        stream += ids[mask].tolist()
        assert (segments[mask] > 0).all() and (segments[~mask] == 0).all()
        assert (batch["labels"][k][~mask] == -100).all() and (ids[~mask] == END).all()
        for segment in range(1, segments.max() + 1):
            (inside,) = np.nonzero(segments == segment)
            np.testing.assert_array_equal(batch["position_ids"][k][inside], np.arange(len(inside)))
            assert batch["labels"][k][inside[0]] == -100
            np.testing.assert_array_equal(batch["labels"][k][inside[1:]], ids[inside[1:]])
            # A segment ends where a document ends, or the row.
            assert ids[inside[-1]] == END or inside[-1] == mask.sum() - 1
    for number in range(7):
        documents[number] = (texts / f"{number}.txt").read_text(encoding="utf-8")
    text = PROCESSOR.tokenizer.decode(stream)
    assert text == "".join(f"{documents[number]}</s>" for number in range(7))


def test_each_epoch_has_its_order_and_every_row(texts):
    data = TextData(path=str(texts), sequence_length=8)
    dataset = build(data, batch_size=1)
    order = [int(batch["ids"][0]) for batch in take(dataset, 2 * dataset.samples)]
    first, second = order[: dataset.samples], order[dataset.samples :]
    assert sorted(first) == sorted(second) == list(range(dataset.samples)) and first != second
    other = take(build(data, batch_size=1, seed=1), dataset.samples)
    assert [int(batch["ids"][0]) for batch in other] != first


def same(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_saved_place_goes_on_bitwise_and_processes_share_a_batch(texts):
    data = TextData(path=str(texts), sequence_length=12)
    whole = take(build(data), 9)
    batches = iter(build(data))
    same(take(batches, 4), whole[:4])
    state = json.loads(json.dumps(batches.get_state()))
    again = iter(build(data))
    again.set_state(state)
    same(take(again, 5), whole[4:])
    parts = [take(build(data, process_index=k, process_count=2), 9) for k in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)]
    same(joined, whole)
    (texts / "0.txt").write_text("changed")
    with pytest.raises(DataError, match="belongs to other data: source was"):
        iter(build(data)).set_state(state)


def test_what_is_broken_is_counted_by_cause(texts):
    (texts / "8.txt").write_bytes(b"caf\xe9")
    (texts / "9.txt").write_bytes(b" \n")
    data = TextData(path=str(texts), sequence_length=12, max_fault_share=0.3)
    batches = iter(build(data))
    assert batches.tally.counts == {"bad_record": 1, "empty": 1} and batches.tally.seen == 9
    assert "8.txt" in batches.tally.summary()
    batches.check_faults()
    with pytest.raises(DataError, match=r"2 of 9 samples .*bad_record 1.*max_fault_share=0.05"):
        build(TextData(path=str(texts)))
    with pytest.raises(DataError, match="no document can be used"):
        build(TextData(path=str(texts / "9.txt")))


def test_documents_inside_a_file_and_files_by_name(texts):
    (texts / "many.md").write_text("one\n\ntwo\n\n\n\nthree", encoding="utf-8-sig")
    data = TextData(path=f"{texts}/many.md::{texts}/{{0..1}}.txt", split_on="\n\n", sequence_length=8)
    assert list(data.texts())[:3] == ["one", "two", "three"]
    assert len(list(data.texts())) == 5
    assert len(list(TextData(path=f"{texts}/*.txt").texts())) == 7


def line(row: Any) -> str:
    return json.dumps(row) + "\n"


CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat </s> on"}]
LLAVA = [{"from": "human", "value": "the mat"}, {"from": "gpt", "value": "sat"}]


def test_only_answers_are_learned(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        line({"messages": CHAT}) + "\n" + line({"conversations": LLAVA}) + line({"text": "plain"})
    )
    dataset = build(ChatData(path=str(path), sequence_length=128), batch_size=1)
    assert dataset.samples == 1
    (batch,) = take(dataset, 1)
    tokenizer, ids, labels = PROCESSOR.tokenizer, batch["input_ids"][0], batch["labels"][0]
    segments = batch["segment_ids"][0]
    found = {}
    for segment in range(1, segments.max() + 1):
        inside = segments == segment
        learned = inside & (labels != -100)
        found[tokenizer.decode(ids[inside])] = tokenizer.decode(ids[learned])
    assert found == {
        "<user>the cat</s><assistant>sat </s> on</s>": "sat </s> on</s>",
        "<user>the mat</s><assistant>sat</s>": "sat</s>",
        "plain</s>": tokenizer.decode(tokenizer("plain")["input_ids"][0][1:]) + "</s>",
    }
    # What was typed is no end token: there is one for each message and text.
    assert (ids[batch["attention_mask"][0] != 0] == END).sum() == 5


def test_lines_that_cannot_be_used_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = [
        "{",
        "[]",
        '{"x": 1}',
        '{"messages": 3}',
        '{"messages": []}',
        json.dumps({"messages": CHAT[:1]}),
        '{"conversations": [{"from": "cat", "value": "x"}]}',
        '{"messages": [{"content": "x"}]}',
        '{"text": " "}',
    ]
    path.write_text("\n".join(bad) + "\n" + line({"messages": CHAT}))
    batches = iter(build(ChatData(path=str(path), max_fault_share=1.0)))
    assert batches.tally.counts == {"bad_record": len(bad) - 1, "empty": 1}
    assert batches.tally.seen == len(bad) + 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TextData(path="x", sequence_length=1), "sequence_length=1 has to be at least 2"),
        (lambda: TextData(path="x", split_on=""), "split_on is empty"),
        (lambda: TextData(path="x", max_fault_share=2.0), "max_fault_share=2.0"),
        (lambda: build(TextData(path="")), "TextData.path is empty: name files or folders"),
        (lambda: build(TextData(path="/nowhere/*.txt")), "'/nowhere/.*' is no file, and no folder with .txt"),
        (lambda: build(TextData(path="x"), split="test"), "no test split: set test_path"),
        (lambda: build(ChatData(path="x"), processor=Processor()), "need a processor with a tokenizer"),
        (
            lambda: build(ChatData(path="x"), processor=Processor(tokenizer=train_bpe_tokenizer(["a"], 257))),
            "needs a tokenizer with a chat template",
        ),
        (
            lambda: build(TextData(path=__file__), batch_size=3, process_count=2),
            "multiple of process_count=2",
        ),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises((ConfigError, DataError), match=words):
        make()
