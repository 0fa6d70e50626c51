"""Chat templates of hub folders: Jinja, from strangers, so in a sandbox with a budget.

A template cannot reach Python, files or other templates (Jinja's sandbox), and it cannot take for ever
or fill the memory: every loop round, call, filter and made value is counted against a budget, and no value
may grow beyond a limit.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

from mmjax.errors import CheckpointError, DataError
from mmjax.language.template_budget import MAX_VALUE, Budget, OverBudget

MAX_TEMPLATE = 1 << 20
_MAX_NUMBER = 1 << 20
_LONG_WIDTH = re.compile(r"\d{5,}|\*")
# Names with a space cannot be written in a template: these are only reached through `_instrument`.
_EACH, _MADE, _JOINED = "each item", "made value", "joined text"
_ANSWER_BEGINS, _ANSWER_ENDS = "answer begins", "answer ends"


class _Raised(TemplateError):
    """What a template itself refuses."""


class _Generation(Extension):
    """The tag round what a model wrote, `{% generation %}`: its body, between marks that are asked for."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.Filter(nodes.Const(""), name, [], [], None, None)])
            for name in (_ANSWER_BEGINS, _ANSWER_ENDS)
        )
        return nodes.Scope([begin, *body, end]).set_lineno(line, override=True)


class _SafeNamespace(Namespace):
    """A namespace without names that begin with an underscore, which Python gives a meaning."""

    def __init__(*args: Any, **attributes: Any) -> None:
        given = dict(*args[1:], **attributes)
        for name in given:
            _SafeNamespace._check(name)
        Namespace.__init__(args[0], given)  # type: ignore[misc]

    def __setitem__(self, name: str, value: Any) -> None:
        _SafeNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"the namespace attribute {name!r} begins with an underscore")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the names that transformers gives to templates, and a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, LoopControlExtension],
            finalize=self._written,
        )
        self.budget = Budget()
        self.filters = {name: self._guard(name, filter_) for name, filter_ in self.filters.items()}
        self.filters["tojson"] = self._guard("tojson", _to_json)
        self.filters[_EACH] = self._each
        self.filters[_MADE] = lambda value: self.budget.made(value)
        # With the context they are run where they stand, and not once when the template is read.
        self.filters[_ANSWER_BEGINS] = pass_context(lambda context, value: self.answer_marks[0])
        self.filters[_ANSWER_ENDS] = pass_context(lambda context, value: self.answer_marks[1])
        self.filters[_JOINED] = lambda parts: self.budget.made("".join(map(str, self.budget.made(parts))))
        self.globals.pop("lipsum", None)
        self.globals.update(
            raise_exception=_raise, strftime_now=_now, dict=_dict_of, namespace=_SafeNamespace
        )

    def _written(self, value: Any) -> Any:
        return self.budget.made(value)

    def _each(self, items: Any, text: int) -> Iterator[Any]:
        for item in items:
            self.budget.step(1, text)
            yield item

    def _guard(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter_)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            args = tuple(self.budget.made(list(a)) if isinstance(a, Iterator) else a for a in args)
            self._check(name, args, kwargs)
            return self.budget.made(filter_(*args, **kwargs))

        return guarded

    def _check(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse what would be too large, before it is made."""
        values = [*args, *kwargs.values()]
        texts = [value for value in values if isinstance(value, str)]
        if any(isinstance(value, int) and abs(value) > _MAX_NUMBER for value in values):
            raise OverBudget(f"{name} is given too large a number")
        if name in ("format", "format_map") and any(_LONG_WIDTH.search(text) for text in texts):
            raise OverBudget("a format in it is too wide")
        if name == "replace" and len(texts) >= 3:
            text, old, new = texts[:3]
            if text.count(old) * len(new) > MAX_VALUE:
                raise OverBudget("a value in it grows too large")
        if name in ("join", "indent"):
            parts = [len(value) for value in values if isinstance(value, Sized)]
            largest = sorted(parts)[-2:]
            if len(largest) == 2 and largest[0] * largest[1] > 32 * MAX_VALUE:
                raise OverBudget("a value in it grows too large")
        if name == "translate":
            raise SecurityError("translate is not available")

    def getattr(self, obj: Any, attribute: str) -> Any:
        # Most are keys of messages; Jinja looks for an attribute first, and that failing takes long.
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.budget.step(1, __self.text_size if isinstance(__obj, Macro) else 0)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            __self._check(getattr(method, "__name__", ""), (owner, *args), kwargs)
        return __self.budget.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        if operator == "**" and not (abs(left) < 1 << 32 and abs(right) <= 64):
            raise OverBudget("a number in it grows too large")
        if operator == "*":
            for number, other in ((left, right), (right, left)):
                repeated = isinstance(other, str | list | tuple) and isinstance(number, int)
                if repeated and number * max(len(other), 1) > MAX_VALUE:
                    raise OverBudget("a value in it grows too large")
        if operator == "%" and isinstance(left, str):
            self._check("format", (left,), {})
        return self.budget.made(super().call_binop(context, operator, left, right))

    # Characters of plain text in the template, that a macro may write.
    text_size: int = 0
    # What is written round the body of a generation tag.
    answer_marks: tuple[str, str] = ("", "")


def _raise(message: Any) -> None:
    raise _Raised(str(message))


def _now(form: str) -> str:
    if len(form) > 200 or _LONG_WIDTH.search(form):
        raise OverBudget("a format in it is too wide")
    return datetime.datetime.now().strftime(form)


def _dict_of(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter writes."""
    width = len(indent) if isinstance(indent, str) else int(indent or 0)
    if width > 64 or any(len(mark) > 64 for mark in separators or ()):
        raise OverBudget("a format in it is too wide")
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Noncharacters, which mark where typed text was cut, must stay what they are.
    return re.sub(r"[^\x00-\x7f\ufdd0-\ufdef]+", _escaped, text) if ensure_ascii else text


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1]


def _instrument(tree: nodes.Template) -> int:
    """Put a counter round every loop and every value that is made; returns the characters of plain text."""

    def text_in(node: nodes.Node) -> int:
        return sum(len(data.data) for data in node.find_all(nodes.TemplateData))

    def wrap(node: nodes.Expr, name: str, *args: Any) -> nodes.Filter:
        constants: list[nodes.Expr] = [nodes.Const(arg) for arg in args]
        return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)

    def visit(node: nodes.Node) -> None:
        for field, value in list(node.iter_fields()):
            if isinstance(value, nodes.Node):
                visit(value)
                setattr(node, field, replace(value, node, field))
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, nodes.Node):
                        visit(item)
                setattr(node, field, [replace(item, node, field) for item in value])

    def replace(node: Any, parent: nodes.Node, field: str) -> Any:
        if isinstance(parent, nodes.For) and field == "iter":
            return wrap(node, _EACH, text_in(parent))
        if isinstance(node, nodes.Concat):
            return wrap(nodes.List(node.nodes, lineno=node.lineno), _JOINED)
        # A tuple that is assigned to is no value.
        loads = not isinstance(node, nodes.Tuple) or node.ctx == "load"
        if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict) and loads and field != "args":
            return wrap(node, _MADE)
        return node

    visit(tree)
    return text_in(tree)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template as a hub folder has it.

    Args:
        source: Jinja text.
        where: the file it comes from, for messages.

    Raises:
        CheckpointError: it is no Jinja, or too long; the message names file and line.

    >>> ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}").render(
    ...     messages=[{"role": "user", "content": "Hi"}])
    'user: Hi'
    """

    source: str
    where: str = "chat_template"

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise CheckpointError(
                f"{self.where}: a chat template is a text, got {type(self.source).__name__}"
            )
        if len(self.source) > MAX_TEMPLATE:
            raise CheckpointError(f"{self.where}: {len(self.source)} characters; the limit is {MAX_TEMPLATE}")
        _compiled(self)

    def render(self, *, answer_marks: tuple[str, str] = ("", ""), **variables: Any) -> str:
        """The template's text for some variables: `messages`, `add_generation_prompt`, special tokens, ...

        Args:
            answer_marks: written before and after what stands in a generation tag.
            variables: made of texts, numbers, lists and mappings; anything else is shown to the template as a
                placeholder that names its type.

        Raises:
            DataError: the template refuses the messages, fails, or does more than its budget allows.
        """
        code, size, _, _ = _compiled(self)
        sandbox = _sandbox_of_thread()
        sandbox.budget, sandbox.text_size, sandbox.answer_marks = Budget(), size, answer_marks
        template = Template.from_code(sandbox, code, dict(sandbox.globals))
        given = {name: plain_data(value) for name, value in variables.items()}
        text: list[str] = []
        try:
            for part in template.generate(given):
                sandbox.budget.step(1, len(part))
                text.append(part)
        except _Raised as error:
            raise DataError(
                f"{self.where}: the template refuses these messages: {_one_line(error)}"
            ) from None
        except (OverBudget, RecursionError, MemoryError) as error:
            reason = str(error) if isinstance(error, OverBudget) else "it calls itself too often"
            raise DataError(f"{self.where}: the template was stopped: {reason}") from None
        except Exception as error:  # a template can fail as any program can
            kind = type(error).__name__
            raise DataError(f"{self.where}: the template fails: {_one_line(error)} ({kind})") from None
        return "".join(text)

    def literals(self) -> str:
        """All texts that the template itself can write, apart by NUL."""
        return _compiled(self)[2]

    def marks_answers(self) -> bool:
        """Whether the template says by generation tags what the assistant wrote."""
        return _compiled(self)[3]


_threads = threading.local()


def _sandbox_of_thread() -> _Sandbox:
    """A sandbox costs more to make than a conversation to render: each thread makes one.

    What a rendering may change in it, the budget and the marks, is set anew before each; templates cannot
    reach it.
    """
    if not hasattr(_threads, "sandbox"):
        _threads.sandbox = _Sandbox()
    return _threads.sandbox


@functools.lru_cache(maxsize=32)
def _compiled(template: ChatTemplate) -> tuple[Any, int, str, bool]:
    """Code, characters of plain text and the literal texts of a template, and whether it marks answers."""
    sandbox = _Sandbox()
    try:
        tree = sandbox.parse(template.source)
        texts = [data.data for data in tree.find_all(nodes.TemplateData)]
        texts += [const.value for const in tree.find_all(nodes.Const) if isinstance(const.value, str)]
        marks = any(node.name == _ANSWER_BEGINS for node in tree.find_all(nodes.Filter))
        size = _instrument(tree)
        return sandbox.compile(tree, template.where), size, "\0".join(texts), marks
    except TemplateSyntaxError as error:
        place, reason = f"{template.where}, line {error.lineno}", _one_line(error.message)
        raise CheckpointError(f"{place}: not a template that can be read ({reason})") from None
    except (TemplateError, RecursionError, SyntaxError, MemoryError, OverBudget) as error:
        reason = _one_line(error) or type(error).__name__
        raise CheckpointError(f"{template.where}: not a template that can be read ({reason})") from None


def plain_data(value: Any) -> Any:
    """A value rebuilt from plain texts, numbers, lists and dicts, whose methods the sandbox knows.

    >>> plain_data({"image": object(), "n": (1, 2.5, None)})
    {'image': '<object>', 'n': (1, 2.5, None)}
    """
    kind = type(value)
    if value is None or kind in (str, int, float, bool):
        return value
    if kind is dict:
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if kind is list:
        return [plain_data(item) for item in value]
    if isinstance(value, np.generic):
        return plain_data(value.item())
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return plain_data(dict(value.items()))
    if isinstance(value, tuple):
        return tuple(plain_data(item) for item in value)
    if isinstance(value, list):
        return plain_data(list(value))
    return f"<{type(value).__name__}>"


def _one_line(error: Any) -> str:
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= 300 else text[:297] + "..."
