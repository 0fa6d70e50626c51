"""Rows of instruction data, as LLaVA's JSON or chat messages have them: read, checked, made messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmjax.data.faults import BadSample, printable
from mmjax.data.files import read_file
from mmjax.errors import DataError

SLOT = "<image>"
MAX_TABLE_BYTES = 16 << 30
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Instruction:
    """One conversation.

    Attributes:
        messages: [{"role", "content"}]; a content is a text, or a list of {"type": "text", "text"} and
            {"type": "image"}.
        images: names of the images, in the order of their places.
    """

    messages: list[dict[str, Any]]
    images: tuple[str, ...]


def read_rows(path: Path) -> Iterator[tuple[str, bytes | BadSample]]:
    """The rows of one file, each with a name that says which it is.

    Args:
        path: a .json file, a list of rows; or any other, a row a line.

    Yields:
        (name, JSON of the row); where the file cannot be read, why.

    Raises:
        DataError: a .json file that is no list.
    """
    try:
        data = read_file(path, path.name, MAX_TABLE_BYTES)
    except BadSample as error:
        yield path.name, error
        return
    if path.suffix != ".json":
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                yield f"{path.name}, line {number}", line
        return
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = printable(" ".join(str(error).split()))
        raise DataError(f"{path}: not valid JSON ({reason}); rows of one line each go into .jsonl") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    del data
    for number, row in enumerate(rows, start=1):
        # Text again, which takes a fraction of the memory that the objects do.
        yield f"{path.name}, row {number}", json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")


def parse_row(data: bytes, name: str, *, image_first: bool = True) -> Instruction:
    """One row as a conversation.

    In LLaVA's rows `<image>` marks where an image stands. In chat messages parts of type "image" do, and
    `<image>` is a text as any other.

    Args:
        data: JSON, {"conversations": [{"from": "human" | "gpt", "value": ...}]} or {"messages": [{"role",
            "content"}]}; with "image" or "images", a name or a list of names; null, "" and [] are none. A
            part {"type": "image", "image": name} brings its own.
        name: of the row, for messages.
        image_first: a message's only `<image>` moves to its beginning, as in LLaVA's training.

    Raises:
        BadSample: "bad_record" for what cannot be understood; "no_image" where there are fewer images than
            places for them, "unplaced_image" where there are more; "empty" where nobody says anything.

    >>> said = [{"from": "human", "value": "What?\\n<image>"}, {"from": "gpt", "value": "A cat."}]
    >>> row = json.dumps({"image": "a.jpg", "conversations": said}).encode()
    >>> parse_row(row, "row 1").messages[0]["content"]
    [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
    """
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_record", name, "not JSON in UTF-8") from error
    if not isinstance(row, dict):
        raise BadSample("bad_record", name, f"expected an object, found {type(row).__name__}")
    if "conversations" in row:
        messages = _llava(row["conversations"], name, image_first)
    elif "messages" in row:
        messages = _messages(row["messages"], name)
    else:
        raise BadSample("bad_record", name, "it has neither conversations nor messages")
    _check_turns(messages, name)
    return Instruction(*_place_images(messages, _names(row, name), name))


def _llava(turns: Any, name: str, image_first: bool) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise BadSample("bad_record", name, "conversations is no list")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise BadSample("bad_record", name, f"conversations[{number}] has no text under value")
        role = _ROLES.get(str(turn.get("from")))
        if role is None:
            raise BadSample("bad_record", name, f"conversations[{number}] is not from human, gpt or system")
        text = turn["value"]
        content: Any = text if role == "assistant" or SLOT not in text else split_slots(text, image_first)
        messages.append({"role": role, "content": content})
    # Some published rows begin with an answer, which LLaVA's training leaves out too.
    return messages[1:] if messages and messages[0]["role"] == "assistant" else messages


def split_slots(text: str, image_first: bool = True) -> list[dict[str, Any]]:
    """A text with `<image>` in it as parts of a message.

    Line breaks between images at the beginning and after them are the template's to write.

    Args:
        text: holds `<image>` any number of times.
        image_first: where there is one, it moves to the beginning, and white space round the text goes.

    >>> split_slots("Is <image> like <image>?")[1:3]
    [{'type': 'image'}, {'type': 'text', 'text': ' like '}]
    """
    if image_first and text.count(SLOT) == 1:
        text = SLOT + text.replace(SLOT, "").strip()
    parts: list[dict[str, Any]] = []
    seen = False
    for number, piece in enumerate(text.split(SLOT)):
        if number:
            parts.append({"type": "image"})
        piece = piece if seen else piece.removeprefix("\n") if number else piece
        if piece.strip() or (seen and piece):
            seen = True
            parts.append({"type": "text", "text": piece})
    return parts


def _messages(given: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(given, list):
        raise BadSample("bad_record", name, "messages is no list")
    messages = []
    for number, message in enumerate(given):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            raise BadSample("bad_record", name, f"messages[{number}] has no role")
        content = message.get("content")
        if isinstance(content, list):
            content = [_part(part, f"messages[{number}]", name) for part in content]
        elif not isinstance(content, str):
            raise BadSample("bad_record", name, f"messages[{number}] has no content")
        messages.append({"role": role, "content": content})
    return messages


def _part(part: Any, where: str, name: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        return {"type": "image", **{key: part[key] for key in ("image",) if key in part}}
    raise BadSample("bad_record", name, f"{where} has a part that is neither text nor image")


def _check_turns(messages: list[dict[str, Any]], name: str) -> None:
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in spoken:
        raise BadSample("empty", name, "nobody answers in it")
    if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(spoken)):
        raise BadSample("bad_record", name, "user and assistant have to take turns")


def _names(row: Mapping[str, Any], name: str) -> list[str]:
    # Tables with both columns leave one of them null or empty, and both where a row has no image.
    given = [row[key] for key in ("image", "images") if row.get(key) not in (None, "", [])]
    value = given[0] if given else []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(each, str) and each for each in names):
        raise BadSample("bad_record", name, "image is neither a name nor a list of names")
    if row.get("video") is not None:
        raise BadSample("bad_record", name, "it has a video; only images are read")
    return names


def _place_images(
    messages: list[dict[str, Any]], names: list[str], name: str
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The messages with bare image parts, and the name of the image in each of these."""
    waiting, found = list(names), []
    slots = [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
    for part in slots:
        own = part.pop("image", None)
        if own is not None and not (isinstance(own, str) and own):
            raise BadSample("bad_record", name, "an image part's image is no name")
        found.append(own or (waiting.pop(0) if waiting else None))
    missing = found.count(None)
    counts = f"{len(slots)} places for images, {len(names)} images"
    if missing:
        raise BadSample("no_image", name, counts)
    if waiting:
        raise BadSample("unplaced_image", name, counts)
    return messages, tuple(each for each in found if each is not None)
