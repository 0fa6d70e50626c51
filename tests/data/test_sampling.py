import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmjax.data import SyntheticData
from mmjax.data.sampling import Augmentation, augment, crop_box
from mmjax.errors import ConfigError
from tests.data.fakes import fake_processor

ratios = st.floats(0.2, 5).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 5)))
scales = st.floats(0.01, 1).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 1)))


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), scales, ratios, st.integers(0, 9))
def test_crop_boxes_lie_inside_the_image(width, height, scale, ratio, key):
    augmentation = Augmentation(crop_scale=scale, crop_ratio=ratio)
    left, upper, right, lower = crop_box(width, height, augmentation, key)
    assert 0 <= left < right <= width and 0 <= upper < lower <= height


def test_crop_boxes_keep_area_and_ratio():
    augmentation = Augmentation(crop_scale=(0.25, 0.5), crop_ratio=(0.5, 2.0))
    boxes = np.array([crop_box(100, 100, augmentation, key) for key in range(400)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, shapes = width * height / 1e4, width / height
    assert areas.min() >= 0.2499 and areas.max() <= 0.5001 and areas.max() - areas.min() > 0.2
    assert (
        shapes.min() >= 0.499 and shapes.max() <= 2.001 and (shapes > 1).mean() == pytest.approx(0.5, abs=0.1)
    )


def test_a_crop_is_pillows_resize_of_its_box():
    image = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    augmentation = Augmentation(crop_scale=(0.3, 0.9))
    box = crop_box(30, 20, augmentation, 4, "crop")
    expected = image.resize((6, 5), Image.Resampling.BICUBIC, box=box)
    np.testing.assert_array_equal(augment(image, augmentation, (5, 6), 4), expected)


def test_flip_mirrors_half_of_the_samples():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    mirrored = np.asarray(image)[:, ::-1]
    results = [np.asarray(augment(image, Augmentation(flip=True), (2, 2), key)) for key in range(300)]
    flipped = [np.array_equal(result, mirrored) for result in results]
    assert all(f or np.array_equal(r, image) for f, r in zip(flipped, results, strict=True))
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.1)


def test_nothing_to_change_gives_the_same_image():
    image = Image.new("RGB", (4, 4))
    assert augment(image, Augmentation(), (2, 2), 0) is image


def test_an_image_processor_without_one_size_is_refused():
    class Wide:
        def __call__(self, images):
            image = images[0] if images[0].width == 64 else images[0].resize((3, 9))
            return {"pixel_values": np.asarray(image, np.float32)[None]}

    processor = fake_processor()
    processor.image_processor = Wide()
    config = SyntheticData(num_samples=4, image_size=8, num_threads=0)
    with pytest.raises(ConfigError, match="different sizes ..9, 3. of synthetic"):
        next(iter(config.build(processor=processor, batch_size=2, seed=0)))
