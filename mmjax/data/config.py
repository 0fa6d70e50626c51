"""What all data configurations share: augmentation, text length, threads, and how batches are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

from PIL import Image

from mmjax.data.examples import Examples
from mmjax.data.pipeline import Batches, text_length
from mmjax.data.sampling import Augmentation, Sampler, pixels_of
from mmjax.data.sources import Source, digest
from mmjax.errors import ConfigError

Split = Literal["train", "test"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fields of every data configuration.

    Args:
        max_length: tokens per caption; None: the tokenizer's own length.
        crop_scale: share of an image's area that a random crop of a training image keeps, smallest and
            largest;
            None: no random crop.
        crop_ratio: smallest and largest width to height of that crop.
        flip: mirror half of the training images.
        max_fault_share: largest share of broken samples that a run accepts, 0 to 1.
        num_threads: threads that read and decode; 0: none, and nothing is read ahead. Batches do not depend
            on it. Several are for files: digits and scenes, which lie in memory or are drawn, have one, since
            more would only wait for one another.
        prefetch_batches: batches read ahead by them.
    """

    max_length: int | None = None
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    max_fault_share: float = 0.05
    num_threads: int = 4
    prefetch_batches: int = 2

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"{name}.max_length={self.max_length} has to be at least 1")
        if self.crop_scale is not None:
            _check_range(f"{name}.crop_scale", self.crop_scale, 1.0)
        _check_range(f"{name}.crop_ratio", self.crop_ratio, float("inf"))
        if not 0 <= self.max_fault_share <= 1:
            raise ConfigError(f"{name}.max_fault_share={self.max_fault_share} has to lie between 0 and 1")
        if self.num_threads < 0 or self.prefetch_batches < 1:
            raise ConfigError(f"{name}: num_threads must be at least 0 and prefetch_batches at least 1")

    def source(self, split: Split = "train", progress: Progress | None = None) -> Source:
        """The raw samples of one split, for random access.

        Args:
            split: "train" or "test".
            progress: called with (done, total) while files are indexed, where that takes time.

        Raises:
            DataError: the data cannot be found or is not what it should be.
            ConfigError: the split is not configured.
        """
        raise NotImplementedError

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label.

        Raises:
            ConfigError: the source has no classes.
        """
        raise ConfigError(f"{type(self).__name__} has no classes")

    def build(
        self,
        *,
        processor: Any,
        batch_size: int,
        seed: int,
        split: Split = "train",
        process_index: int = 0,
        process_count: int = 1,
        progress: Progress | None = None,
    ) -> Batches:
        """Endless shuffled batches of one split.

        Args:
            processor: has `image_processor` and, for captions, `tokenizer`.
            batch_size: rows of a batch over all processes.
            seed: chooses order, captions and augmentation.
            split: "train" (augmented as configured) or "test" (not augmented).
            process_index: which process this is.
            process_count: number of processes; each makes its own rows of every batch.
            progress: called with (done, total) while files are indexed, where that takes time.

        Returns:
            An iterable whose iterators give dicts of numpy arrays and have `get_state` and `set_state`.

        Raises:
            ConfigError: a field, the processor or the split does not fit.
            DataError: the data cannot be found or is not what it should be.
        """
        check_split(split)
        parts = self.parts(split, progress)
        sources = [source for _, source in parts]
        has_text = all(source.has_text for source in sources)
        tokenizer = getattr(processor, "tokenizer", None) if has_text else None
        max_length = None if tokenizer is None else text_length(self.max_length, tokenizer)
        samplers = _samplers(parts, processor, seed, split, needs_text=tokenizer is not None)
        weights = self.source_weights(sources)
        return Batches(
            samplers=samplers,
            weights=weights,
            tokenizer=tokenizer,
            max_length=max_length,
            labels=self.has_labels(sources),
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
            num_threads=self.num_threads,
            prefetch_batches=self.prefetch_batches,
            max_fault_share=self.max_fault_share,
            identity={
                "source": digest(*(source.identity for source in sources)),
                "samples": sum(len(source) for source in sources),
                "split": split,
                "seed": seed,
                "batch_size": batch_size,
                "max_length": max_length,
                "augmentation": digest(*(asdict(sampler.augmentation) for sampler in samplers)),
                "order": digest(weights, *((source.shard_sizes, source.window) for source in sources)),
            },
        )

    def examples(self, split: Split = "test") -> Examples:
        """One split in its own order, for evaluation.

        Args:
            split: "train" or "test".

        Returns:
            A sequence of {"image": RGB image, "text", "texts", "label", "name"}; reading a broken one raises
            BadSample.
        """
        check_split(split)
        return Examples(tuple(source for _, source in self.parts(split)))

    def augmentation(self) -> Augmentation:
        """The changes to training images."""
        return Augmentation(crop_scale=self.crop_scale, crop_ratio=self.crop_ratio, flip=self.flip)

    def parts(self, split: Split, progress: Progress | None = None) -> list[tuple[DataConfig, Source]]:
        """Every source with its configuration; one, except for a mixture.

        Args:
            split: "train" or "test".
            progress: as in `source`.
        """
        return [(self, self.source(split, progress))]

    def source_weights(self, sources: list[Source]) -> tuple[float, ...] | None:
        """How often each of the sources of `parts` is drawn; None where there is only one."""
        return None

    def has_labels(self, sources: list[Source]) -> bool:
        """Whether batches have labels, given the sources of `parts`."""
        return all(source.has_labels for source in sources)


def check_split(split: str) -> None:
    """Refuse a split that no source has.

    >>> check_split("train")
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split={split!r} has to be 'train' or 'test'")


def _samplers(
    parts: list[tuple[DataConfig, Source]], processor: Any, seed: int, split: Split, needs_text: bool
) -> tuple[Sampler, ...]:
    """A sampler per source; their samples are numbered one source after the other."""
    to_pixels, pixel_size = _pixels(processor)
    first_ids = accumulate((len(source) for _, source in parts), initial=0)
    return tuple(
        Sampler(
            source=source,
            to_pixels=to_pixels,
            pixel_size=pixel_size,
            seed=seed + number,
            needs_text=needs_text,
            augmentation=config.augmentation() if split == "train" else Augmentation(),
            first_id=first_id,
        )
        for number, ((config, source), first_id) in enumerate(zip(parts, first_ids, strict=False))
    )


def _pixels(processor: Any) -> tuple[Any, tuple[int, int]]:
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:
        raise ConfigError("batches of images need a processor with an image_processor")
    to_pixels = pixels_of(image_processor)
    probe = to_pixels(Image.new("RGB", (64, 64)))
    return to_pixels, (int(probe.shape[0]), int(probe.shape[1]))


def _check_range(name: str, value: tuple[float, float], largest: float) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= largest:
        raise ConfigError(f"{name}={value} has to be two numbers in (0, {largest:g}], the smaller first")
