"""Conversations to prompts: the folder's template renders them, and what people typed stays text.

A template writes special tokens round the messages. If a message contains the same characters, the rendered
text alone cannot tell who wrote them. So before rendering, what looks like a control token in a message is
cut with a mark (a noncharacter that no message contains), and the text is tokenized piece by piece between
the marks that matter. A conversation without such text is rendered and tokenized in one piece, as
transformers does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.errors import DataError
from mmjax.language.batching import check_characters
from mmjax.language.marks import Reader, mark, split
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
        reader: how the tokenizer looks for them, if it changes texts first; None: in the text as it is.
    """

    special: tuple[str, ...]
    written: tuple[str, ...] = ()
    reader: Reader | None = None

    @classmethod
    def of(
        cls, added: Iterable[tuple[str, bool]], template: ChatTemplate, reader: Reader | None = None
    ) -> ControlTokens:
        """The control tokens among a tokenizer's added tokens (text, whether it is special)."""
        added, literals = [pair for pair in added if pair[0].strip()], template.literals()
        plain = [text for text, special in added if not special]
        written = {text for text in plain if text in literals}
        if reader is not None:
            literals = reader.changed(literals)
            written |= {text for text in plain if reader.changed(text) in literals}
        special = tuple(text for text, special in added if special)
        return cls(special, tuple(text for text in plain if text in written), reader)

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
        DataError: see `render_chat`; also a message in which one character is a control token, which cannot
            be cut, or something is no character.

    >>> template = ChatTemplate("{% for m in messages %}<s>{{ m.content }}{% endfor %}")
    >>> chat_pieces(template, [{"role": "user", "content": "a <s> b"}], ControlTokens(("<s>",)))
    ['<s>a <', 's> b']
    """
    chat = _checked(messages)
    typed = {name: plain_data(options[name]) for name in ("tools", "documents") if options.get(name)}
    named = {**{f"messages[{number}]": message for number, message in enumerate(chat)}, **typed}
    for name, value in named.items():
        for text in _texts(value):
            check_characters(text, name)
    sign = _unused_mark([*chat, *typed.values()])

    def marked(value: Any, tokens: tuple[str, ...]) -> Any:
        return _map_texts(value, lambda text: mark(text, tokens, sign, control.reader))

    safe = [marked(message, _forbidden(message, control)) for message in chat]
    extra = {name: marked(value, control.all) for name, value in typed.items()}
    text = render_chat(template, safe, **{**options, **extra})
    return split(text, sign, control.all, control.reader)


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
