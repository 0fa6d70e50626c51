"""Labelled images, one folder per class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mmjax.data.config import DataConfig, Progress, Split, check_split
from mmjax.data.files import IMAGE_SUFFIXES, FileSource
from mmjax.data.sources import as_path, digest
from mmjax.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class ImageFolderData(DataConfig):
    """`path/<class>/<image>`: classes are the folders in sorted order.

    Args:
        path: the folder of class folders.
        test_path: the same for the test split, if any; its classes are among those of `path`.
        templates: captions, with {} where the class goes (underscores become spaces); none: no captions.
    """

    path: str
    test_path: str | None = None
    templates: tuple[str, ...] = ()
    crop_scale: tuple[float, float] | None = (0.9, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any("{}" not in template for template in self.templates):
            raise ConfigError(
                f"ImageFolderData.templates={self.templates}: each needs {{}} for the class name"
            )

    def class_names(self) -> tuple[str, ...]:
        """The class folders of `path`, sorted.

        Raises:
            DataError: the folder is missing or has no folders.
        """
        return tuple(_class_folders(as_path(self.path)))

    def source(self, split: Split = "train", progress: Progress | None = None) -> FileSource:
        """The images of one split: class after class, sorted by name.

        Raises:
            DataError: the folder is missing, has no images, or the test split has a class of its own.
            ConfigError: the split is not configured.
        """
        check_split(split)
        if split == "test" and self.test_path is None:
            raise ConfigError("ImageFolderData has no test split: set test_path")
        classes = self.class_names()
        root = as_path(self.path if split == "train" else str(self.test_path))
        folders = _class_folders(root)
        unknown = sorted(set(folders) - set(classes))
        if unknown:
            raise DataError(f"{root}: classes {', '.join(unknown[:5])} are not among those of {self.path}")
        names, labels = [], []
        for folder in folders:
            images = _images(root / folder)
            names += [f"{folder}/{image}" for image in images]
            labels += [classes.index(folder)] * len(images)
        if not names:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{root}: no images in its class folders (looked for {suffixes})")
        captions = [tuple(t.format(name.replace("_", " ")) for t in self.templates) for name in classes]
        return FileSource(
            root=root,
            names=names,
            texts=[captions[label] for label in labels],
            labels=labels,
            identity=digest("folder", classes, names, self.templates),
            has_text=bool(self.templates),
        )


def _class_folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root}: cannot list the image folder ({error.strerror or error})") from error
    if not folders:
        raise DataError(f"{root}: no class folders; images are looked for as {root}/<class>/<image>")
    return folders


def _images(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if not e.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot list the class folder ({error.strerror or error})") from error
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
