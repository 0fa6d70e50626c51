"""WebDataset tars as img2dataset writes them, read at random through an index."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.config import DataConfig, Progress, Split, check_split
from mmjax.data.faults import FAULTS, BadSample
from mmjax.data.index_cache import load_or_index
from mmjax.data.shards import find_shards
from mmjax.data.sources import Record, as_path, digest
from mmjax.data.tar_index import JSON, NO_TEXT, TarIndex
from mmjax.errors import ConfigError, DataError

_OPEN_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class WebDatasetData(DataConfig):
    """Tar shards with `KEY.jpg|jpeg|png|webp` and `KEY.txt` or `KEY.json` per sample.

    Headers are read once (or taken from `index_cache`); after that samples are read at random, so that order
    and resuming are exact. Each epoch permutes the shards, and the samples within windows of
    `shuffle_window` shards: while a window is visited only its shards are read. A larger window shuffles
    better and reads less locally; with at least as many as there are shards the shuffle is full.

    Args:
        shards: paths with braces such as `data/{00000..00007}.tar`, wildcards or folders, joined by `::` or
            in a tuple.
        test_shards: the same for the test split, if any.
        shuffle_window: shards among which samples are shuffled.
        json_caption: member of KEY.json with the caption (or a list of captions), where there is no KEY.txt.
        index_cache: folder that keeps indices between runs, by path, size and time of change; None: none.
        index_threads: shards indexed at a time.
    """

    shards: str | tuple[str, ...]
    test_shards: str | tuple[str, ...] | None = None
    shuffle_window: int = 8
    json_caption: str = "caption"
    index_cache: str | None = None
    index_threads: int = 8
    crop_scale: tuple[float, float] | None = (0.9, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shuffle_window < 1 or self.index_threads < 1:
            raise ConfigError("WebDatasetData: shuffle_window and index_threads have to be at least 1")

    def source(self, split: Split = "train", progress: Progress | None = None) -> WebDatasetSource:
        """The samples of one split, indexed.

        Args:
            split: "train" or "test".
            progress: called with (shards done, shards) while they are indexed.

        Raises:
            DataError: a shard is missing or no tar file, or there are no samples.
            ConfigError: the split is not configured, or names something that is not a local file.
        """
        check_split(split)
        if split == "test" and self.test_shards is None:
            raise ConfigError("WebDatasetData has no test split: set test_shards")
        paths = find_shards(self.shards if split == "train" else self.test_shards or ())
        cache = None if self.index_cache is None else as_path(self.index_cache)
        indices = index_shards(paths, cache, self.index_threads, progress)
        if not any(len(index) for index in indices):
            raise DataError(f"no samples in {len(paths)} shards, the first is {paths[0]}")
        return WebDatasetSource(paths, indices, self.shuffle_window, self.json_caption)


def index_shards(
    paths: Sequence[Path], cache: Path | None = None, threads: int = 8, progress: Progress | None = None
) -> list[TarIndex]:
    """Index tar files, several at a time.

    Args:
        paths: of the tar files.
        cache: folder of kept indices, or None.
        threads: files indexed at a time.
        progress: called with (done, total) after each.

    Returns:
        One index per path.

    Raises:
        DataError: a file cannot be read or is no tar file.
    """
    indices = []
    with ThreadPoolExecutor(min(threads, len(paths))) as pool:
        futures = [pool.submit(load_or_index, path, cache) for path in paths]
        try:
            for done, future in enumerate(futures, 1):
                indices.append(future.result())
                if progress is not None:
                    progress(done, len(paths))
        finally:
            for future in futures:
                future.cancel()
    return indices


@dataclass(frozen=True, eq=False)
class WebDatasetSource:
    """Random access to the samples of indexed shards.

    Args:
        paths: of the shards.
        indices: one per shard.
        window: shards among which samples are shuffled.
        json_caption: member of a sample's JSON with its caption.
    """

    paths: Sequence[Path]
    indices: Sequence[TarIndex]
    window: int
    json_caption: str
    has_text: bool = True
    has_labels: bool = False
    _starts: np.ndarray = field(init=False, repr=False)
    _files: _OpenFiles = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.cumsum([0, *self.shard_sizes]))
        object.__setattr__(self, "_files", _OpenFiles(_OPEN_SHARDS))

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(len(index) for index in self.indices)

    @property
    def identity(self) -> str:
        """Changes with any shard's name or with the place of any sample."""
        shards = zip(self.paths, self.indices, strict=True)
        parts = [
            (path.name, digest(index.image_offset.tobytes(), index.fault.tobytes())) for path, index in shards
        ]
        return digest("webdataset", parts, self.json_caption)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Record:
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        index, row = self.indices[shard], number - int(self._starts[shard])
        name = f"{self.paths[shard].name}/{index.key(row)}"
        if index.fault[row] >= 0:
            raise BadSample(FAULTS[index.fault[row]], name)
        file = self._files.get(self.paths[shard])
        image = file.read(int(index.image_offset[row]), int(index.image_size[row]), name)
        texts: tuple[str, ...] = ()
        if index.text_kind[row] != NO_TEXT:
            text = file.read(int(index.text_offset[row]), int(index.text_size[row]), name)
            texts = self._captions(text, name) if index.text_kind[row] == JSON else (_decoded(text, name),)
        return Record(image=image, texts=texts, label=None, name=name)

    def _captions(self, text: bytes, name: str) -> tuple[str, ...]:
        try:
            content: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample("bad_record", name, "invalid JSON") from error
        value = content.get(self.json_caption) if isinstance(content, dict) else content
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not isinstance(content, dict) or not all(isinstance(item, str) for item in values):
            raise BadSample("bad_record", name, f"{self.json_caption} in its JSON is not text")
        return tuple(values)


def _decoded(text: bytes, name: str) -> str:
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("bad_record", name, "its caption is not UTF-8") from error


class _OpenFile:
    """A file descriptor that closes with its last reference: readers in other threads keep it open."""

    def __init__(self, path: Path) -> None:
        self._handle = -1
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    def read(self, offset: int, size: int, name: str) -> bytes:
        """`size` bytes from `offset`; BadSample "truncated" where the file has become shorter."""
        data = os.pread(self._handle, size, offset)
        while len(data) < size:
            more = os.pread(self._handle, size - len(data), offset + len(data))
            if not more:
                raise BadSample("truncated", name, "the shard became shorter")
            data += more
        return data


class _OpenFiles:
    """The files used last, open."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()

    def get(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(path)
                if len(self._files) > self._most:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return file
