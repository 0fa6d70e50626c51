"""Several sources drawn by weight."""

from __future__ import annotations

from dataclasses import dataclass

from mmjax.data.config import DataConfig, Progress, Split
from mmjax.data.sources import Source
from mmjax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MixtureData(DataConfig):
    """Sources interleaved so that every stretch of samples holds them in proportion to their weights.

    Each source keeps its own order, epochs and augmentation; text length, threads and the allowed share of
    broken samples are the mixture's. The interleaving is regular: proportions hold within one percent.

    Args:
        sources: configurations of the sources, not mixtures themselves.
        weights: positive, one per source; None: by number of samples.
    """

    sources: tuple[DataConfig, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources or any(isinstance(source, MixtureData) for source in self.sources):
            raise ConfigError("MixtureData.sources has to name at least one source, and no mixtures")
        weights = self.weights
        if weights is not None and (len(weights) != len(self.sources) or not all(w > 0 for w in weights)):
            raise ConfigError(
                f"MixtureData.weights={weights}: give {len(self.sources)} positive numbers, one per source"
            )

    def source(self, split: Split = "train", progress: Progress | None = None) -> Source:
        """A mixture has no single source.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("MixtureData has several sources: ask one of MixtureData.sources")

    def class_names(self) -> tuple[str, ...]:
        """The classes that all sources share.

        Raises:
            ConfigError: a source has none, or they differ.
        """
        names = {source.class_names() for source in self.sources}
        if len(names) > 1:
            raise ConfigError("the sources of MixtureData have different classes")
        return names.pop()

    def parts(self, split: Split, progress: Progress | None = None) -> list[tuple[DataConfig, Source]]:
        """Every source with its configuration.

        Raises:
            ConfigError: some sources have captions and others not.
        """
        parts = [(config, config.source(split, progress)) for config in self.sources]
        without = [number for number, (_, source) in enumerate(parts) if not source.has_text]
        if without and len(without) < len(parts):
            raise ConfigError(
                f"source {without[0]} of MixtureData has no captions and others have: give it templates"
            )
        return parts

    def source_weights(self, sources: list[Source]) -> tuple[float, ...] | None:
        """The weights, or the sources' sizes."""
        if len(sources) == 1:
            return None
        return self.weights or tuple(float(len(source)) for source in sources)

    def has_labels(self, sources: list[Source]) -> bool:
        """Whether all sources have classes, and the same ones."""
        if not all(source.has_labels for source in sources):
            return False
        return len({config.class_names() for config in self.sources}) == 1
