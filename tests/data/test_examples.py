"""Digits and synthetic samples, and what evaluation reads."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from mmjax.data import DIGIT_NAMES, CaptionsData, DigitsData, MixtureData, SyntheticData, batches
from mmjax.data.faults import FAULTS
from mmjax.errors import ConfigError
from tests.data.fakes import fake_processor
from tests.data.makers import picture, png, write_table


def test_digits_split_is_fixed_balanced_and_disjoint():
    config = DigitsData()
    train, test = config.examples("train"), config.examples("test")
    assert (len(train), len(test)) == (1442, 355)
    assert not {e["name"] for e in train} & {e["name"] for e in test}
    assert [e["name"] for e in test[:3]] == ["digit 33", "digit 36", "digit 37"]
    shares = np.bincount([e["label"] for e in test]) / np.bincount([e["label"] for e in train])
    assert shares.min() > 0.23 and shares.max() < 0.26


def test_digits_are_the_scans_with_captions_in_words():
    from sklearn.datasets import load_digits

    digits = load_digits()
    config = DigitsData(templates=("the digit {}", "{}"))
    assert config.class_names() == DIGIT_NAMES
    for example in config.examples("test")[::40]:
        number = int(example["name"].split()[1])
        name = DIGIT_NAMES[digits.target[number]]
        assert example["label"] == digits.target[number]
        assert example["texts"] == (f"the digit {name}", name) and example["text"] == f"the digit {name}"
        expected = np.rint(digits.images[number] * 255 / 16).astype(np.uint8)
        np.testing.assert_array_equal(example["image"], np.repeat(expected[..., None], 3, axis=2))


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    from mmjax.data.digits import _scans

    _scans.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmjax\[experiments\]'"):
        DigitsData().source()


def test_synthetic_samples_have_their_content_in_every_run():
    config = SyntheticData(num_samples=5, image_size=12)
    first, again = config.examples("train"), config.examples("train")
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["image"], two["image"])
        assert one["text"] == two["text"] and len(one["text"].split()) == 8
    assert len({e["image"].tobytes() for e in [*first, *config.examples("test")]}) == 10
    other = dataclasses.replace(config, content_seed=1).examples("train")
    assert first[0]["image"].tobytes() != other[0]["image"].tobytes()


def test_synthetic_samples_can_be_encoded():
    record = SyntheticData(num_samples=1, image_size=12, encoded=True).source()[0]
    assert record["image"][:2] == b"\xff\xd8"
    assert SyntheticData(num_samples=1, image_size=12, encoded=True).examples("train")[0]["image"].size == (
        12,
        12,
    )


def test_examples_are_a_sequence():
    examples = SyntheticData(num_samples=5, image_size=4).examples("train")
    assert examples[-1]["name"] == "synthetic 4"
    assert [e["name"] for e in examples[1:4:2]] == ["synthetic 1", "synthetic 3"]
    for index in (5, -6):
        with pytest.raises(IndexError):
            examples[index]


def test_examples_of_a_mixture_come_one_source_after_the_other():
    sources = [SyntheticData(num_samples=n, image_size=4, content_seed=n) for n in (2, 3)]
    names = [e["name"] for e in MixtureData(sources=tuple(sources)).examples("train")]
    assert names == ["synthetic 0", "synthetic 1", "synthetic 0", "synthetic 1", "synthetic 2"]


def test_batches_for_evaluation_pad_the_last_and_mark_broken_rows(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png(number) if number != 2 else b"nonsense")
    rows = [(f"{number}.png", f"picture {number}" if number != 3 else " ") for number in range(5)]
    examples = CaptionsData(path=write_table(tmp_path, rows)).examples("train")
    found = list(batches(examples, fake_processor(), 3, max_length=9))
    assert [batch["valid"].tolist() for batch in found] == [[True, True, False], [False, True, False]]
    assert [batch["ids"].tolist() for batch in found] == [[0, 1, 2], [3, 4, -1]]
    assert [FAULTS[i] for batch in found for i in np.flatnonzero(batch["faults"])] == [
        "not_an_image",
        "no_caption",
    ]
    for batch in found:
        assert batch["pixel_values"].shape == (3, 8, 8, 3) and batch["input_ids"].shape == (3, 9)
        for row in range(3):
            number = int(batch["ids"][row])
            if batch["valid"][row]:
                expected = fake_processor().image_processor([picture(number)])["pixel_values"][0]
                np.testing.assert_array_equal(batch["pixel_values"][row], expected)
                assert "".join(map(chr, batch["input_ids"][row])) == f"picture {number}"[:9]
            else:
                assert not batch["pixel_values"][row].any() and not batch["input_ids"][row].any()


def test_batches_for_evaluation_have_labels_and_no_text_without_tokenizer():
    examples = SyntheticData(num_samples=3, image_size=4, num_classes=2).examples("test")
    (batch,) = batches(examples, fake_processor(text=False), 4)
    assert set(batch) == {"pixel_values", "labels", "ids", "valid", "faults"}
    assert batch["labels"].tolist() == [0, 1, 0, -1]


def test_importing_the_room_imports_no_heavy_package():
    code = (
        "import sys, mmjax.data; print([m for m in ('grain', 'PIL', 'sklearn', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        __import__("mmjax.data").data.nothing  # noqa: B018
