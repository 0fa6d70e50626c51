"""Command-line overrides of any field of an experiment, typed by the dataclasses' annotations."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

from mmjax.errors import ConfigError

T = TypeVar("T")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NONE = ("none", "null")
_WORDS: dict[Any, str] = {
    int: "a whole number (int)",
    float: "a number (float)",
    bool: "true or false (bool)",
    str: "text (str)",
}


def apply_overrides(config: T, overrides: Iterable[str]) -> T:
    """Give fields of nested frozen dataclasses new values; all at once, so that they are checked together.

    Args:
        config: a dataclass.
        overrides: "path=value" with names joined by dots. An element of a tuple goes by its
            index, or by its `name` where it has one.

    Returns:
        A new object of the same type; `config` is left as it was.

    Raises:
        ConfigError: a name that does not exist (with the closest that do), a value of another
            type, or a combination that the dataclass refuses.

    >>> from mmjax.training.experiment import Train
    >>> apply_overrides(Train(), ["steps=200", "ema_decay=0.99"]).steps
    200
    """
    wanted: dict[str, Any] = {}
    for override in overrides:
        path, found, text = override.partition("=")
        if not found or not path:
            raise ConfigError(f"override {override!r} is not of the form path=value")
        _plan(wanted, path, text)
    return _rebuild(config, wanted, "") if wanted else config


def parse_value(text: str, annotation: Any, field: str, current: Any = None) -> Any:
    """Read `text` as the type that a field is annotated with.

    Args:
        text: what was typed.
        annotation: the resolved annotation; for Any the type of `current` decides.
        field: the field's full name, for messages.
        current: the field's present value.

    Raises:
        ConfigError: the text is no such value.

    >>> parse_value("data=2,fsdp=4", Mapping[str, int], "mesh")
    {'data': 2, 'fsdp': 4}
    >>> parse_value("none", float | None, "x") is None
    True
    """
    if annotation is Any and current is not None:
        annotation = type(current)
    try:
        return _read(text, annotation)
    except _NotReadableError:
        raise ConfigError(f"--{field}: expected {_describe(annotation)}, got {text!r}") from None
    except _NotSettableError:
        raise ConfigError(
            f"--{field} cannot be set on the command line (it is {_describe(annotation)}); "
            "edit the experiment file"
        ) from None


class _NotReadableError(Exception):
    pass


class _NotSettableError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class _Text:
    text: str


def _plan(wanted: dict[str, Any], path: str, text: str) -> None:
    *groups, last = path.split(".")
    level = wanted
    for group in groups:
        inner = level.setdefault(group, {})
        if isinstance(inner, _Text):
            raise ConfigError(f"--{path} and one of the groups it lies in are both set")
        level = inner
    if isinstance(level.get(last), dict):
        raise ConfigError(f"--{path} and one of its fields are both set")
    level[last] = _Text(text)


def _rebuild(value: Any, wanted: Mapping[str, Any], prefix: str) -> Any:
    children = _children(value, prefix, next(iter(wanted)))
    changed: dict[Any, Any] = {}
    for name, new in wanted.items():
        full = f"{prefix}{name}"
        key = _find(children, name, value, prefix)
        current, annotation = children[key]
        if isinstance(new, _Text):
            if dataclasses.is_dataclass(current) and not _takes_text(annotation):
                fields = ", ".join(field.name for field in dataclasses.fields(current))
                raise ConfigError(f"--{full} is a group; set one of its fields: {fields}")
            changed[key] = parse_value(new.text, annotation, full, current)
        else:
            changed[key] = _rebuild(current, new, f"{full}.")
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(changed.get(index, item) for index, item in enumerate(value))
    if isinstance(value, tuple):
        return value._replace(**changed)  # type: ignore[attr-defined]
    return dataclasses.replace(value, **changed)


def _children(value: Any, prefix: str, asked: str) -> dict[Any, tuple[Any, Any]]:
    """Name or index -> (value, annotation) of what lies directly inside `value`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        return {
            field.name: (getattr(value, field.name), hints[field.name])
            for field in dataclasses.fields(value)
            if field.init
        }
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        hints = typing.get_type_hints(type(value))
        return {name: (getattr(value, name), hints.get(name, Any)) for name in value._fields}
    if isinstance(value, tuple):
        return {index: (item, type(item)) for index, item in enumerate(value)}
    raise ConfigError(f"--{prefix}{asked}: {prefix.rstrip('.')} is {value!r} and has no field {asked!r}")


def _find(children: Mapping[Any, Any], name: str, owner: Any, prefix: str) -> Any:
    if name in children:
        return name
    if name.isdecimal() and int(name) in children:
        return int(name)
    if isinstance(owner, tuple) and not hasattr(owner, "_fields"):
        named = {getattr(item, "name", None): index for index, (item, _) in children.items()}
        if name in named:
            return named[name]
        known = [str(known) for known in [*children, *named] if known is not None]
    else:
        known = [str(known) for known in children]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(known) or 'nothing'}"
    where = prefix.rstrip(".") or type(owner).__name__
    raise ConfigError(f"--{prefix}{name}: {where} has no {name!r}; {hint}")


def _read(text: str, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _read_union(text, arguments)
    if origin is Literal:
        return _one_of(text, {str(choice): choice for choice in arguments})
    if annotation in (None, type(None)):
        return _one_of(text.lower(), dict.fromkeys(_NONE))
    if annotation is bool:
        return _one_of(text.lower(), dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False))
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise _NotReadableError from None
    if annotation is str:
        return text
    kind = origin or annotation
    if kind in (tuple, list, collections.abc.Sequence):
        return _read_tuple(text, arguments)
    if kind in (dict, collections.abc.Mapping):
        return _read_mapping(text, arguments or (str, str))
    if annotation is Any:
        return _read_union(text, (None, bool, int, float, str))
    raise _NotSettableError


def _read_union(text: str, choices: tuple[Any, ...]) -> Any:
    # Narrow types first: "3" is the number where a number will do, and a string takes anything.
    order = {type(None): 0, None: 0, bool: 1, int: 2, float: 3, str: 9}
    settable = False
    for choice in sorted(choices, key=lambda choice: order.get(choice, 5)):
        try:
            return _read(text, choice)
        except _NotReadableError:
            settable = settable or choice not in (None, type(None))
        except _NotSettableError:
            continue
    raise _NotReadableError if settable else _NotSettableError


def _read_tuple(text: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1]
    items = [item.strip() for item in inner.split(",") if item.strip()]
    if not arguments or arguments[-1] is Ellipsis or len(arguments) == 1:
        return tuple(_read(item, arguments[0] if arguments else Any) for item in items)
    if len(items) != len(arguments):
        raise _NotReadableError
    return tuple(_read(item, kind) for item, kind in zip(items, arguments, strict=True))


def _read_mapping(text: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    result = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, found, value = item.partition("=")
        if not found:
            raise _NotReadableError
        name = _read(key.strip(), arguments[0])
        if name in result:
            raise _NotReadableError
        result[name] = _read(value.strip(), arguments[1])
    return result


def _one_of(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise _NotReadableError
    return choices[text]


def _takes_text(annotation: Any) -> bool:
    return str in (annotation, *typing.get_args(annotation))


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if annotation in (None, type(None)):
        return "none"
    kind = origin or annotation
    if kind in (dict, collections.abc.Mapping):
        key, value = arguments or (str, str)
        return f"pairs such as name={_describe(value)},..., each name once"
    if kind in (tuple, list, collections.abc.Sequence):
        return "values joined by commas"
    if kind is collections.abc.Callable or isinstance(annotation, types.FunctionType):
        return "a function"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
