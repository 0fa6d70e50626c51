"""`mmjax eval` on every kind of data."""

from __future__ import annotations

import io
import tarfile

import numpy as np

from mmjax.data import DigitsData
from tests.commands.pictures import COLOURS, picture


def test_eval_zeroshot_on_digits(report, run, clip_folder):
    arguments = [
        "eval",
        "--model",
        clip_folder,
        "--task",
        "zeroshot",
        "--data",
        "digits",
        "--batch-size",
        "128",
    ]
    found = report(*arguments)
    confusion = np.array(found["confusion"])
    count = len(DigitsData().examples("test"))
    assert found["samples"] == confusion.sum() == count and found["left_out"] == {}
    assert found["classes"][3] == "three" and len(found["templates"]) == 5
    assert found["accuracy"]["top1"] == np.trace(confusion) / count <= found["accuracy"]["top5"]
    code, out, _ = run(*arguments, "--templates", "photo")
    assert code == 0 and "top-1 accuracy" in out and "class seven" in out


def test_eval_zeroshot_on_a_folder_and_on_a_table_agree(report, clip_folder, colours):
    def accuracy(*data):
        found = report(
            "eval", "--model", clip_folder, "--task", "zeroshot", "--template", "{}", "--data", *data
        )
        assert found["classes"] == sorted(name.replace("_", " ") for name in COLOURS)
        return found["samples"], found["accuracy"], found["confusion"]

    table = colours / "classes.tsv"
    rows = [
        f"{path.relative_to(colours)}\t{path.parent.name.replace('_', ' ')}"
        for path in sorted((colours / "splits" / "test").glob("*/*.png"))
    ]
    table.write_text("\n".join(["file\tkind", *rows]) + "\n")
    keys = ["--csv-img-key", "file", "--csv-caption-key", "kind"]
    assert accuracy(colours / "splits")[0] == 6
    assert accuracy(colours / "splits", "--split", "train")[0] == 12
    assert accuracy(colours / "splits") == accuracy(colours / "splits" / "test") == accuracy(table, *keys)


def test_eval_probe_learns_colours(report, fails, vit_folder, colours):
    def probe(*data):
        return report("eval", "--model", vit_folder, "--task", "probe", "--data", *data)

    found = probe(colours / "splits")
    assert (found["samples"], found["train_samples"], found["features"]) == (6, 12, 16)
    assert found["converged"] and found["train_accuracy"] == 1.0 and found["accuracy"]["top1"] == 1.0
    test, train = colours / "splits" / "test", colours / "splits" / "train"
    assert probe(test, "--train-data", train)["accuracy"] == found["accuracy"]
    assert probe(test, "--train-data", colours / "splits")["accuracy"] == found["accuracy"]
    assert "give --train-data" in fails("eval", "--model", vit_folder, "--task", "probe", "--data", test)


def test_eval_retrieval_groups_captions_by_image(report, run, clip_folder, colours):
    arguments = ["eval", "--model", clip_folder, "--task", "retrieval", "--data", colours / "pairs.csv"]
    found = report(*arguments, "--block-size", "7")
    assert (found["samples"], found["captions"], found["groups"]) == (18, 36, 18)
    assert found["image_to_text"] == report(*arguments)["image_to_text"]
    for direction in ("image_to_text", "text_to_image"):
        recall = [found[direction][f"R@{k}"] for k in (1, 5, 10)]
        assert recall == sorted(recall) and 0 <= recall[0] <= recall[2] <= 1
    code, out, _ = run(*arguments)
    assert code == 0 and "text_to_image R@10" in out


def test_eval_retrieval_counts_broken_samples_of_tars(report, fails, clip_folder, tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number, colour in enumerate([*COLOURS.values()] * 2):
            data = io.BytesIO()
            picture(colour, number).save(data, "PNG")
            body = data.getvalue()[: 50 if number == 4 else None]
            for suffix, content in (("png", body), ("txt", f"picture {number}".encode())):
                entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    arguments = [
        "eval",
        "--model",
        clip_folder,
        "--task",
        "retrieval",
        "--data",
        tmp_path / "{00000..00000}.tar",
    ]
    assert "1 of 5 samples" in fails(*arguments) and "00004 (truncated)" in fails(*arguments)
    found = report(*arguments, "--max-broken", "0.2")
    assert (found["samples"], found["left_out"], found["captions"]) == (5, {"truncated": 1}, 5)


def test_eval_retrieval_of_digits_takes_equal_captions_together(report, clip_folder):
    found = report(
        "eval", "--model", clip_folder, "--task", "retrieval", "--data", "digits", "--batch-size", "128"
    )
    assert (found["captions"], found["groups"]) == (50, 10)


def test_eval_bad_input(fails, clip_folder, vit_folder, colours, tmp_path):
    def fault(task, data, *extra, model=clip_folder):
        return fails("eval", "--model", model, "--task", task, "--data", data, *extra)

    assert "no such data" in fault("zeroshot", tmp_path / "nothing")
    assert "no class folders" in fault("zeroshot", tmp_path)
    assert "no column 'caption'" in fault("retrieval", colours / "pairs.csv", "--csv-caption-key", "caption")
    assert "no.csv" in fault("retrieval", tmp_path / "no.csv")
    assert "has no splits" in fault("retrieval", colours / "pairs.csv", "--split", "train")
    assert "to choose the split 'train'" in fault("probe", colours / "splits" / "test", "--split", "train")
    assert "no captions" in fault("retrieval", colours / "splits" / "test")
    assert "its class" in fault("zeroshot", colours / "pairs.csv")
    assert "--template or --templates" in fault(
        "zeroshot", "digits", "--template", "{}", "--templates", "photo"
    )
    assert "takes no texts" in fault("retrieval", "digits", model=vit_folder)
    assert "give --train-data" in fault("probe", "digits", "--split", "train")
