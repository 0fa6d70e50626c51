"""Tables of captions and folders of classes: what is read, and that nothing outside the folder ever is."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from mmjax.data import CaptionsData, ImageFolderData
from mmjax.data.faults import BadSample
from mmjax.data.files import read_file, safe_path
from mmjax.errors import ConfigError, DataError
from tests.data.fakes import fake_processor, take
from tests.data.makers import BROKEN_IMAGES, picture, png, write_table


def outcomes(config):
    """Per sample its captions, or the cause of its fault."""
    results = []
    for index in range(len(config.examples("train"))):
        try:
            example = config.examples("train")[index]
            results.append((example["name"], example["texts"]))
        except BadSample as error:
            results.append((error.name, error.cause))
    return results


def good_rows(folder, count):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
    return [(f"{number}.png", f"picture {number}") for number in range(count)]


def test_table_of_captions(tmp_path):
    path = write_table(tmp_path, good_rows(tmp_path, 6))
    config = CaptionsData(path=path, num_threads=0, crop_scale=None)
    assert outcomes(config) == [(f"{i}.png", (f"picture {i}",)) for i in range(6)]
    batches = take(iter(config.build(processor=fake_processor(), batch_size=3, seed=0)), 4)
    ids = np.concatenate([batch["ids"] for batch in batches])
    assert sorted(ids[:6].tolist()) == sorted(ids[6:].tolist()) == list(range(6))
    for batch in batches:
        assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "faults", "ids"}
        for row, number in enumerate(batch["ids"]):
            pixels = fake_processor().image_processor([picture(int(number))])["pixel_values"][0]
            np.testing.assert_array_equal(batch["pixel_values"][row], pixels)
            assert chr(batch["input_ids"][row][8]) == str(number)


def test_columns_separator_root_and_encoding(tmp_path):
    good_rows(tmp_path / "images", 2)
    table = tmp_path / "tables" / "list.csv"
    table.parent.mkdir()
    table.write_bytes('\ufeffid,"alt",url\n7,"a, ""b""\nc",0.png\n\n8,caf\u00e9,1.png\n'.encode())
    config = CaptionsData(
        path=str(table), root=str(tmp_path / "images"), img_key="url", caption_key="alt", separator=","
    )
    assert outcomes(config) == [("0.png", ('a, "b"\nc',)), ("1.png", ("caf\u00e9",))]
    with pytest.raises(
        DataError, match=r"list.csv: no column 'filepath'.*columns \(separator ','\): 'id', 'alt', 'url'"
    ):
        CaptionsData(path=str(table), separator=",").examples("train")


def test_a_separator_may_come_escaped_from_a_shell():
    assert CaptionsData(path="x", separator="\\t").separator == "\t"


def test_captions_of_one_image_can_be_one_sample(tmp_path):
    good_rows(tmp_path, 2)
    rows = [("1.png", "b"), ("0.png", "a"), ("1.png", "c"), ("", "lost"), ("1.png", "d")]
    config = CaptionsData(path=write_table(tmp_path, rows), group_captions=True)
    assert outcomes(config) == [("1.png", ("b", "c", "d")), ("0.png", ("a",)), ("line 5", "no_image")]


def test_broken_rows_are_counted_by_cause(tmp_path):
    rows = good_rows(tmp_path, 1)
    for cause, data in BROKEN_IMAGES.items():
        (tmp_path / f"{cause}.png").write_bytes(data)
        rows.append((f"{cause}.png", "x"))
    (tmp_path / "folder.png").mkdir()
    rows += [("gone.png", "x"), ("folder.png", "x"), ("0.png/x.png", "x"), ("0.png", "x", "extra"), ("", "x")]
    path = Path(write_table(tmp_path, rows))
    path.write_bytes(path.read_bytes() + b"0.png\tcaf\xe9\n")
    assert outcomes(CaptionsData(path=str(path))) == [
        ("0.png", ("picture 0",)),
        *((f"{cause}.png", cause) for cause in BROKEN_IMAGES),
        ("gone.png", "missing_file"),
        ("folder.png", "unreadable"),
        ("0.png/x.png", "missing_file"),
        ("0.png", "bad_record"),
        (f"line {len(rows) + 1}", "no_image"),
        ("0.png", "bad_record"),
    ]


def test_a_row_without_caption_is_a_fault_in_training_only(tmp_path):
    rows = good_rows(tmp_path, 3)
    path = Path(write_table(tmp_path, rows))
    path.write_text(path.read_text() + "0.png\n1.png\t \n")
    config = CaptionsData(path=str(path), num_threads=0, max_fault_share=0.39)
    assert [texts for _, texts in outcomes(config)][3:] == [(), ()]
    iterator = iter(config.build(processor=fake_processor(), batch_size=5, seed=0))
    next(iterator)
    assert iterator.tally.counts == {"no_caption": 2}
    with pytest.raises(DataError, match=r"2 of 5 samples \(40.0%\) broken: no_caption 2; for example "):
        iterator.check_faults()


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes need POSIX")
def test_a_pipe_does_not_hold_up_the_run(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadSample) as caught:
        read_file(tmp_path / "pipe.png", "pipe.png")
    assert caught.value.cause == "unreadable"


def test_a_file_above_the_limit_is_too_large(tmp_path):
    (tmp_path / "a").write_bytes(bytes(11))
    assert read_file(tmp_path / "a", "a", limit=11) == bytes(11)
    with pytest.raises(BadSample) as caught:
        read_file(tmp_path / "a", "a", limit=10)
    assert caught.value.cause == "too_large"


@pytest.mark.parametrize(
    "name",
    [
        "../outside.png",
        "a/../../outside.png",
        "..",
        "a\\..\\..\\outside.png",
        "/etc/passwd",
        "//host/share.png",
        "\\\\host\\share.png",
        "\\outside.png",
        "C:\\outside.png",
        "c:outside.png",
        "a\0.png",
        "link.png",
        "linked/outside.png",
        "hop/outside.png",
    ],
)
def test_names_that_leave_the_folder_are_never_opened(tmp_path, name, monkeypatch):
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(png(0))
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "hop").symlink_to("a/hop")
    (root / "a" / "hop").symlink_to("../..")
    path = write_table(root, [("x", "x")])
    config = CaptionsData(path=path)
    source = config.source()
    source.names[0] = name
    monkeypatch.setattr(os, "open", lambda *args: pytest.fail(f"opened {args}"))
    with pytest.raises(BadSample) as caught:
        source[0]
    assert caught.value.cause == "unsafe_path"


def test_links_inside_the_folder_are_followed(tmp_path):
    good_rows(tmp_path / "data", 1)
    (tmp_path / "data" / "link.png").symlink_to("0.png")
    (tmp_path / "other").symlink_to("data")
    path = safe_path(tmp_path / "other", "link.png")
    assert path == (tmp_path / "data" / "0.png").resolve() and read_file(path, "x") == png(0)


def test_unsafe_names_stop_a_run_with_a_hint(tmp_path):
    rows = [("/abs.png", "x")] * 3 + good_rows(tmp_path, 3)
    config = CaptionsData(path=write_table(tmp_path, rows), num_threads=0)
    iterator = iter(config.build(processor=fake_processor(), batch_size=6, seed=0))
    next(iterator)
    with pytest.raises(DataError, match="unsafe_path 3; .*must be relative and stay inside the data folder"):
        iterator.check_faults()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.tsv: no column 'filepath'.*: none;"),
        (b"filepath\ttitle\n", "t.tsv: the captions table has no rows"),
        (b"filepath\tcaption\na\tb\n", "no column 'title'.*'filepath', 'caption'"),
        (b"filepath\ttitle\ttitle\na\tb\tc\n", "twice column 'title'"),
        (b'filepath\ttitle\na\t"' + b"x" * 140_000, "t.tsv, line 2: .*is a quote not closed"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, "t.tsv: no column 'filepath'"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        CaptionsData(path=str(tmp_path / "t.tsv")).source()


def test_missing_table_and_split_are_refused(tmp_path):
    with pytest.raises(DataError, match="none.tsv: cannot read the captions table"):
        CaptionsData(path=str(tmp_path / "none.tsv")).source()
    with pytest.raises(ConfigError, match="set test_path"):
        CaptionsData(path="x").source("test")
    with pytest.raises(ConfigError, match="separator"):
        CaptionsData(path="x", separator="--")


def make_classes(root, **counts):
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.PNG").write_bytes(png(number))
            number += 1
    return str(root)


def test_folder_of_classes(tmp_path):
    path = make_classes(tmp_path / "train", tabby_cat=3, dog=2)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("x")
    (tmp_path / "train" / "dog" / ".hidden.png").write_text("x")
    (tmp_path / "train" / "readme.md").write_text("x")
    test_path = make_classes(tmp_path / "test", tabby_cat=1)
    config = ImageFolderData(path=path, test_path=test_path, templates=("a {}",), num_threads=0)
    assert config.class_names() == ("dog", "tabby_cat")
    examples = config.examples("train")
    assert [(e["name"], e["label"], e["text"]) for e in examples] == [
        ("dog/0.PNG", 0, "a dog"),
        ("dog/1.PNG", 0, "a dog"),
        ("tabby_cat/0.PNG", 1, "a tabby cat"),
        ("tabby_cat/1.PNG", 1, "a tabby cat"),
        ("tabby_cat/2.PNG", 1, "a tabby cat"),
    ]
    assert [e["label"] for e in config.examples("test")] == [1]
    batch = next(iter(config.build(processor=fake_processor(), batch_size=5, seed=0)))
    assert batch["labels"].tolist() == [0 if number < 2 else 1 for number in batch["ids"]]
    assert "input_ids" in batch


def test_folder_without_templates_has_no_text(tmp_path):
    config = ImageFolderData(path=make_classes(tmp_path / "x", a=2), num_threads=0)
    batch = next(iter(config.build(processor=fake_processor(), batch_size=2, seed=0)))
    assert set(batch) == {"pixel_values", "labels", "faults", "ids"}


def test_class_folders_that_lead_out_are_unsafe(tmp_path):
    make_classes(tmp_path / "elsewhere", a=1)
    path = make_classes(tmp_path / "data", b=1)
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    assert outcomes(ImageFolderData(path=path)) == [("a/0.PNG", "unsafe_path"), ("b/0.PNG", ())]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda root: ImageFolderData(path=str(root / "none")),
            DataError,
            "none: cannot list the image folder",
        ),
        (lambda root: ImageFolderData(path=str(root / "flat")), DataError, "flat: no class folders"),
        (
            lambda root: ImageFolderData(path=str(root / "bare")),
            DataError,
            "bare: no images in its class folders",
        ),
        (lambda root: ImageFolderData(path=".", templates=("x",)), ConfigError, "templates"),
    ],
)
def test_wrong_folders_are_refused(tmp_path, make, kind, message):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(png(0))
    (tmp_path / "bare" / "a").mkdir(parents=True)
    with pytest.raises(kind, match=message):
        make(tmp_path).source()


def test_test_folder_with_a_class_of_its_own_is_refused(tmp_path):
    path, other = make_classes(tmp_path / "train", a=1), make_classes(tmp_path / "test", a=1, b=1)
    with pytest.raises(DataError, match="classes b are not among those of"):
        ImageFolderData(path=path, test_path=other).source("test")
    with pytest.raises(ConfigError, match="set test_path"):
        ImageFolderData(path=path).source("test")
