"""ImageProcessor: values from golden files, settings old and new, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmjax.errors import ConfigError, DataError
from mmjax.vision.processing import DEFAULTS, IGNORED, ImageProcessor, Size
from tests.golden.make_processor_golden import PIXELS, image_cases, pattern

GOLDEN = np.load(PIXELS)
VIT = {"image_processor_type": "ViTImageProcessor", "size": 6}


def test_there_is_a_golden_array_for_every_case() -> None:
    assert set(GOLDEN.files) == set(image_cases())


@pytest.mark.parametrize("name", list(image_cases()))
def test_pixels_equal_the_reference_bit_for_bit(name: str) -> None:
    config, image = image_cases()[name]
    pixels = ImageProcessor.from_dict(config)(image)["pixel_values"]
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, GOLDEN[name])


def test_batches_paths_and_arrays_agree(tmp_path: Path) -> None:
    processor = ImageProcessor(size=8, crop_size=6)
    arrays = [pattern(9, 13), pattern(20, 11), pattern(7, 7)]
    expected = np.concatenate([processor(array)["pixel_values"] for array in arrays])
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for array, path in zip(arrays, paths, strict=True):
        Image.fromarray(array).save(path)
    batches: list[Any] = [arrays, paths, [[arrays[0]], arrays[1:]], [p.read_bytes() for p in paths]]
    for batch in batches:
        np.testing.assert_array_equal(processor(batch)["pixel_values"], expected)
    stacked = np.stack([pattern(9, 13), pattern(9, 13)[::-1]])
    for batch in (stacked, stacked.transpose(0, 3, 1, 2)):
        np.testing.assert_array_equal(
            processor(batch)["pixel_values"], processor(list(stacked))["pixel_values"]
        )


def test_files_are_turned_upright_and_images_are_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(pattern(6, 6)).save(path, exif=exif)
    processor = ImageProcessor(size=6, crop_size=6)
    upright = processor(np.rot90(pattern(6, 6), -1))["pixel_values"]
    np.testing.assert_array_equal(processor(path)["pixel_values"], upright)
    np.testing.assert_array_equal(
        processor(Image.open(path))["pixel_values"], processor(pattern(6, 6))["pixel_values"]
    )


def test_inputs_stay_as_they_are_and_results_repeat() -> None:
    processor = ImageProcessor(size=5, crop_size=9)
    for image in (Image.fromarray(pattern(9, 13, 4)), pattern(9, 13), pattern(9, 13) / 255):
        before = np.array(image)
        first = processor(image)["pixel_values"].copy()
        np.testing.assert_array_equal(processor(image)["pixel_values"], first)
        np.testing.assert_array_equal(np.array(image), before)


@pytest.mark.parametrize(
    ("size", "image", "expected"),
    [
        (Size(shortest_edge=224), (480, 641), (224, 299)),
        (Size(shortest_edge=224), (641, 480), (299, 224)),
        (Size(shortest_edge=3), (1, 7), (3, 21)),
        (Size(height=4, width=9), (100, 3), (4, 9)),
        (Size(shortest_edge=10, longest_edge=15), (20, 40), (8, 15)),
        (Size(shortest_edge=10, longest_edge=15), (10, 12), (10, 12)),
        (Size(max_height=10, max_width=10), (40, 20), (10, 5)),
    ],
)
def test_sizes_are_rounded_as_in_the_reference(
    size: Size, image: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert size.resolve(*image) == expected


@pytest.mark.parametrize(
    ("config", "size", "crop"),
    [
        (
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 300},
            {"shortest_edge": 336},
            300,
        ),
        ({"image_processor_type": "CLIPImageProcessorFast"}, {"shortest_edge": 224}, 224),
        ({"image_processor_type": "ViTImageProcessorPil", "size": 32}, {"height": 32, "width": 32}, None),
        ({"image_processor_type": "ViTFeatureExtractor"}, {"height": 224, "width": 224}, None),
        (
            {"image_processor_type": "SiglipImageProcessor", "size": [20, 30]},
            {"height": 20, "width": 30},
            None,
        ),
        ({"image_processor_type": "SiglipImageProcessor", "size": 20}, {"shortest_edge": 20}, None),
    ],
)
def test_old_forms_and_defaults_by_type(
    config: dict[str, Any], size: dict[str, int], crop: int | None
) -> None:
    processor = ImageProcessor.from_dict(config)
    assert isinstance(processor.size, Size) and processor.size.to_dict() == size
    assert processor.crop_size == (None if crop is None else Size(height=crop, width=crop))


def test_the_type_can_come_from_elsewhere() -> None:
    processor = ImageProcessor.from_dict({"size": 8}, default_type="ViTImageProcessor")
    assert processor.size == Size(height=8, width=8) and processor.resample == 2
    assert processor.image_mean == (0.5, 0.5, 0.5) and not processor.do_center_crop


@pytest.mark.parametrize("kind", list(DEFAULTS))
def test_settings_survive_json(kind: str) -> None:
    config = {"image_processor_type": kind, "do_resize": None, "rescale_factor": 0.5, "image_std": [1, 2, 3]}
    processor = ImageProcessor.from_dict(config)
    assert ImageProcessor.from_dict(json.loads(json.dumps(processor.to_dict()))) == processor
    assert hash(processor) == hash(ImageProcessor.from_dict(config))


def test_ignored_attributes_have_reasons_and_change_nothing() -> None:
    assert all(len(reason) > 10 for reason in IGNORED.values())
    config = {**VIT, "data_format": "channels_first", "device": None, "do_pad": None, "processor_class": "X"}
    assert ImageProcessor.from_dict(config) == ImageProcessor.from_dict(VIT)


def test_every_setting_is_read() -> None:
    base = ImageProcessor(size=8, crop_size=6)
    image = Image.fromarray(pattern(9, 13, 4))
    expected = base(image)["pixel_values"]
    changes: list[dict[str, Any]] = [
        {"do_resize": False},
        {"size": 9},
        {"resample": 0},
        {"do_center_crop": False},
        {"crop_size": 5},
        {"do_rescale": False},
        {"rescale_factor": 0.5},
        {"do_normalize": False},
        {"image_mean": 0.1},
        {"image_std": 0.1},
        {"default_to_square": True, "do_center_crop": False},
    ]
    for change in changes:
        values = {**base.to_dict(), "size": 8, "crop_size": 6, **change}
        changed = ImageProcessor.from_dict(values)(image)["pixel_values"]
        assert not np.array_equal(changed, expected), change
    with pytest.raises(DataError, match="4 channels"):
        ImageProcessor.from_dict({**base.to_dict(), "do_convert_rgb": False})(image)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_processor_type": "BlipImageProcessor"}, "BlipImageProcessor"),
        ({"new_field": 1}, "new_field"),
        ({"do_pad": True}, "do_pad"),
        ({"input_data_format": "channels_last"}, "input_data_format"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"do_normalize": 1}, "do_normalize"),
        ({"size": {"longest_edge": 9}}, "longest_edge"),
        ({"size": {"depth": 9}}, "depth"),
        ({"size": 0}, "size"),
        ({"size": {"height": 4.5, "width": 4}}, "4.5"),
        ({"size": True}, "size"),
        ({"size": [1, 2, 3]}, "size"),
        ({"size": None}, "size"),
        ({"do_center_crop": True}, "crop_size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size"),
        ({"resample": 6}, "resample"),
        ({"resample": "bicubic"}, "resample"),
        ({"resample": None}, "resample"),
        ({"rescale_factor": None}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"image_mean": None}, "image_mean"),
        ({"image_mean": "half"}, "image_mean"),
        ({"image_mean": []}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
    ],
)
def test_settings_that_cannot_be_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ImageProcessor.from_dict({**VIT, **change})
    assert "\n" not in str(caught.value)


def test_settings_without_a_type() -> None:
    with pytest.raises(ConfigError, match="image_processor_type is missing"):
        ImageProcessor.from_dict({"size": 8})
    with pytest.raises(ConfigError, match="expected an object"):
        ImageProcessor.from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "images", "words"),
    [
        ({"do_center_crop": False, "size": 4}, [pattern(5, 9), pattern(9, 5)], "image 1 becomes 4 x 7"),
        ({}, [], "no images"),
        ({}, [None], "NoneType"),
        ({}, "missing.png", "missing.png"),
        ({"size": 224}, pattern(1, 60_000), "too elongated"),
        ({"size": {"max_height": 4, "max_width": 4}}, pattern(1, 90), "too elongated"),
        ({"image_mean": [0.5], "image_std": [0.5]}, pattern(5, 5), "3 channels and image_mean 1"),
    ],
)
def test_images_that_cannot_be_processed(config: dict[str, Any], images: Any, words: str) -> None:
    processor = ImageProcessor.from_dict({"image_processor_type": "CLIPImageProcessor", **config})
    with pytest.raises(DataError, match=words) as caught:
        processor(images)
    assert "\n" not in str(caught.value)
