"""Processor: what goes in and comes out, folders of both ages, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmjax.errors import CheckpointError, ConfigError, DataError
from mmjax.language.tokenizer import Tokenizer
from mmjax.models.processor import Processor
from mmjax.vision.processing import ImageProcessor, Size
from tests.golden.make_processor_golden import TOKENIZER, pattern

IMAGES = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 9}, "crop_size": 8}


@pytest.fixture
def processor() -> Processor:
    return Processor(ImageProcessor.from_dict(IMAGES), Tokenizer.from_folder(TOKENIZER))


def write(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def assert_same(ours: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(ours) == list(other)
    for name in ours:
        np.testing.assert_array_equal(ours[name], other[name])


def test_names_shapes_and_types(processor: Processor) -> None:
    image = Image.fromarray(pattern(11, 17))
    batch = processor(images=[image, image], text=["a red cat", "one"], padding=True, return_tensors="np")
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "input_ids": ((2, 5), "int32"),
        "attention_mask": ((2, 5), "int32"),
        "pixel_values": ((2, 8, 8, 3), "float32"),
    }
    assert list(processor(image)) == ["pixel_values"]
    assert list(processor(text="one")) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("parts", ["both", "images", "text"])
def test_saved_and_opened_again(processor: Processor, parts: str, tmp_path: Path) -> None:
    keep = Processor(
        processor.image_processor if parts != "text" else None,
        processor.tokenizer if parts != "images" else None,
    )
    keep.save(tmp_path / "new")
    opened = Processor.from_folder(tmp_path / "new")
    assert opened is not None
    assert opened.image_processor == keep.image_processor
    assert (opened.tokenizer is None) == (keep.tokenizer is None)
    inputs: dict[str, Any] = {"images": pattern(9, 12)} if parts != "text" else {}
    inputs |= {"text": ["a cat"]} if parts != "images" else {}
    assert_same(opened(**inputs), keep(**inputs))


def test_saving_writes_what_transformers_looks_for(processor: Processor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    joint = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    alone = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert joint == {"processor_class": "CLIPProcessor", "image_processor": alone}
    Processor(ImageProcessor(size=5)).save(tmp_path)
    assert not (tmp_path / "processor_config.json").exists()


def test_a_class_of_its_own_is_kept(tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER, tmp_path / "in")
    write(tmp_path / "in" / "preprocessor_config.json", {**IMAGES, "processor_class": "OwnProcessor"})
    opened = Processor.from_folder(tmp_path / "in")
    assert opened is not None and opened.processor_class == "OwnProcessor"
    opened.save(tmp_path / "out")
    again = Processor.from_folder(tmp_path / "out")
    assert again is not None and again.processor_class == "OwnProcessor"


def test_folders_without_processor_files(tmp_path: Path) -> None:
    assert Processor.from_folder(tmp_path) is None
    write(tmp_path / "config.json", {"model_type": "vit"})
    assert Processor.from_folder(tmp_path) is None


def test_joint_settings_win_over_the_older_file(tmp_path: Path) -> None:
    write(tmp_path / "preprocessor_config.json", IMAGES)
    write(tmp_path / "processor_config.json", {"processor_class": "CLIPProcessor"})
    assert Processor.from_folder(tmp_path) == Processor(
        ImageProcessor.from_dict(IMAGES), processor_class="CLIPProcessor"
    )
    write(tmp_path / "processor_config.json", {"image_processor": {**IMAGES, "size": 30}})
    opened = Processor.from_folder(tmp_path)
    assert opened is not None and opened.image_processor is not None
    assert opened.image_processor.size == Size(shortest_edge=30)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("vit", "ViTImageProcessor"),
        ("clip_vision_model", "CLIPImageProcessor"),
        ("siglip", "SiglipImageProcessor"),
    ],
)
def test_old_folders_take_the_type_from_the_model(model_type: str, kind: str, tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"model_type": model_type})
    write(tmp_path / "preprocessor_config.json", {"do_resize": True, "size": 12})
    opened = Processor.from_folder(tmp_path)
    assert opened is not None and opened.image_processor is not None
    assert opened.image_processor.image_processor_type == kind


def test_clip_files_alone_are_a_clip_tokenizer(tmp_path: Path, processor: Processor) -> None:
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    write(tmp_path / "config.json", {"model_type": "clip_text_model"})
    opened = Processor.from_folder(tmp_path)
    assert opened is not None
    assert_same(opened(text=["a", "a cat"], padding=True), processor(text=["a", "a cat"], padding=True))


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("preprocessor_config.json", "{", CheckpointError, "preprocessor_config.json: not valid JSON"),
        ("preprocessor_config.json", "[]", CheckpointError, "expected a JSON object"),
        ("processor_config.json", '"x"', CheckpointError, "processor_config.json: expected a JSON object"),
        (
            "processor_config.json",
            '{"image_processor": [1]}',
            ConfigError,
            "processor_config.json.*expected an object",
        ),
        (
            "preprocessor_config.json",
            '{"size": 3}',
            ConfigError,
            "preprocessor_config.json: image_processor_type",
        ),
        ("preprocessor_config.json", json.dumps({**IMAGES, "odd": 1}), ConfigError, "unknown odd"),
        ("config.json", "nul", CheckpointError, "config.json: not valid JSON"),
        ("tokenizer_config.json", "{}", CheckpointError, "no tokenizer in this folder"),
    ],
)
def test_damaged_folders_are_named(
    name: str, content: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    if name == "config.json":
        write(tmp_path / "preprocessor_config.json", IMAGES)
    write(tmp_path / name, content)
    with pytest.raises(error, match=words) as caught:
        Processor.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_inputs_that_no_part_takes(processor: Processor) -> None:
    with pytest.raises(DataError, match="nothing to process"):
        processor()
    with pytest.raises(DataError, match="no image processor"):
        Processor(tokenizer=processor.tokenizer)(images=pattern(4, 4))
    with pytest.raises(DataError, match="no tokenizer"):
        Processor(processor.image_processor)(text="a")
    with pytest.raises(DataError, match="return_tensors"):
        processor(text="a", return_tensors="pt")


def test_a_place_that_cannot_be_written(processor: Processor, tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    with pytest.raises(CheckpointError, match="cannot be written"):
        processor.save(tmp_path / "file")
