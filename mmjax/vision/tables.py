"""The table of all features that a batch's images and videos have, and how rows of it are renumbered."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmjax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureTable:
    """Which rows there are: features of images, tile by tile, those of videos, frame by frame, and a row end.

    Attributes:
        rows: P, features of a tile or a frame.
        images, tiles: I and N.
        videos, frames: V and F.

    >>> FeatureTable(rows=4, images=2, tiles=3).newline
    24
    """

    rows: int
    images: int = 0
    tiles: int = 1
    videos: int = 0
    frames: int = 1

    @property
    def first_video(self) -> int:
        """The row that the videos' features begin at."""
        return self.images * self.tiles * self.rows

    @property
    def newline(self) -> int:
        """The row of the embedding that ends rows, which is the last."""
        return self.first_video + self.videos * self.frames * self.rows

    def owners(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which image and which video each row is of: int arrays of the index's shape, -1 for none.

        Raises:
            DataError: a row that the table does not have.

        >>> FeatureTable(rows=2, images=2).owners(np.array([0, 3, 4, -1]))[0].tolist()
        [0, 1, -1, -1]
        """
        if index.size and index.max() > self.newline:
            raise DataError(f"image_index: row {index.max()} of a table whose last row is {self.newline}")
        is_image = (index >= 0) & (index < self.first_video)
        is_video = (index >= self.first_video) & (index < self.newline)
        images = np.where(is_image, index // max(self.tiles * self.rows, 1), -1)
        videos = (index - self.first_video) // max(self.frames * self.rows, 1)
        return images, np.where(is_video, videos, -1)

    def renumbered(
        self, index: np.ndarray, new: FeatureTable, images: np.ndarray, videos: np.ndarray
    ) -> np.ndarray:
        """The same rows in another table.

        Args:
            index: int [...], rows of this table; negative numbers stay.
            new: the other table, with as many tiles and frames or more.
            images, videos: int [I] and [V], the number that each image and video has there.

        Returns:
            int32 [...].

        >>> old, new = FeatureTable(rows=2, images=1), FeatureTable(rows=2, images=3, tiles=2)
        >>> old.renumbered(np.array([0, 1, 2, -1]), new, np.array([1]), np.array([])).tolist()
        [4, 5, 12, -1]
        """
        image, video = self.owners(index)
        result = np.where(index == self.newline, new.newline, index)
        stride = self.tiles * self.rows
        if self.images:
            moved = np.asarray(images)[image] * (new.tiles * new.rows) + index % stride
            result = np.where(image >= 0, moved, result)
        if self.videos:
            stride = self.frames * self.rows
            moved = np.asarray(videos)[video] * (new.frames * new.rows) + (index - self.first_video) % stride
            result = np.where(video >= 0, new.first_video + moved, result)
        return result.astype(np.int32)


__all__ = ["FeatureTable"]
