"""Conversations to prompts: the folder's template renders them, and what people typed stays text.

A template writes special tokens round the messages. If a message contains the same characters, the rendered
text alone cannot tell who wrote them. So before rendering, what looks like a control token in a message is
cut with a mark (a noncharacter that no message contains), and the text is tokenized piece by piece between
the marks that matter. A conversation without such text is rendered and tokenized in one piece, as
transformers does.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.errors import DataError
from mmjax.language.templates import ChatTemplate, plain_data

# Unicode's noncharacters: no text has a reason to contain one.
_MARKS = tuple(chr(number) for number in range(0xFDD0, 0xFDEE))
_REASONING = ("reasoning_content", "thinking", "reasoning")
# The last two stand for where a message begins and ends.
_BEGIN, _END = "\ufdee", "\ufdef"
_OPEN_END = f"{_END}final message ends here{_END} "


@dataclasses.dataclass(frozen=True)
class ControlTokens:
    """Which texts a tokenizer turns into control tokens.

    Args:
        special: the special tokens.
        written: other added tokens that the template writes, such as tags of tool calls. An assistant's own
            message may contain them, since templates look for them there; nobody else's may.
    """

    special: tuple[str, ...]
    written: tuple[str, ...] = ()

    @classmethod
    def of(cls, added: Iterable[tuple[str, bool]], template: ChatTemplate) -> ControlTokens:
        """The control tokens among a tokenizer's added tokens (text, whether it is special)."""
        added, literals = list(added), template.literals()
        plain = (text for text, special in added if not special and text.strip() and text in literals)
        return cls(tuple(text for text, special in added if special and text.strip()), tuple(plain))

    @property
    def all(self) -> tuple[str, ...]:
        """Both kinds."""
        return self.special + self.written


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """A conversation as the template writes it.

    Args:
        template: of the folder.
        messages: each with "role" and "content", a text or a list of {"type": "text", "text": ...} and
            {"type": "image"}; other keys are the template's business. Keys whose value is None are left out.
        add_generation_prompt: end with what begins the assistant's next message.
        continue_final_message: end inside the last message, so that a model goes on with it.
        variables: more of them, such as `tools`, `documents` and special tokens.

    Returns:
        The text; special tokens in it are not told apart from what was typed (see `chat_pieces`).

    Raises:
        DataError: messages that are none, or that the template refuses.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> render_chat(template, [{"role": "user", "content": "Hi"}])
    '<user>Hi'
    """
    if continue_final_message and add_generation_prompt:
        raise DataError("continue_final_message and add_generation_prompt exclude each other")
    chat = _checked(messages)
    if continue_final_message:
        chat[-1] = _open_ended(chat[-1])
    for message in chat:
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message["reasoning_content"] = reasoning
            message.setdefault("thinking", reasoning)
    text = template.render(
        messages=chat,
        add_generation_prompt=add_generation_prompt,
        **{"tools": None, "documents": None, **variables},
    )
    return _cut_open_end(text, template.where) if continue_final_message else text


def chat_pieces(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], control: ControlTokens, **options: Any
) -> list[str]:
    """A conversation as texts to be tokenized one after another, special tokens in them counting.

    Args:
        template, messages, options: as `render_chat` takes them.
        control: the texts that must not come from a message.

    Returns:
        Pieces that join to `render_chat`'s text (where the template does not look into control tokens that
        were typed). A control token that lies whole in a piece was written by the template.

    Raises:
        DataError: see `render_chat`; also a message with a control token of one character, which cannot be
            cut.

    >>> template = ChatTemplate("{% for m in messages %}<s>{{ m.content }}{% endfor %}")
    >>> chat_pieces(template, [{"role": "user", "content": "a <s> b"}], ControlTokens(("<s>",)))
    ['<s>a <', 's> b']
    """
    chat = _checked(messages)
    typed = {name: plain_data(options[name]) for name in ("tools", "documents") if options.get(name)}
    mark = _unused_mark([*chat, *typed.values()])
    marked = [
        _map_texts(m, lambda text, m=m: _mark(text, _forbidden(m, control), mark))  # type: ignore[misc]
        for m in chat
    ]
    extra = {name: _map_texts(v, lambda text: _mark(text, control.all, mark)) for name, v in typed.items()}
    text = render_chat(template, marked, **{**options, **extra})
    return _split(text, mark, control.all)


def answer_spans(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    ends: Sequence[str],
    *,
    rendered: str | None = None,
    **options: Any,
) -> list[tuple[int, int]]:
    """Where in `render_chat`'s text the assistant's messages stand, each with the token that ends it.

    A template with generation tags says itself what counts: just what stands in them.

    Args:
        template, messages, options: as `render_chat` takes them.
        ends: special tokens; one that follows a message, be it after white space, belongs to it.
        rendered: `render_chat`'s text, where it is known.

    Returns:
        (first character, one past the last) of each, in order.

    Raises:
        DataError: see `render_chat`; also a template that changes or leaves out what the assistant said.

    >>> template = ChatTemplate("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    >>> said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    >>> answer_spans(template, said, ["</s>"])
    [(12, 19)]
    """
    chat = _checked(messages)
    answers = sum(message["role"] == "assistant" for message in chat)
    marked = template.marks_answers()
    if marked:
        text = render_chat(template, chat, answer_marks=(_BEGIN, _END), **options)
    else:
        framed = [_framed(message) if message["role"] == "assistant" else message for message in chat]
        text = render_chat(template, framed, **options)
    spans, plain, begin = [], "", 0
    for part in re.split(f"([{_BEGIN}{_END}])", text):
        if part == _BEGIN:
            begin = len(plain)
        elif part == _END:
            spans.append((begin, len(plain)))
        else:
            plain += part
    complete = len(spans) >= answers if marked else len(spans) == answers
    if rendered is None:
        rendered = render_chat(template, messages, **options)
    if plain != rendered or not complete:
        raise DataError(
            f"{template.where}: the template changes what the assistant said, so answers cannot be found"
        )
    if marked or not ends:
        return spans
    closing = re.compile(r"\s*(?:" + "|".join(re.escape(end) for end in ends) + ")")
    found = []
    for begin, end in spans:
        match = closing.match(plain, end)
        found.append((begin, match.end() if match else end))
    return found


def touching(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """For each place (first character, one past the last) 1 if it shares one with some span, else 0.

    Args:
        places: in any order.
        spans: in order, none reaching into the next.

    >>> touching([(0, 2), (2, 4), (4, 6)], [(3, 5)])
    [0, 1, 1]
    """
    begins, ends = np.array(spans, np.int64).reshape(-1, 2).T
    firsts, lasts = np.array(places, np.int64).reshape(-1, 2).T
    before = np.searchsorted(begins, lasts)  # spans that begin before a place ends
    return ((before > 0) & (firsts < np.concatenate([[0], ends])[before])).astype(int).tolist()


def _checked(messages: Any) -> list[dict[str, Any]]:
    """A copy of the messages in plain data, without keys that hold None."""
    if isinstance(messages, Mapping | str) or not isinstance(messages, Iterable):
        raise DataError("messages: expected a list of {'role': ..., 'content': ...}")
    chat = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(
                f"messages[{number}] is a {type(message).__name__}: expected {{'role', 'content'}}"
            )
        if not isinstance(message.get("role"), str):
            raise DataError(f"messages[{number}] has no role: expected 'user', 'assistant' or another text")
        chat.append({key: plain_data(value) for key, value in message.items() if value is not None})
    if not chat:
        raise DataError("messages: the conversation is empty; give at least one message")
    return chat


def _forbidden(message: Mapping[str, Any], control: ControlTokens) -> tuple[str, ...]:
    return control.special if message["role"] == "assistant" else control.all


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value


def _unused_mark(value: Any) -> str:
    """A noncharacter that is nowhere in the texts."""
    seen = {mark for text in _texts(value) if not text.isascii() for mark in _MARKS if mark in text}
    free = [mark for mark in _MARKS if mark not in seen]
    if not free:
        raise DataError("messages: the texts contain all of Unicode's noncharacters U+FDD0 to U+FDED")
    return free[0]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _mark(text: str, tokens: tuple[str, ...], mark: str) -> str:
    """The text with a mark inside everything that looks like a token, and where half a token begins or ends.

    Half a token at an end could meet its other half, from the next text or from the template. White space
    beyond it does not count, as templates strip it. Whether a mark matters is seen after rendering.
    """
    places: set[int] = set()
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    begins, ends = _halves(tokens)
    if text.endswith(begins, start, end):
        places.add(end)
    if text.startswith(ends, start, end):
        places.add(start)
    for token in tokens:
        place = text.find(token)
        while place >= 0:
            if len(token) == 1:
                raise DataError(f"messages: {token!r} is a control token of one character and cannot be text")
            places.add(place + 1)
            place = text.find(token, place + 1)
    for place in sorted(places, reverse=True):
        text = text[:place] + mark + text[place:]
    return text


@functools.lru_cache(maxsize=32)
def _halves(tokens: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How tokens can begin, and how they can end, without being whole."""
    cuts = [(token[:half], token[half:]) for token in tokens for half in range(1, len(token))]
    begins, ends = zip(*cuts, strict=True) if cuts else ((), ())
    return tuple(dict.fromkeys(begins)), tuple(dict.fromkeys(ends))


def _split(marked: str, mark: str, tokens: Iterable[str]) -> list[str]:
    """The text without marks, cut at those that lie inside something that looks like a token."""
    parts = marked.split(mark)
    if len(parts) == 1:
        return parts
    text = "".join(parts)
    marks: list[int] = []
    for part in parts[:-1]:
        marks.append((marks[-1] if marks else 0) + len(part))
    inside: set[int] = set()
    for token in tokens:
        place = text.find(token)
        while place >= 0:
            inside.update(range(place + 1, place + len(token)))
            place = text.find(token, place + 1)
    cuts = [0, *sorted({place for place in marks if place in inside}), len(text)]
    return [text[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False)]


def _framed(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with signs where its text begins and ends, inside white space that a template may strip."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _frame(content, _BEGIN, _END)}
    texts = [n for n, part in enumerate(content or ()) if isinstance(part, Mapping) and "text" in part]
    if not texts:
        raise DataError("messages: an assistant's message has no text to learn from")
    parts = list(content)  # type: ignore[arg-type]
    for place, begin, end in ((texts[0], _BEGIN, ""), (texts[-1], "", _END)):
        parts[place] = {**parts[place], "text": _frame(parts[place]["text"], begin, end)}
    return {**message, "content": parts}


def _frame(text: str, begin: str, end: str) -> str:
    body = text.strip()
    before, _, after = text.partition(body) if body else (text, "", "")
    return before + begin + body + end + after


def _open_ended(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with a sign where its text ends."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _OPEN_END}
    for place in range(len(content or ()) - 1, -1, -1):
        part = content[place]  # type: ignore[index]
        if isinstance(part, Mapping) and "text" in part:
            changed = {**part, "text": part["text"] + _OPEN_END}
            return {**message, "content": [*content[:place], changed, *content[place + 1 :]]}  # type: ignore[index]
    raise DataError("continue_final_message: the last message has no text to continue")


def _cut_open_end(text: str, where: str) -> str:
    place = text.rfind(_OPEN_END.strip())
    if place < 0:
        raise DataError(f"{where}: the template does not show the end of the last message, so none can go on")
    kept = text[place:].startswith(_OPEN_END)
    return text[:place] if kept else text[:place].rstrip()


__all__ = ["ChatTemplate", "ControlTokens", "answer_spans", "chat_pieces", "render_chat"]
