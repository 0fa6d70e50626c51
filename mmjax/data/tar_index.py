"""Where the samples of a tar file lie: headers are read once, then a sample is one or two positioned reads.

Members are grouped by key, the name up to the first dot of its last part, as WebDataset does. Names only
group: they are never used as paths. Links, devices and folders are ignored. Nothing a header claims is
believed before it is checked against the file's size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmjax.data.faults import FAULTS
from mmjax.data.files import MAX_IMAGE_BYTES
from mmjax.errors import DataError

MAX_TEXT_BYTES = 1 << 20
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
NO_TEXT, TXT, JSON = 0, 1, 2

_BLOCK = 512
_END = bytes(_BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_EXTRA = (b"x", b"L", b"g", b"K")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_MAX_SIZE = 2**32 - 1


class Member(NamedTuple):
    """A regular file in a tar: name, where its data begins, size in bytes, what is wrong."""

    name: str
    offset: int
    size: int
    fault: str | None = None


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Samples of one tar file, in order of first appearance; arrays of N samples.

    Args:
        image_offset: int64 [N], in bytes.
        image_size: uint32 [N], in bytes; 0: no image.
        text_offset: int64 [N].
        text_size: uint32 [N].
        text_kind: uint8 [N], NO_TEXT, TXT or JSON.
        fault: int8 [N], index into `FAULTS`; -1: none known yet.
        keys: uint8, all keys one after the other, UTF-8.
        key_ends: int64 [N], where each key ends.
    """

    image_offset: np.ndarray
    image_size: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray
    text_kind: np.ndarray
    fault: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.fault)

    def key(self, index: int) -> str:
        """The key of one sample."""
        start = int(self.key_ends[index - 1]) if index else 0
        return self.keys[start : int(self.key_ends[index])].tobytes().decode("utf-8", "replace")


DTYPES = {
    "image_offset": np.int64,
    "image_size": np.uint32,
    "text_offset": np.int64,
    "text_size": np.uint32,
    "text_kind": np.uint8,
    "fault": np.int8,
    "keys": np.uint8,
    "key_ends": np.int64,
}


def index_tar(path: Path) -> TarIndex:
    """Read all headers of a tar file.

    A file that ends inside a member or without its end mark, or whose next header is damaged, gives one
    sample that is counted as "truncated" or "corrupt"; what comes before is used.

    Args:
        path: of the tar file, not compressed.

    Returns:
        Its samples.

    Raises:
        DataError: the file cannot be read, or is no tar file at all.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            return _group(_members(handle, path))
        finally:
            os.close(handle)
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard ({error.strerror or error})") from error


def _members(handle: int, path: Path) -> Iterator[Member]:
    """Regular files of a tar in order; the last one may be a stand-in for what damage hides."""
    size, offset, found = os.fstat(handle).st_size, 0, False
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = os.pread(handle, _BLOCK, offset)
        if header == _END:
            return
        parsed = _parse(header) if len(header) == _BLOCK else None
        if parsed is None:
            if not found and len(header) == _BLOCK:
                raise DataError(f"{path}: not a tar file (compressed ones have to be unpacked)")
            yield Member(f"(byte {offset})", offset, 0, "corrupt" if len(header) == _BLOCK else "truncated")
            return
        found = True
        name, claimed, kind = parsed
        data = offset + _BLOCK
        if kind in _EXTRA:
            offset = data + _padded(claimed)
            if claimed > MAX_TEXT_BYTES or offset > size:
                yield Member(f"(byte {data})", data, 0, "truncated" if offset > size else "corrupt")
                return
            extra = os.pread(handle, claimed, data)
            if kind == b"L":
                long_name = _text(extra)
            elif kind == b"x":
                long_name, long_size = _pax(extra)
            continue
        name = name if long_name is None else long_name
        claimed = claimed if long_size is None else long_size
        long_name = long_size = None
        if kind in _WITHOUT_DATA:
            offset = data
            continue
        offset = data + _padded(claimed)
        if data + claimed > size:
            yield Member(name, data, 0, "truncated")
            return
        if kind in _REGULAR and not name.endswith("/"):
            yield Member(name, data, claimed)


def _parse(header: bytes) -> tuple[str, int, bytes] | None:
    """Name, size and kind of a header block; None where it is damaged."""
    checksum = _number(header[148:156])
    if checksum is None or checksum != sum(header) - sum(header[148:156]) + 8 * 32:
        return None
    size = _number(header[124:136])
    if size is None:
        return None
    name, kind = _text(header[:100]), header[156:157]
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return name, size, kind


def _number(field: bytes) -> int | None:
    """A size or checksum: octal digits, or base 256 with the first bit set. None: damaged or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _pax(records: bytes) -> tuple[str | None, int | None]:
    """Name and size from `LENGTH KEY=VALUE` lines; damaged lines end the search."""
    name: str | None = None
    size: int | None = None
    while records:
        length, _, rest = records.partition(b" ")
        if not length.isdigit() or len(length) > 9 or not len(length) < int(length) <= len(records):
            break
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        records = records[int(length) :]
    return name, size


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


@dataclass(slots=True)
class _Sample:
    key: str
    image: Member | None = None
    image_rank: int = len(IMAGE_EXTENSIONS)
    text: Member | None = None
    text_kind: int = NO_TEXT
    fault: str | None = None


@dataclass(slots=True)
class _Grouper:
    """Collects members into samples by key."""

    samples: list[_Sample] = field(default_factory=list)
    by_key: dict[str, _Sample] = field(default_factory=dict)

    def add(self, member: Member) -> None:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if member.fault and not (stem and dot):
            self.samples.append(_Sample(member.name, fault=member.fault))
            return
        if not stem or not dot:
            return
        key, extension = folder + slash + stem, extension.lower()
        if extension not in IMAGE_EXTENSIONS and extension not in ("txt", "json"):
            return
        sample = self.by_key.get(key)
        if sample is None:
            sample = self.by_key[key] = _Sample(key)
            self.samples.append(sample)
        if member.fault:
            sample.fault = member.fault
        elif extension in IMAGE_EXTENSIONS:
            self._add_image(sample, member, IMAGE_EXTENSIONS.index(extension))
        else:
            self._add_text(sample, member, TXT if extension == "txt" else JSON)

    def _add_text(self, sample: _Sample, member: Member, kind: int) -> None:
        """Keep the text that is preferred: TXT, but an empty one only where there is no JSON."""
        known = sample.text
        if known is None or (member.size and (kind == TXT or not known.size)):
            sample.text, sample.text_kind = member, kind

    def _add_image(self, sample: _Sample, member: Member, rank: int) -> None:
        if rank == sample.image_rank:
            self.samples.append(_Sample(sample.key, fault="duplicate_key"))
        elif rank < sample.image_rank:
            sample.image, sample.image_rank = member, rank


def _group(members: Iterator[Member]) -> TarIndex:
    grouper = _Grouper()
    for member in members:
        grouper.add(member)
    samples, nothing = grouper.samples, Member("", 0, 0)
    images = [sample.image or nothing for sample in samples]
    texts = [sample.text or nothing for sample in samples]
    keys = [sample.key.encode("utf-8", "replace") for sample in samples]
    arrays = {
        "image_offset": [image.offset for image in images],
        "image_size": [min(image.size, _MAX_SIZE) for image in images],
        "text_offset": [text.offset for text in texts],
        "text_size": [min(text.size, _MAX_SIZE) for text in texts],
        "text_kind": [sample.text_kind for sample in samples],
        "fault": [_fault(sample) for sample in samples],
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys]),
    }
    return TarIndex(**{name: np.asarray(arrays[name], dtype) for name, dtype in DTYPES.items()})


def _fault(sample: _Sample) -> int:
    image, text = sample.image, sample.text
    if sample.fault is None and image is None:
        sample.fault = "no_image"
    elif (image and image.size > MAX_IMAGE_BYTES) or (text and text.size > MAX_TEXT_BYTES):
        sample.fault = "too_large"
    return -1 if sample.fault is None else FAULTS.index(sample.fault)
