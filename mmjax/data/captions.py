"""Images with captions from a CSV or TSV file."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from mmjax.data.config import DataConfig, Progress, Split, check_split
from mmjax.data.faults import printable
from mmjax.data.files import FileSource
from mmjax.data.sources import as_path, digest
from mmjax.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class CaptionsData(DataConfig):
    """A table with one image and one caption per row.

    Image names are relative to the table's folder, or to `root`, and cannot leave it. Rows without name or
    caption, with more fields than the header, or with a broken image are counted and replaced.

    Args:
        path: the table, UTF-8 with a header row.
        test_path: the table of the test split, if any.
        root: folder of the images; None: the table's own.
        img_key: column with the image's name.
        caption_key: column with the caption.
        separator: between columns, one character.
        group_captions: rows with the same image become one sample with several captions.
    """

    path: str
    test_path: str | None = None
    root: str | None = None
    img_key: str = "filepath"
    caption_key: str = "title"
    separator: str = "\t"
    group_captions: bool = False
    crop_scale: tuple[float, float] | None = (0.9, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separator == "\\t":  # as a shell passes it on
            object.__setattr__(self, "separator", "\t")
        if len(self.separator) != 1 or self.separator in '\r\n"':
            raise ConfigError(
                f"CaptionsData.separator={self.separator!r} has to be one character, e.g. '\\t' or ','"
            )

    def source(self, split: Split = "train", progress: Progress | None = None) -> FileSource:
        """The rows of one split.

        Raises:
            DataError: the table is missing or empty, cannot be parsed, or lacks a column.
            ConfigError: the split is not configured.
        """
        check_split(split)
        if split == "test" and self.test_path is None:
            raise ConfigError("CaptionsData has no test split: set test_path")
        path = as_path(self.path if split == "train" else str(self.test_path))
        table = read_table(path, self.img_key, self.caption_key, self.separator)
        if self.group_captions:
            table = table.grouped()
        return FileSource(
            root=as_path(self.root) if self.root else path.parent,
            names=table.names,
            texts=table.texts,
            labels=None,
            identity=digest("captions", table.digest, self.img_key, self.caption_key, self.group_captions),
            has_text=True,
            faults=table.faults,
        )


@dataclass(frozen=True)
class Table:
    """Rows of a captions table: names of images, captions, causes of malformed rows, the file's digest."""

    names: list[str]
    texts: list[tuple[str, ...]]
    faults: dict[int, str]
    digest: str

    def grouped(self) -> Table:
        """One row per image, in order of first appearance; malformed rows stay as they are."""
        names: list[str] = []
        texts: list[tuple[str, ...]] = []
        faults: dict[int, str] = {}
        row_of: dict[str, int] = {}
        for row, (name, captions) in enumerate(zip(self.names, self.texts, strict=True)):
            if row in self.faults:
                faults[len(names)] = self.faults[row]
            elif name in row_of:
                texts[row_of[name]] += captions
                continue
            else:
                row_of[name] = len(names)
            names.append(name)
            texts.append(captions)
        return Table(names, texts, faults, self.digest)


def read_table(path: Path, img_key: str, caption_key: str, separator: str) -> Table:
    """Read a table of image names and captions.

    Args:
        path: UTF-8 text with a header row; fields may be quoted with ".
        img_key: column of names.
        caption_key: column of captions.
        separator: one character.

    Returns:
        All rows but empty lines.

    Raises:
        DataError: the file is missing, empty, lacks a column, or cannot be parsed; it names file and line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the captions table ({error.strerror or error})") from error
    text = io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline="")
    reader = csv.reader(text, delimiter=separator)
    names: list[str] = []
    texts: list[tuple[str, ...]] = []
    faults: dict[int, str] = {}
    try:
        header = next(reader, [])
        image_at, caption_at = (_column(path, header, key, separator) for key in (img_key, caption_key))
        for fields in reader:
            if not fields:
                continue
            name = fields[image_at] if image_at < len(fields) else ""
            caption = fields[caption_at] if caption_at < len(fields) else ""
            if not name:
                faults[len(names)] = "no_image"
            elif len(fields) > len(header):
                faults[len(names)] = "bad_record"
            names.append(name or f"line {reader.line_num}")
            texts.append((caption,))
    except csv.Error as error:
        hint = "is a quote not closed?" if "limit" in str(error) else "is it text, with one row per line?"
        raise DataError(f"{path}, line {reader.line_num}: {error}: {hint}") from error
    if not names:
        raise DataError(f"{path}: the captions table has no rows below its header")
    return Table(names, texts, faults, hashlib.blake2b(content, digest_size=8).hexdigest())


def _column(path: Path, header: list[str], key: str, separator: str) -> int:
    if header.count(key) == 1:
        return header.index(key)
    columns = ", ".join(repr(printable(name)) for name in header[:20]) or "none"
    problem = "twice" if key in header else "no"
    raise DataError(
        f"{path}: {problem} column {key!r}; columns (separator {separator!r}): {columns}; "
        "set img_key, caption_key or separator"
    )
