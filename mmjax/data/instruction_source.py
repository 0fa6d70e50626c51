"""Conversations of a split for random access: measured once, read with their images when they are wanted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data.faults import BadSample, cause_of
from mmjax.data.features import FeatureStore
from mmjax.data.files import image_file, read_file
from mmjax.data.instruction_layout import Turns, expand, turns_of
from mmjax.data.instruction_rows import Instruction, parse_row
from mmjax.errors import DataError, MmjaxError
from mmjax.vision.anyres import Layout
from mmjax.vision.images import image_size, open_image


@dataclass(frozen=True, eq=False)
class Entry:
    """One row as it was found: its JSON, the folder of its images, and its name for messages."""

    data: bytes
    root: Path
    name: str


class KeptTokens:
    """Tokens of conversations, of as many as there is room for; any thread may ask and add.

    Conversations that say the same, such as one question about many images, are kept once.

    Args:
        room: most tokens; each takes five bytes.
    """

    def __init__(self, room: int = 1 << 26) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._found: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def of(self, talk: Instruction, lay_out: Callable[[], tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [T] of a conversation, and which are learned, bool [T].

        Args:
            talk: the conversation.
            lay_out: gives both, where they were not kept.
        """
        key = hashlib.blake2b(json.dumps(talk.messages).encode(), digest_size=16).digest()
        found = self._found.get(key)
        if found is not None:
            return found
        ids, learned = lay_out()
        made = np.asarray(ids, np.int32), np.asarray(learned) != 0
        with self._lock:  # another thread may have laid out the same
            if key not in self._found and self._room >= len(made[0]):
                self._room -= len(made[0])
                self._found[key] = made
        return made


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversations:
    """The rows of a split and the processor that turns them into tokens and pixels.

    Args:
        entries: the rows.
        processor: as `LlavaProcessor`, its tokenizer with the chat template that is wanted.
        image_first: see `parse_row`.
        length: longer conversations are cut to so many tokens.
        features: features of the images, in place of their pixels; None: the images are read.
        tokens: of conversations that were laid out before, so that it is done once.
    """

    entries: Sequence[Entry]
    processor: Any
    image_first: bool
    length: int
    features: FeatureStore | None = None
    tokens: KeptTokens = dataclasses.field(default_factory=KeptTokens)

    def __len__(self) -> int:
        return len(self.entries)

    def check_names(self) -> None:
        """Refuse rows whose images lie in several folders: features are kept under the images' names.

        Raises:
            DataError: there are several.
        """
        roots = dict.fromkeys(entry.root for entry in self.entries)
        if len(roots) > 1:
            first, other, *_ = roots
            raise DataError(
                f"features are kept by the names of images, which lie in {first} and in {other}: set images "
                "to one folder and name them from there"
            )

    def measure(self, number: int) -> tuple[int, int]:
        """How many tokens and how many tiles a conversation has; its images are not decoded.

        Raises:
            BadSample: it cannot be used.
        """
        entry = self.entries[number]
        talk = self._talk(entry)
        layouts = self.layouts(self._sizes(entry, talk))
        turns = self._expanded(talk, layouts, entry)
        if not turns.learned[: self.length].any():
            raise BadSample("bad_record", entry.name, f"nothing to learn in its first {self.length} tokens")
        return len(turns.ids), sum(layout.tiles for layout in layouts)

    def read(self, number: int) -> Turns:
        """A conversation with the pixels, or the features, of its images.

        Raises:
            BadSample: it cannot be used.
        """
        entry = self.entries[number]
        talk = self._talk(entry)
        if self.features is not None and talk.images:
            layouts = self.layouts(self._sizes(entry, talk))
            tiles = [
                self.features.read(self.key(name, len(talk.images)), layout.tiles)
                for name, layout in zip(talk.images, layouts, strict=True)
            ]
            turns = self._expanded(talk, layouts, entry)
            return dataclasses.replace(turns, tiles=np.concatenate(tiles)).cut(self.length)
        images, talk = self.images(number), self._talk(entry)
        layouts = self.layouts([(image.height, image.width) for image in images])
        return self._seen(talk.messages, images, layouts, entry.name).cut(self.length)

    def _seen(self, messages: Any, images: Sequence[Any], layouts: Sequence[Layout], name: str) -> Turns:
        """A conversation with its tiles."""
        try:
            sample = self.processor.encode(messages, images or None, return_assistant_tokens_mask=True)
        except DataError as error:
            raise BadSample(_cause(error), name, str(error)) from error
        return turns_of(sample, self.processor.image_tokens.rows, [layout.tiles for layout in layouts])

    def pictures(self, number: int) -> list[tuple[str, tuple[int, int], np.ndarray]]:
        """A conversation's images, each as its key, its (height, width) in pixels, and its tiles [n, ...].

        Raises:
            BadSample: one cannot be read.
        """
        images, names = self.images(number), self.names(number)
        if not images:
            return []
        layouts = self.layouts([(image.height, image.width) for image in images])
        entry = self.entries[number]
        turns = self._seen(self._talk(entry).messages, images, layouts, entry.name)
        ends = np.cumsum([layout.tiles for layout in layouts])
        return [
            (self.key(name, len(names)), (image.height, image.width), turns.tiles[end - layout.tiles : end])  # type: ignore[index]
            for name, image, layout, end in zip(names, images, layouts, ends, strict=True)
        ]

    def names(self, number: int) -> tuple[str, ...]:
        """Names of a conversation's images."""
        return self._talk(self.entries[number]).images

    def images(self, number: int) -> list[Image.Image]:
        """A conversation's images, upright.

        Raises:
            BadSample: one cannot be read.
        """
        entry = self.entries[number]
        found = []
        for name in self._talk(entry).images:
            try:
                found.append(open_image(read_file(image_file(entry.root, name), name), exif=True))
            except (DataError, OSError) as error:
                # By its number the row is found in its file.
                where, detail = f"{entry.name}: {name}", getattr(error, "detail", "")
                raise BadSample(cause_of(error), where, detail) from error
        return found

    def layouts(self, sizes: Sequence[tuple[int, int]]) -> list[Layout]:
        """How images of these sizes (height, width), all of one conversation, become tokens."""
        return [self.processor.image_tokens.layout(size, len(sizes)) for size in sizes]

    def key(self, name: str, companions: int) -> str:
        """What an image's features are kept under: they depend on whether it is cut into tiles."""
        cut = self.processor.image_tokens.is_cut(companions)
        return name if cut or not self.processor.image_tokens.tiled else f"{name}\0whole"

    def _talk(self, entry: Entry) -> Instruction:
        return parse_row(entry.data, entry.name, image_first=self.image_first)

    def _sizes(self, entry: Entry, talk: Instruction) -> list[tuple[int, int]]:
        """Sizes of the images, from their headers; where all images are one tile, they are not looked at."""
        if self.features is not None:
            return [self.features.size(self.key(name, len(talk.images))) for name in talk.images]
        paths = [image_file(entry.root, name) for name in talk.images]
        if not self.processor.image_tokens.tiled:
            return [(1, 1)] * len(paths)
        sizes = []
        for path, name in zip(paths, talk.images, strict=True):
            try:
                sizes.append(image_size(path, exif=True))
            except DataError as error:
                raise BadSample(cause_of(error), name) from error
        return sizes

    def _expanded(self, talk: Instruction, layouts: Sequence[Layout], entry: Entry) -> Turns:
        processor, name = self.processor, entry.name
        try:
            ids, learned = self.tokens.of(talk, lambda: processor.conversation(talk.messages, True, {}))
        except MmjaxError as error:  # the template, too, may refuse what a row says
            raise BadSample(_cause(error), name, str(error)) from error
        places = int((ids == processor.image_token_id).sum())
        if places != len(layouts):
            raise BadSample("bad_record", name, f"the template shows {places} of {len(layouts)} images")
        return expand(ids, learned, processor.image_token_id, layouts, processor.image_tokens.rows)


def _cause(error: MmjaxError) -> str:
    cause = cause_of(error)
    return "bad_record" if cause == "unreadable" else cause
