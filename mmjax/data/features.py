"""Features of images, computed once by eyes that do not learn, and kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmjax.data.faults import BadSample, printable
from mmjax.data.sources import as_path
from mmjax.errors import DataError

INDEX, DATA = "features.json", "features.bin"
_FORMAT = 2
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class FeatureStore:
    """Reads what `write_features` wrote; nothing of it is held in memory.

    Attributes:
        identity: changes when the store does.
        eyes: says what computed the features: see `write_features`.

    Args:
        folder: with features.json and features.bin.

    Raises:
        DataError: a file is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = as_path(str(folder))
        try:
            content = (self.folder / INDEX).read_bytes()
            index = json.loads(content)
            if index["format"] != _FORMAT:
                raise ValueError(f"format {index['format']}")
            self._dtype = np.dtype(_DTYPES[index["dtype"]])
            self._shape = tuple(int(n) for n in index["shape"])
            self._images = {str(key): tuple(map(int, place)) for key, place in index["images"].items()}
            self.identity, self.eyes = str(index["identity"]), str(index["eyes"])
            tiles = int(index["tiles"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.folder / INDEX}: no features can be read from it ({error})") from error
        try:
            self._data = np.memmap(self.folder / DATA, self._dtype, "r", shape=(tiles, *self._shape))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder / DATA}: not the features that {INDEX} names ({error})") from error

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, key: str) -> bool:
        return key in self._images

    @property
    def shape(self) -> tuple[int, ...]:
        """[P, Dv], of a tile's features."""
        return self._shape

    def size(self, key: str) -> tuple[int, int]:
        """(height, width) of an image in pixels.

        Raises:
            BadSample: "missing_file": its features are not here.
        """
        _, _, height, width = self._place(key)
        return height, width

    def read(self, key: str, tiles: int) -> np.ndarray:
        """Features of an image, float32 [tiles, P, Dv].

        Raises:
            BadSample: they are not here, or are of another number of tiles.
        """
        first, count, *_ = self._place(key)
        if count != tiles:
            raise BadSample("bad_record", key, f"{count} tiles are kept, it has {tiles}")
        return np.asarray(self._data[first : first + count], np.float32)

    def _place(self, key: str) -> tuple[int, ...]:
        if key not in self._images:
            raise BadSample("missing_file", key, f"its features are not in {self.folder}")
        return self._images[key]


def write_features(
    folder: str | os.PathLike[str],
    images: Iterable[tuple[str, tuple[int, int], np.ndarray]],
    *,
    dtype: str = "bfloat16",
    identity: str = "",
    eyes: str = "",
) -> Path:
    """Write features as `FeatureStore` reads them; nothing is there to be read before all is written.

    Args:
        folder: made if it does not exist.
        images: (key, (height, width) in pixels, features [tiles, P, Dv]) of each.
        dtype: "bfloat16", "float16" or "float32".
        identity: what tells these features from others.
        eyes: a digest of what computed them, by which a run sees that they are of its own eyes.

    Returns:
        The folder.

    Raises:
        DataError: there are no images, or the folder cannot be written.
    """
    folder = as_path(str(folder))
    if dtype not in _DTYPES:
        raise DataError(f"dtype={dtype!r}: features are kept as {', '.join(_DTYPES)}")
    places: dict[str, tuple[int, ...]] = {}
    shape: tuple[int, ...] = ()
    tiles = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
        with (folder / DATA).open("wb") as file:
            for key, size, features in images:
                shape = shape or features.shape[1:]
                if features.shape[1:] != shape:
                    raise DataError(f"{printable(key)}: features {features.shape[1:]}, others {shape}")
                file.write(np.ascontiguousarray(features.astype(_DTYPES[dtype])).tobytes())
                places[key] = (tiles, len(features), *size)
                tiles += len(features)
        if not places:
            raise DataError(f"{folder}: there are no images whose features could be kept")
        index: Mapping[str, Any] = {
            "format": _FORMAT,
            "dtype": dtype,
            "shape": list(shape),
            "tiles": tiles,
            "identity": identity,
            "eyes": eyes,
            "images": places,
        }
        waiting = folder / f"{INDEX}.new"
        waiting.write_text(json.dumps(index), encoding="utf-8")
        waiting.replace(folder / INDEX)
    except OSError as error:
        raise DataError(f"{folder}: features cannot be written ({error.strerror or error})") from error
    return folder
