"""Random images and captions, for benchmarks and trials without data."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmjax.data.config import DataConfig, Progress, Split, check_split
from mmjax.data.order import hash_bits
from mmjax.data.sources import Record, digest
from mmjax.errors import ConfigError

_WORDS = ("red", "blue", "green", "small", "large", "round", "bright", "cat", "dog", "house", "tree", "boat")


@dataclass(frozen=True, kw_only=True)
class SyntheticData(DataConfig):
    """Seeded random images, captions and labels: a sample has the same content in every run.

    Args:
        num_samples: samples per split.
        image_size: height and width, in pixels.
        num_classes: labels are 0 ... num_classes - 1.
        words: words per caption.
        encoded: images are JPEG files in memory, so that decoding costs what it does with real ones.
        content_seed: chooses the contents.

    >>> SyntheticData(image_size=32).examples("train")[3]["image"].size
    (32, 32)
    """

    num_samples: int = 10_000
    image_size: int = 224
    num_classes: int = 10
    words: int = 8
    encoded: bool = False
    content_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_samples, self.image_size, self.num_classes, self.words) < 1:
            raise ConfigError(
                "SyntheticData: num_samples, image_size, num_classes, words have to be positive"
            )

    def class_names(self) -> tuple[str, ...]:
        """ "class 0", "class 1" and so on."""
        return tuple(f"class {label}" for label in range(self.num_classes))

    def source(self, split: Split = "train", progress: Progress | None = None) -> SyntheticSource:
        """The samples of one split; they are made when read."""
        check_split(split)
        return SyntheticSource(self, split)


@dataclass(frozen=True)
class SyntheticSource:
    """Makes samples from their numbers.

    Args:
        config: sizes and seed.
        split: each split has contents of its own.
    """

    config: SyntheticData
    split: Split
    has_text: bool = True
    has_labels: bool = True
    window: int = 1

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """All samples are one shard."""
        return (self.config.num_samples,)

    @property
    def identity(self) -> str:
        """Changes with what decides the contents."""
        c = self.config
        parts = (c.num_samples, c.image_size, c.num_classes, c.words, c.encoded, c.content_seed)
        return digest("synthetic", self.split, *parts)

    def __len__(self) -> int:
        return self.config.num_samples

    def __getitem__(self, index: int) -> Record:
        config = self.config
        random = np.random.Generator(np.random.Philox(hash_bits(config.content_seed, self.split, index)))
        cells = random.integers(0, 256, (8, 8, 3), np.uint8)
        size = (config.image_size, config.image_size)
        image = Image.fromarray(cells).resize(size, Image.Resampling.BILINEAR)
        text = " ".join(_WORDS[i] for i in random.integers(0, len(_WORDS), config.words))
        return Record(
            image=_jpeg(image) if config.encoded else image,
            texts=(text,),
            label=index % config.num_classes,
            name=f"synthetic {index}",
        )


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
