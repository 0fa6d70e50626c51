"""Tar indices kept in a folder between runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np

from mmjax.data.faults import FAULTS
from mmjax.data.sources import digest
from mmjax.data.tar_index import DTYPES, TarIndex, index_tar
from mmjax.errors import DataError

_VERSION = 1


def load_or_index(path: Path, cache: Path | None) -> TarIndex:
    """The index of a tar file, from the cache where it has one for this path, size and time of change.

    A damaged or outdated entry is made anew; entries are written whole or not at all.

    Args:
        path: of the tar file.
        cache: folder of kept indices, made if missing; None: always index.

    Raises:
        DataError: the tar file cannot be read or is no tar file, or the folder cannot be written.
    """
    if cache is None:
        return index_tar(path)
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard ({error.strerror or error})") from error
    name = digest(_VERSION, FAULTS, str(path.absolute()), status.st_size, status.st_mtime_ns)
    entry = cache / f"{name}.npz"
    index = _load(entry, status.st_size)
    if index is None:
        index = index_tar(path)
        _save(entry, index)
    return index


def _load(entry: Path, size: int) -> TarIndex | None:
    """The kept index; None where there is none, or one that cannot be of a tar file of this size."""
    try:
        with open(entry, "rb") as file, np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in DTYPES}
    except Exception:  # a damaged file can raise nearly anything
        return None
    index = TarIndex(**arrays)
    counts = {len(array) if array.ndim == 1 else -1 for name, array in arrays.items() if name != "keys"}
    if counts != {len(index)} or any(arrays[name].dtype != dtype for name, dtype in DTYPES.items()):
        return None
    return index if _fits(index, size) else None


def _fits(index: TarIndex, size: int) -> bool:
    ends = index.key_ends
    if len(index) == 0:
        return len(index.keys) == 0
    parts = ((index.image_offset, index.image_size), (index.text_offset, index.text_size))
    inside = all(offset.min() >= 0 and (offset + length).max() <= size for offset, length in parts)
    known = index.fault.min() >= -1 and index.fault.max() < len(FAULTS)
    return bool(
        inside and known and ends[0] >= 0 and ends[-1] == len(index.keys) and (np.diff(ends) >= 0).all()
    )


def _save(entry: Path, index: TarIndex) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent, prefix=".index-")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **{name: getattr(index, name) for name in DTYPES})
            os.replace(temporary, entry)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise DataError(
            f"{entry.parent}: cannot keep the index of shards there ({error.strerror})"
        ) from error
