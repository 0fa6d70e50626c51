"""Which data a name on the command line stands for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmjax.errors import DataError
from mmjax.evaluation.sources import image_files, kind_of, open_dataset, split_folders


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for name in ("red_fox", "owl"):
            save(tmp_path / "splits" / split / name / "1.png")
    save(tmp_path / "classes" / "b" / "1.png", 1)
    save(tmp_path / "classes" / "a" / "2.png", 2)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").touch()
    return tmp_path


def test_kinds(root):
    assert kind_of("digits") == "digits"
    assert kind_of(f"{root}/x.TSV") == kind_of(f"{root}/x.csv") == "csv"
    assert (
        kind_of(f"{root}/tars")
        == kind_of(f"{root}/{{00..07}}.tar")
        == kind_of("a.tar::b.tar")
        == "webdataset"
    )
    assert kind_of(f"{root}/classes") == "folder"
    with pytest.raises(DataError, match="no such data"):
        kind_of(f"{root}/none")


def test_digits_have_two_splits_that_share_nothing():
    test, train = (open_dataset("digits", split=split) for split in (None, "train"))
    names = [{example["name"] for example in data.examples} for data in (test, train)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 1797
    assert test.class_names[9] == "nine" and all("{}" in template for template in test.templates)


def test_class_folder(root):
    data = open_dataset(f"{root}/classes")
    assert data.class_names == ("a", "b")
    assert [(e["name"], e["label"], np.asarray(e["image"]).max()) for e in data.examples] == [
        ("a/2.png", 0, 2),
        ("b/1.png", 1, 1),
    ]
    with pytest.raises(DataError, match="has no folders train and test"):
        open_dataset(f"{root}/classes", split="train")


def test_folder_of_splits(root):
    assert split_folders(root / "splits") == {
        "train": root / "splits" / "train",
        "test": root / "splits" / "val",
    }
    assert split_folders(root / "classes") == {}
    data = open_dataset(f"{root}/splits")
    assert data.class_names == ("owl", "red fox") and len(data.examples) == 2
    (root / "splits" / "train").rename(root / "splits" / "valid")
    with pytest.raises(DataError, match="no folder for the train split, only for test"):
        open_dataset(f"{root}/splits", split="train")


def test_table_rows_of_one_image_are_one_sample(root):
    table = root / "pairs.csv"
    table.write_text("filepath,title\nclasses/a/2.png,one\nclasses/b/1.png,two\nclasses/a/2.png,three\n")
    data = open_dataset(str(table))
    assert [example["texts"] for example in data.examples] == [("one", "three"), ("two",)]
    assert data.class_names is None
    with pytest.raises(DataError, match="has no splits"):
        open_dataset(str(table), split="test")


def test_a_kind_given_by_name_wins(root):
    table = root / "pairs.txt"
    table.write_text("image;words\nb/1.png;two\n")
    data = open_dataset(
        str(table),
        kind="csv",
        separator=";",
        img_key="image",
        caption_key="words",
        image_root=f"{root}/classes",
    )
    assert data.examples[0]["text"] == "two"
    with pytest.raises(DataError, match="no kind of data 'parquet'"):
        open_dataset(str(table), kind="parquet")


def test_image_files(root):
    paths = [root / "classes" / "a" / "2.png", root / "classes" / "b" / "1.png"]
    found = image_files(paths)
    assert [example["name"] for example in found] == [str(path) for path in paths]
    assert not found.has_text and not found.has_labels
    for wrong, message in (
        ([], "no image given"),
        ([root], "is a folder"),
        ([root / "x.png"], "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            image_files(wrong)
