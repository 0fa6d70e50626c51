"""Images and videos out of what callers give: lists, nested lists, and parts of messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.errors import DataError

_PARTS = ("text", "image", "video")
_SOURCES = ("image", "video", "path", "url")


def pull_media(
    messages: Any, images: Sequence[Any], videos: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """A conversation without pictures in it, and its images and videos in order.

    Args:
        messages: whose contents may have parts {"type": "image"} and {"type": "video"}, each with its source
            (a path, an image, frames) under "image", "video", "path" or "url", or without one.
        images, videos: for the parts without a source, in order.

    Returns:
        The messages, texts as parts; all images; all videos.

    Raises:
        DataError: parts without a source are not as many as images or videos are given, or `check_messages`.

    >>> said = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "image"}]}]
    >>> pull_media(said, ["b.png"], [])[1]
    ['a.png', 'b.png']
    """
    check_messages(messages)
    waiting = {"image": list(images), "video": list(videos)}
    found: dict[str, list[Any]] = {"image": [], "video": []}
    missing = {"image": 0, "video": 0}

    def pulled(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in found:
            return part
        source = next((part[name] for name in _SOURCES if part.get(name) is not None), None)
        if source is None and waiting[kind]:
            source = waiting[kind].pop(0)
        elif source is None:
            missing[kind] += 1
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            raise DataError(f"messages: {source[:100]!r} is not fetched; give a file or an image")
        found[kind].append(source)
        return {name: value for name, value in part.items() if name not in _SOURCES}

    chat = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            message = {**message, "content": [pulled(part) for part in content]}
        chat.append(message)
    for kind, left in waiting.items():
        if left or missing[kind]:
            here = len(found[kind])
            raise DataError(
                f"messages: {here} {kind} parts ({missing[kind]} of them without a {kind}), and {len(left)} "
                f"{kind}s are left over; give one {kind} for each part {{'type': '{kind}'}}"
            )
    return chat, found["image"], found["video"]


def check_messages(messages: Any) -> None:
    """Refuse what a template would show as nothing.

    Raises:
        DataError: no list of messages, a message that says nothing, or a part of an unknown kind.

    >>> check_messages([{"role": "user", "content": [{"type": "text", "text": "hello"}]}])
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise DataError(f"messages: expected a list of messages, got a {type(messages).__name__}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"messages: message {number} is a {type(message).__name__}, not a dict")
        content = message.get("content")
        if content is None and not set(message) - {"role", "content"}:
            raise DataError(f"messages: message {number} has no content")
        for part in content if isinstance(content, list | tuple) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in _PARTS:
                raise DataError(
                    f"messages: message {number} has a part of type {kind!r}; give parts such as "
                    '{"type": "text", "text": ...} and {"type": "image", "image": ...}'
                )


def groups_of(media: Any, counts: Sequence[int], what: str) -> list[list[Any]]:
    """Images as a list for each text.

    Args:
        media: None, one, a list, or a list with a list for each text.
        counts: how many each text has a place for.
        what: "image" or "video", for messages.

    Raises:
        DataError: more or fewer than places.

    >>> groups_of(["a.png", "b.png", "c.png"], [2, 0, 1], "image")
    [['a.png', 'b.png'], [], ['c.png']]
    """
    if is_nested(media) and what == "image":
        groups = [list(g) if isinstance(g, list | tuple) else [g] for g in media]
        if len(groups) != len(counts):
            # As a call without places may have it: lists only of texts that have images.
            groups = _spread([g for g in groups if g], counts)
    else:
        one = what == "video" and isinstance(media, np.ndarray) and media.ndim == 4
        flat = [] if media is None else list(media) if is_many(media) and not one else [media]
        if len(flat) != sum(counts):
            raise DataError(
                f"{what}s: {len(flat)} given, but the texts have {sum(counts)} {what} places "
                f"({', '.join(map(str, counts))}); give as many"
            )
        groups = []
        for count in counts:
            groups.append(flat[:count])
            flat = flat[count:]
    for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
        if len(group) != count:
            raise DataError(f"{what}s: text {number} has {count} {what} places, but {len(group)} {what}s")
    return groups


def is_many(media: Any) -> bool:
    """Whether this is several images and not one.

    >>> is_many(["a.png"]), is_many(np.zeros((4, 4, 3))), is_many(np.zeros((2, 4, 4, 3)))
    (True, False, True)
    """
    return isinstance(media, list | tuple) or (isinstance(media, np.ndarray) and media.ndim == 4)


def _spread(groups: list[list[Any]], counts: Sequence[int]) -> list[list[Any]]:
    left = list(groups)
    spread = [left.pop(0) if count and left else [] for count in counts]
    if left:
        raise DataError(
            f"images: lists for {len(groups)} texts, but only {sum(map(bool, counts))} have images"
        )
    return spread


def is_nested(images: Any) -> bool:
    """Whether images are a list of lists.

    >>> is_nested([["a.png"], []]), is_nested(["a.png"])
    (True, False)
    """
    return isinstance(images, list | tuple) and any(isinstance(part, list | tuple) for part in images)


def as_list(media: Any) -> list[Any]:
    """None, one, or several as a list.

    >>> as_list(None), as_list("a.png")
    ([], ['a.png'])
    """
    if media is None:
        return []
    return list(media) if isinstance(media, list | tuple) else [media]


def places(messages: Any, kind: str) -> int:
    """How many parts of a conversation wait for an image (or a video) of the caller's.

    >>> places([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], "image")
    1
    """
    parts = [
        part
        for message in (messages if isinstance(messages, list | tuple) else ())
        if isinstance(message, dict) and isinstance(message.get("content"), list | tuple)
        for part in message["content"]
    ]
    return sum(
        isinstance(part, dict)
        and part.get("type") == kind
        and all(part.get(name) is None for name in _SOURCES)
        for part in parts
    )


__all__ = ["as_list", "check_messages", "groups_of", "is_many", "is_nested", "places", "pull_media"]
