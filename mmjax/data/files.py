"""Image files named by data: names that cannot leave their folder, reads that cannot hang or grow."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from mmjax.data.faults import BadSample
from mmjax.data.sources import Record

MAX_IMAGE_BYTES = 256 << 20
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"}
)

_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a named pipe must not hold up the run
)


def safe_path(root: Path, name: str) -> Path:
    """Where a name from data lies, if that is inside the root.

    Absolute names, `..`, drive letters, NUL and symbolic links that lead out are refused, with slashes of
    either kind and on every system alike.

    Args:
        root: the data folder.
        name: relative, as the data gives it.

    Returns:
        The path with all symbolic links resolved; it need not exist.

    Raises:
        BadSample: "unsafe_path".

    >>> safe_path(Path("/data"), "a/b.jpg").name
    'b.jpg'
    """
    windows = PureWindowsPath(name)
    if (
        "\0" in name
        or windows.drive
        or windows.root
        or PurePosixPath(name).is_absolute()
        or ".." in windows.parts
    ):
        raise BadSample("unsafe_path", name)
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, name))
    if os.path.commonpath([real_root, real]) != real_root:
        raise BadSample("unsafe_path", name, "a symbolic link leads out of the data folder")
    return Path(real)


def read_file(path: Path, name: str, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """All bytes of a regular file.

    Args:
        path: from `safe_path`.
        name: for messages.
        limit: most bytes that are read.

    Raises:
        BadSample: "missing_file", "unreadable" (no permission, or a folder, pipe or device), "too_large".
    """
    try:
        handle = os.open(path, _OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing_file", name) from error
    except OSError as error:
        raise BadSample("unreadable", name, error.strerror or "") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("unreadable", name, "not a regular file")
        if status.st_size > limit:
            raise BadSample("too_large", name, f"{status.st_size} bytes")
        with open(handle, "rb", closefd=False) as file:
            return file.read(limit)
    except OSError as error:
        raise BadSample("unreadable", name, error.strerror or "") from error
    finally:
        os.close(handle)


def image_file(root: Path, name: str) -> Path:
    """The path of an image that is there to be read; nothing of it is read yet.

    Args:
        root, name: as in `safe_path`.

    Raises:
        BadSample: "unsafe_path", "missing_file", "unreadable", "empty", "too_large".
    """
    path = safe_path(root, name)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing_file", name) from error
    except OSError as error:
        raise BadSample("unreadable", name, error.strerror or "") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadSample("unreadable", name, "not a regular file")
    if not status.st_size:
        raise BadSample("empty", name)
    if status.st_size > MAX_IMAGE_BYTES:
        raise BadSample("too_large", name, f"{status.st_size} bytes")
    return path


@dataclass(frozen=True)
class FileSource:
    """Samples whose images are files below one folder.

    Args:
        root: the folder.
        names: of the files, relative to it.
        texts: captions per file.
        labels: class per file, None without classes.
        identity: what tells these samples from others.
        has_text: whether files have captions.
        faults: cause by sample number, for samples known to be broken.
    """

    root: Path
    names: Sequence[str]
    texts: Sequence[tuple[str, ...]]
    labels: Sequence[int] | None
    identity: str
    has_text: bool
    faults: Mapping[int, str] = field(default_factory=dict)
    window: int = 1

    @property
    def has_labels(self) -> bool:
        """Whether files have classes."""
        return self.labels is not None

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """All files are one shard: they are shuffled among each other."""
        return (len(self.names),)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        name = self.names[index]
        if index in self.faults:
            raise BadSample(self.faults[index], name)
        data = read_file(safe_path(self.root, name), name)
        label = None if self.labels is None else self.labels[index]
        return Record(image=data, texts=self.texts[index], label=label, name=name)
