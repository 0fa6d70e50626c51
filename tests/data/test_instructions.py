"""Conversations about images: checked rows, counted faults, rows of tokens that keep their own images."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmjax.data.faults import BadSample
from mmjax.data.features import FeatureStore, write_features
from mmjax.data.instruction_layout import expand
from mmjax.data.instruction_rows import parse_row
from mmjax.data.instructions import InstructionData
from mmjax.errors import ConfigError, DataError
from mmjax.models import Processor
from tests.data.seeing import (
    ONE_TILE,
    POOLED,
    TILES,
    TOKENIZER,
    Seeing,
    colour,
    row,
    write_images,
    write_rows,
)

ASK, ANSWER = "<image>\nwhat is this?", "a red cat."
KINDS = {"llava": ONE_TILE, "llava_next": TILES, "llava_onevision": POOLED}
IMAGE = Seeing().image_token_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = [(8, 8), (16, 9), (9, 21), (30, 10), (5, 5)]
    names = write_images(tmp_path / "images", sizes)
    rows = [row(name, ASK, ANSWER, "and that?", "no" * n) for n, name in enumerate(names, start=1)]
    rows += [row(names[:2], "<image><image>\nthe mat?", "sat."), row(None, "what?", "the dog, the dog.")]
    write_rows(tmp_path / "rows.json", rows)
    return tmp_path


def data_of(folder: Path, **options: Any) -> InstructionData:
    plain = {"path": str(folder / "rows.json"), "images": str(folder / "images"), "sequence_length": 192}
    return InstructionData(**{**plain, "template": "chatml", "num_threads": 0, **options})


def build(data: InstructionData, kind: str = "llava", **options: Any) -> Any:
    return data.build(**{"processor": Seeing(KINDS[kind]), "batch_size": 2, "seed": 0, **options})


def take(batches: Any, number: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(batches, number))


def same(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def alone(data: InstructionData, kind: str) -> dict[tuple[int, ...], dict[str, np.ndarray]]:
    """Every conversation by itself, as the processor gives it, by its ids."""
    source = data.conversations(Seeing(KINDS[kind]))
    found = {}
    for number, entry in enumerate(source.entries):
        talk = parse_row(entry.data, entry.name)
        sample = source.processor.encode(talk.messages, source.images(number) or None)
        found[tuple(sample["input_ids"].tolist())] = sample
    return found


def features_of(tiles: np.ndarray, rows: int) -> np.ndarray:
    """A stand-in for eyes: [n, ..., H, W, C] to [n * rows, 1], each feature another number."""
    means = tiles.reshape(len(tiles), -1).mean(1, dtype=np.float64)
    return (means[:, None] * 100 + np.arange(rows)).reshape(-1)


@pytest.mark.parametrize("arrange", ["pack", "group"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_conversations_with_their_own_images(folder, kind, arrange):
    data = data_of(folder, arrange=arrange)
    batches, single = build(data, kind), alone(data, kind)
    rows = KINDS[kind].rows
    seen: dict[tuple[int, ...], int] = {}
    epoch = int(np.ceil(batches.steps_per_epoch))
    for batch in take(batches, epoch):
        for k in range(2):
            segments, ids = batch["segment_ids"][k], batch["input_ids"][k]
            assert (batch["attention_mask"][k] == (segments > 0)).all()
            table = features_of(batch["tiles"][k], rows) if "tiles" in batch else np.zeros(0)
            for segment in range(1, segments.max() + 1):
                (inside,) = np.nonzero(segments == segment)
                sample = single[tuple(ids[inside].tolist())]
                seen[tuple(ids[inside].tolist())] = 1
                np.testing.assert_array_equal(batch["position_ids"][k][inside], np.arange(len(inside)))
                wanted = np.where(sample["assistant_masks"], sample["input_ids"], -100)
                np.testing.assert_array_equal(batch["labels"][k][inside], wanted)
                if "pixel_values" not in sample:
                    assert "image_index" not in batch or (batch["image_index"][k][inside] == -1).all()
                    continue
                # Each token is made of the same features as in the conversation alone.
                own = features_of(sample["pixel_values"].reshape(-1, 8, 8, 3), rows)
                ours = np.append(table, [7.0, 0.0])  # the end of a row, and nothing
                theirs = np.append(own, [7.0, 0.0])
                index = batch["image_index"][k][inside]
                index = np.where(index == -1, len(table) + 1, np.where(index == -2, len(table), index))
                expected = np.where(sample["image_index"] == -1, len(own) + 1, sample["image_index"])
                np.testing.assert_allclose(ours[index], theirs[expected], rtol=1e-6)
                if kind == "llava_onevision":
                    np.testing.assert_array_equal(batch["image_weights"][k][inside], sample["image_weights"])
    assert len(seen) == len(single) == 7


def test_an_epoch_has_every_conversation_and_few_shapes(folder):
    for arrange in ("pack", "group"):
        batches = build(data_of(folder, arrange=arrange, sequence_length=256), "llava_next")
        made = take(batches, 3 * batches.samples)
        ids = np.concatenate([batch["ids"] for batch in made])
        epochs = ids[: 6 * batches.samples].reshape(6, batches.samples)
        assert all(sorted(epoch) == list(range(batches.samples)) for epoch in epochs.tolist())
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
        shapes = {tuple(sorted((n, x.shape) for n, x in batch.items())) for batch in made}
        assert len(shapes) == 1 if arrange == "pack" else 1 < len(shapes) <= 8
        lengths = batches.lengths
        assert all(batch["attention_mask"].sum(1).max() <= batch["input_ids"].shape[1] for batch in made)
        if arrange == "pack":
            packed = [sum(lengths[row]) for row in batches.order.rows]
            assert max(packed) <= 256 and len(packed) < 7


def test_tiles_of_a_row_have_a_limit(folder):
    batches = build(data_of(folder, sequence_length=512, tiles_per_row=2))
    assert max(int(batches.tiles[row].sum()) for row in batches.order.rows) == 2
    assert take(batches, 1)[0]["tiles"].shape == (2, 2, 8, 8, 3)
    roomy = build(data_of(folder, sequence_length=512, tiles_per_row=50))
    fullest = max(int(roomy.tiles[row].sum()) for row in roomy.order.rows)
    assert fullest < 50
    assert take(roomy, 1)[0]["tiles"].shape == (2, 50, 8, 8, 3)


def test_threads_processes_and_saved_places_give_the_same_batches(folder):
    data = data_of(folder, arrange="group")
    whole = take(build(data, "llava_next"), 7)
    threaded = iter(build(data_of(folder, arrange="group", num_threads=3), "llava_next"))
    same(take(threaded, 4), whole[:4])
    state = json.loads(json.dumps(threaded.get_state()))
    threaded.close()
    again = iter(build(data, "llava_next"))
    again.set_state(state)
    same(take(again, 3), whole[4:])
    parts = [take(build(data, "llava_next", process_index=k, process_count=2), 7) for k in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)]
    same(joined, whole)
    same([build(data, "llava_next").batch(3)], [whole[3]])
    with pytest.raises(DataError, match="belongs to other data: arrange was"):
        iter(build(data_of(folder), "llava_next")).set_state(state)


def test_a_long_conversation_is_cut_and_one_without_an_answer_in_reach_left_out(folder):
    write_rows(folder / "rows.json", [row("0.png", ASK, ANSWER * 20), row("1.png", ASK + " that" * 50, "a")])
    batches = iter(build(data_of(folder, sequence_length=80, max_fault_share=0.5)))
    assert batches.tally.counts == {"bad_record": 1}
    assert "row 2 (bad_record)" in batches.tally.summary()
    batch = next(batches)
    assert (batch["attention_mask"] == 1).all() and (batch["labels"][:, -1] != -100).all()


BAD = {
    "no_image": [
        row(None, ASK, ANSWER),
        row("0.png", "<image> and <image>", ANSWER),
        row([], ASK, ANSWER),
    ],
    "unplaced_image": [row("0.png", "what?", ANSWER), row(["0.png", "1.png"], ASK, ANSWER)],
    "missing_file": [row("none.png", ASK, ANSWER)],
    "unsafe_path": [row("../rows.json", ASK, ANSWER), row("/etc/passwd", ASK, ANSWER)],
    "empty": [row(None, "what?"), row(None), row("blank.png", ASK, ANSWER)],
    "bad_record": [
        [],
        {"id": 1},
        row(3, ASK, ANSWER),
        row(None, "a", "b", "c", "d") | {"conversations": 7},
        {"conversations": [{"from": "cat", "value": "x"}]},
        {"conversations": [{"from": "human"}]},
        {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "c"},
            ]
        },
        row(None, "a", "b") | {"video": "a.mp4"},
    ],
    "not_an_image": [row("text.png", ASK, ANSWER)],
    "truncated": [row("cut.png", ASK, ANSWER)],
}


def spoil(images: Path) -> None:
    (images / "blank.png").write_bytes(b"")
    (images / "text.png").write_text("no image at all, only words")
    (images / "cut.png").write_bytes((images / "3.png").read_bytes()[:20])


def test_what_is_wrong_with_rows_is_counted_by_cause(folder):
    spoil(folder / "images")
    bad = [each for rows in BAD.values() for each in rows]
    good = row("0.png", ASK, ANSWER)
    write_rows(folder / "rows.jsonl", [*bad, good])
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"broken\n')
    data = data_of(folder, path=str(folder / "rows.jsonl"), max_fault_share=1.0)
    batches = iter(build(data, "llava_next"))
    wanted = {cause: len(rows) for cause, rows in BAD.items()}
    assert batches.tally.counts == wanted | {"bad_record": wanted["bad_record"] + 1}
    assert batches.tally.seen == len(bad) + 2 and "rows.jsonl, line 1 (no_image)" in batches.tally.summary()
    with pytest.raises(DataError, match=r"rows broken|samples .* broken: .*max_fault_share=0.05"):
        build(data_of(folder, path=str(folder / "rows.jsonl")))


def test_images_that_do_not_match_can_stop_a_run(folder):
    write_rows(folder / "rows.json", [row("0.png", ASK, ANSWER), row("0.png", "what?", ANSWER)])
    words = r"rows.json, row 2: unplaced_image \(0 places for images, 1 images\); mismatch='skip'"
    with pytest.raises(DataError, match=words):
        build(data_of(folder, mismatch="refuse"))
    assert iter(build(data_of(folder, max_fault_share=0.5))).tally.counts == {"unplaced_image": 1}


def test_images_that_break_later_are_replaced_by_conversations_that_fit(folder):
    rows = [row(f"{n}.png", ASK, ANSWER) for n in (0, 1, 4)]
    write_rows(folder / "rows.json", rows)
    whole = (folder / "images" / "1.png").read_bytes()
    for arrange in ("pack", "group"):
        (folder / "images" / "1.png").write_bytes(whole[:-30])
        iterator = iter(build(data_of(folder, arrange=arrange, max_fault_share=1.0), batch_size=1))
        made = take(iterator, iterator.dataset.samples)
        assert (
            iterator.tally.counts == {"truncated": 1}
            and "row 2: 1.png (truncated" in iterator.tally.summary()
        )
        pixels = {float(tile.mean()) for batch in made for tile in batch["tiles"][0] if tile.any()}
        assert pixels == {float(np.float32(np.mean(colour(n)) + 1)) for n in (0, 4)}
        assert sum((batch["labels"] != -100).sum() for batch in made) % 3 == 0
        # The same place holds the same, however it is come to.
        same([iterator.dataset.batch(number) for number in range(len(made))], made)
        (folder / "images" / "1.png").write_bytes(whole)
    for number in (0, 1, 4):
        (folder / "images" / f"{number}.png").write_bytes(b"gone")
    iterator = iter(build(data_of(folder, max_fault_share=1.0), batch_size=1))
    assert (next(iterator)["labels"] == -100).all() and iterator.tally.counts == {"not_an_image": 3}


def test_messages_place_images_by_parts_and_words_stay_words(folder):
    parts = [{"type": "text", "text": "is <image> "}, {"type": "image", "image": "1.png"}]
    chat = [{"role": "system", "content": "the mat"}, {"role": "user", "content": parts}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "<image> </s>"}]}
    write_rows(folder / "rows.jsonl", [{"messages": [*chat, answer]}])
    (batch,) = take(
        build(data_of(folder, path=str(folder / "rows.jsonl"), template="vicuna"), batch_size=1), 1
    )
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    text = TOKENIZER.decode([i for i in ids[batch["attention_mask"][0] != 0] if i != IMAGE])
    assert text == "<s>the mat USER: is <image>  ASSISTANT: <image> </s></s>"
    assert (ids == IMAGE).sum() == 4 and not (labels == IMAGE).any()
    assert TOKENIZER.decode(labels[labels != -100]).strip() == "<image> </s></s>"
    np.testing.assert_array_equal((ids == IMAGE), batch["image_index"][0, :, 0] >= 0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_in_an_answer_is_seen_and_not_learned(folder, kind):
    shown = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "a red cat"}]
    chat = [{"role": "user", "content": "draw a cat"}, {"role": "assistant", "content": shown}]
    write_rows(folder / "rows.json", [{"messages": chat}])
    data = data_of(folder, template="vicuna")
    batch = build(data, kind, batch_size=1).batch(0)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    seen = batch["image_index"][0, :, 0] != -1
    assert seen.any() and (seen == (ids == IMAGE)).all() and (labels[seen] == -100).all()
    assert TOKENIZER.decode(labels[labels != -100]).strip() == "a red cat</s>"
    # What is measured before the images are read says the same.
    source = data.conversations(Seeing(KINDS[kind]))
    turns = source.read(0)
    talk = parse_row(source.entries[0].data, "x")
    ids, learned = source.processor.conversation(talk.messages, True, {})
    layouts = source.layouts([(image.height, image.width) for image in source.images(0)])
    expanded = expand(ids, learned, IMAGE, layouts, KINDS[kind].rows)
    np.testing.assert_array_equal(expanded.learned, turns.learned)
    assert not turns.learned[turns.ids == IMAGE].any() and turns.learned.any()


@pytest.mark.parametrize("none", [None, "", []])
def test_columns_without_an_image_are_absent(none):
    def images(given, ask):
        said = row(None, ask, ANSWER)["conversations"]
        return parse_row(json.dumps({**given, "conversations": said}).encode(), "x").images

    assert images({"image": none, "images": ["a.png"]}, ASK) == ("a.png",)
    assert images({"image": "a.png", "images": none}, ASK) == ("a.png",)
    assert images({"image": none}, "what?") == images({"image": none, "images": none}, "what?") == ()
    with pytest.raises(BadSample, match="no_image"):
        images({"image": none}, ASK)


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("what?\n<image>", ["<image>", "what?"]),
        ("<image>\n<image>\nsame?", ["<image>", "<image>", "same?"]),
        ("a <image> b <image>", ["a ", "<image>", " b ", "<image>"]),
        ("<image>", ["<image>"]),
        (" no <b>image</b> ", [" no <b>image</b> "]),
    ],
)
def test_places_for_images_in_what_humans_say(said, parts):
    images = [f"{n}.png" for n in range(parts.count("<image>"))]
    talk = parse_row(json.dumps(row(images, said, "yes")).encode(), "x")
    content = talk.messages[0]["content"]
    found = [content] if isinstance(content, str) else [part.get("text", "<image>") for part in content]
    assert found == parts and talk.images == tuple(images)


def test_where_an_image_stands_can_be_kept():
    data = json.dumps(row("a.png", "what?\n<image>", "yes")).encode()
    content = parse_row(data, "x", image_first=False).messages[0]["content"]
    assert [part["type"] for part in content] == ["text", "image"]
    # A row of LLaVA's that begins with an answer loses it.
    first = {"conversations": [{"from": "gpt", "value": "hello"}, *row(None, "a", "b")["conversations"]]}
    assert [m["role"] for m in parse_row(json.dumps(first).encode(), "x").messages] == ["user", "assistant"]
    with pytest.raises(BadSample, match="row 5: bad_record .not JSON"):
        parse_row(b"\xff", "row 5")


def test_images_upright_and_in_other_folders(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 8), (9, 9, 9)).save(folder / "turned.jpg", exif=exif)
    write_rows(folder / "rows.json", [row("turned.jpg", ASK, ANSWER)])
    batches = build(data_of(folder, images=None), "llava_next", batch_size=1)
    measured, read = int(batches.lengths[0]), batches.read(0)
    assert len(read.ids) == measured and len(read.tiles) == batches.tiles[0]
    (image,) = data_of(folder, images=None).conversations(Seeing(TILES)).images(0)
    assert image.size == (8, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_features_take_the_place_of_pixels(folder, tmp_path, kind):
    data = data_of(folder, arrange="group")
    source, rows = data.conversations(Seeing(KINDS[kind])), KINDS[kind].rows

    def kept():
        found = [picture for number in range(len(source)) for picture in source.pictures(number)]
        for key, (size, tiles) in {key: rest for key, *rest in found}.items():
            yield key, size, features_of(tiles, rows).reshape(len(tiles), rows, 1)

    write_features(tmp_path / "kept", kept(), dtype="float32", identity="eyes")
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="missing_file"):
        build(data, kind)
    ready = data_of(folder, arrange="group", features=str(tmp_path / "kept"))
    batches = build(ready, kind)
    for batch in take(batches, 4):
        if "tile_features" in batch:
            assert batch["tile_features"].shape[2:] == (rows, 1) and "tiles" not in batch
            real = batch["image_index"][batch["image_index"] >= 0]
            assert real.max() < batch["tile_features"].shape[1] * rows
    store = FeatureStore(tmp_path / "kept")
    turns = batches.read(0)
    first = store.read("0.png", len(turns.tiles))
    np.testing.assert_array_equal(turns.tiles, first)
    assert np.ptp(first) >= rows - 1
    write_rows(folder / "rows.json", [row("new.png", ASK, ANSWER)])
    with pytest.raises(DataError, match="missing_file .*its features are not in"):
        build(ready, kind)


def test_damaged_features_are_named(tmp_path):
    with pytest.raises(DataError, match="no images whose features"):
        write_features(tmp_path, [])
    with pytest.raises(DataError, match="dtype='int4'"):
        write_features(tmp_path, [], dtype="int4")
    with pytest.raises(DataError, match="features.json: no features can be read"):
        FeatureStore(tmp_path)
    write_features(tmp_path, [("a", (2, 2), np.ones((1, 2, 3)))])
    store = FeatureStore(tmp_path)
    assert len(store) == 1 and "a" in store and store.size("a") == (2, 2)
    with pytest.raises(BadSample, match="1 tiles are kept, it has 2"):
        store.read("a", 2)
    (tmp_path / "features.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="features.bin: not the features"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: InstructionData(path="x", arrange="sort"), "arrange='sort'"),
        (lambda: InstructionData(path="x", mismatch="no"), "mismatch='no'"),
        (lambda: InstructionData(path="x", template="alpaca"), "'alpaca' is not known"),
        (lambda: InstructionData(path="x", sequence_length=1), "sequence_length=1"),
        (lambda: InstructionData(path="x", tiles_per_row=0), "tiles_per_row=0"),
        (lambda: InstructionData(path="x", max_fault_share=2.0), "max_fault_share=2.0"),
        (lambda: InstructionData(path="x", num_threads=-1), "num_threads must be"),
        (lambda: build(InstructionData(path="")), "path is empty: name files or folders"),
        (lambda: build(InstructionData(path="/nowhere.json")), "is no file, and no folder with .json or"),
        (lambda: build(InstructionData(path="x"), split="test"), "no test split: set test_path"),
        (
            lambda: InstructionData(path=__file__).build(
                processor=Processor(tokenizer=TOKENIZER), batch_size=1, seed=0
            ),
            "needs the processor of a model that sees",
        ),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises((ConfigError, DataError), match=words):
        make()


def test_files_and_templates_that_do_not_fit_are_named(folder):
    (folder / "rows.json").write_text("{]")
    with pytest.raises(DataError, match="rows.json: not valid JSON"):
        build(data_of(folder))
    (folder / "rows.json").write_text("{}")
    with pytest.raises(DataError, match="expected a list of rows, found dict"):
        build(data_of(folder))
    write_rows(folder / "rows.json", [row("0.png", ASK, ANSWER)])
    words = Seeing(ONE_TILE, TOKENIZER.with_chat_template("{{ messages[0].content + 'x' }}"))
    with pytest.raises(ConfigError, match="the chat template does not fit conversations about images"):
        build(data_of(folder, template=None), processor=words)
    with pytest.raises(ConfigError, match="multiple of process_count=2"):
        build(data_of(folder), batch_size=3, process_count=2)
