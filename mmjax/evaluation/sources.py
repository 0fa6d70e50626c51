"""What the command line calls data: the samples that a name stands for, and image files named one by one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmjax.data.examples import Examples
from mmjax.data.sources import ListSource, Record, digest
from mmjax.errors import DataError

# Names that a folder's splits go by, when it has any.
_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples to measure a model on.

    Attributes:
        kind: "digits", "folder", "csv" or "webdataset".
        examples: the samples, for random access.
        class_names: [C] names by label, None for captioned data.
        templates: prompts that suit the class names, None for the usual ones.
    """

    kind: str
    examples: Examples
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None


def kind_of(source: str) -> str:
    """What a source is, from its name and what lies there.

    Args:
        source: "digits", a path, or a pattern of tar files.

    Returns:
        "digits", "folder", "csv" or "webdataset".

    Raises:
        DataError: nothing by that name.

    Example:
        >>> kind_of("digits"), kind_of("pairs.tsv"), kind_of("{000..007}.tar")
        ('digits', 'csv', 'webdataset')
    """
    path = Path(source).expanduser()
    if source == "digits":
        return "digits"
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if path.is_dir():
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    if path.suffix.lower() == ".tar" or "::" in source or "{" in source:
        return "webdataset"
    raise DataError(
        f"{source}: no such data; give 'digits', a folder of class folders, a .csv or .tsv file, or .tar "
        "files"
    )


def open_dataset(
    source: str,
    *,
    kind: str = "auto",
    split: str | None = None,
    img_key: str = "filepath",
    caption_key: str = "title",
    separator: str | None = None,
    image_root: str | None = None,
) -> Dataset:
    """Open data by name.

    Args:
        source: see kind_of.
        kind: "auto", or what the source is.
        split: "train" or "test" for the digits and for a folder with folders `train` and `test` (or `val`,
            `valid`, `validation`), where None means "test"; other sources have no splits.
        img_key: column of image paths in a table.
        caption_key: column of captions; rows of one image become one sample.
        separator: column separator; None: a tab for .tsv, a comma otherwise.
        image_root: folder of the image paths; None: the table's own.

    Raises:
        DataError: the data is not there, or not what it should be; ConfigError: options that do not fit.
    """
    kind = kind_of(source) if kind == "auto" else kind
    if kind == "digits":
        from mmjax.data.digits import DigitsData

        digits = DigitsData()
        examples = digits.examples("train" if split == "train" else "test")
        return Dataset(
            kind=kind, examples=examples, class_names=digits.class_names(), templates=digits.templates
        )
    if kind == "folder":
        return _open_folder(Path(source).expanduser(), split)
    if split is not None:
        raise DataError(
            f"{source}: has no splits; leave the split out and name the data of each split itself"
        )
    if kind == "csv":
        from mmjax.data.captions import CaptionsData

        tabs = Path(source).suffix.lower() == ".tsv"
        table = CaptionsData(
            path=source,
            root=image_root,
            img_key=img_key,
            caption_key=caption_key,
            separator=separator or ("\t" if tabs else ","),
            group_captions=True,
        )
        return Dataset(kind=kind, examples=table.examples("train"))
    if kind == "webdataset":
        from mmjax.data.webdataset import WebDatasetData

        return Dataset(kind=kind, examples=WebDatasetData(shards=source).examples("train"))
    raise DataError(f"no kind of data {kind!r}: choose auto, digits, folder, csv or webdataset")


def _open_folder(folder: Path, split: str | None) -> Dataset:
    from mmjax.data.folders import ImageFolderData

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    splits = split_folders(folder)
    if not splits and split is not None:
        raise DataError(f"{folder}: has no folders train and test to choose the split {split!r} from")
    if splits and (split or "test") not in splits:
        raise DataError(f"{folder}: no folder for the {split or 'test'} split, only for {', '.join(splits)}")
    data = ImageFolderData(path=str(splits[split or "test"] if splits else folder))
    names = tuple(name.replace("_", " ") for name in data.class_names())
    return Dataset(kind="folder", examples=data.examples("train"), class_names=names)


def split_folders(folder: Path) -> dict[str, Path]:
    """The split folders of a folder that has nothing else, by split; empty for a folder of classes."""
    found = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if not found <= {name for names in _SPLITS.values() for name in names}:
        return {}
    return {
        split: folder / name for split, names in _SPLITS.items() for name in reversed(names) if name in found
    }


def image_files(paths: Sequence[str | os.PathLike[str]]) -> Examples:
    """Image files named one by one, as samples without captions.

    Args:
        paths: the files, which have to exist.

    Raises:
        DataError: none given, or one is no file.
    """
    if not paths:
        raise DataError("no image given")
    for path in paths:
        if Path(path).is_dir():
            raise DataError(
                f"{path}: is a folder; name the images inside, or use --data for a folder of classes"
            )
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file")
    records = [Record(image=os.fspath(path), texts=(), label=None, name=os.fspath(path)) for path in paths]
    source: Any = ListSource(
        records, identity=digest(*(os.fspath(path) for path in paths)), has_text=False, has_labels=False
    )
    return Examples((source,))
