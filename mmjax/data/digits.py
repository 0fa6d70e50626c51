"""The handwritten digits that scikit-learn carries: 1797 scans of 8 x 8 pixels, captioned in words."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data.config import DataConfig, Progress, Split, check_split
from mmjax.data.sources import ListSource, Record
from mmjax.errors import ConfigError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "a scan of the number {}",
    "the digit {} in somebody's handwriting",
    "a small picture of the number {}",
)
_TEST_EVERY = 5


@dataclass(frozen=True, kw_only=True)
class DigitsData(DataConfig):
    """Real scans of handwritten digits with captions and labels, no download needed.

    The test split is every fifth scan of each digit in scikit-learn's order (355 scans), the rest is the
    train split (1442): fixed, and balanced over the digits. Pixels are scaled from 0..16 to 0..255 and stay 8
    x 8; the image processor makes them larger.

    Args:
        templates: captions, with {} where the digit's name in words goes. Training draws one per sample and
            epoch.

    >>> example = DigitsData().examples("test")[0]
    >>> example["text"], example["label"], example["image"].size
    ('a photo of the digit five', 5, (8, 8))

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), its test part.
    """

    templates: tuple[str, ...] = DIGIT_TEMPLATES
    num_threads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.templates or any("{}" not in template for template in self.templates):
            raise ConfigError(f"DigitsData.templates={self.templates}: each needs {{}} for the digit's name")

    def class_names(self) -> tuple[str, ...]:
        """The digits in words: zero to nine."""
        return DIGIT_NAMES

    def source(self, split: Split = "train", progress: Progress | None = None) -> ListSource:
        """The scans of one split.

        Raises:
            ConfigError: scikit-learn is not installed.
        """
        check_split(split)
        images, labels = _scans()
        kept = np.flatnonzero(_is_test(labels) == (split == "test"))
        captions = [tuple(template.format(name) for template in self.templates) for name in DIGIT_NAMES]
        records = [_record(images[i], int(labels[i]), captions, f"digit {i}") for i in kept]
        return ListSource(records, identity=f"digits {split} {self.templates}")


def _record(image: np.ndarray, label: int, captions: list[tuple[str, ...]], name: str) -> Record:
    return Record(image=Image.fromarray(image).convert("RGB"), texts=captions[label], label=label, name=name)


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8] and int64 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the digits need scikit-learn: pip install 'mmjax[experiments]'") from error
    digits: Any = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def _is_test(labels: np.ndarray) -> np.ndarray:
    """bool [N]: every fifth sample of each class, counted in order."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    return chosen
