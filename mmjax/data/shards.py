"""Which tar files a specification such as `data/{00000..00007}.tar` means."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmjax.data.sources import as_path
from mmjax.errors import ConfigError, DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 10_000_000


def expand_braces(pattern: str) -> Iterator[str]:
    """All texts that a pattern with braces means, as in a shell.

    Args:
        pattern: with `{first..last}` (zero-padded where either end is) and `{a,b,c}`, also nested.

    Yields:
        The texts in order.

    >>> list(expand_braces("{a,b}/{08..10}.tar"))
    ['a/08.tar', 'a/09.tar', 'a/10.tar', 'b/08.tar', 'b/09.tar', 'b/10.tar']
    """
    for match in _BRACES.finditer(pattern):
        choices = _choices(match.group(1))
        if choices is not None:
            for choice in choices:
                yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
            return
    yield pattern


def _choices(body: str) -> Iterator[str] | list[str] | None:
    numbers = _RANGE.fullmatch(body)
    if not numbers:
        return body.split(",") if "," in body else None
    first, last = numbers.groups()
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    if abs(int(last) - int(first)) >= _MOST_SHARDS:
        raise ConfigError(f"{{{body}}} means more than {_MOST_SHARDS} shards")
    return (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))


def find_shards(spec: str | Sequence[str]) -> list[Path]:
    """The tar files of a specification, in order.

    Args:
        spec: paths with braces or wildcards, folders (all their *.tar), several joined by `::` or in a list.

    Returns:
        Existing files, each once.

    Raises:
        DataError: a file is missing, a wildcard or a folder gives none, or one comes twice.
        ConfigError: the specification is empty, or names something that is not a local file.
    """
    specs = [spec] if isinstance(spec, str) else spec
    items = [part for item in specs for part in item.split("::") if part]
    if not items:
        raise ConfigError("no shards given: name tar files, e.g. 'data/{00000..00007}.tar'")
    paths: list[Path] = []
    for item in items:
        if "://" in item or item.startswith("pipe:"):
            raise ConfigError(f"shards={item!r}: only local files are read, fetch them first")
        for pattern in expand_braces(item):
            paths += _matches(pattern)
            if len(paths) > _MOST_SHARDS:
                raise ConfigError(f"shards={item!r} means more than {_MOST_SHARDS} files")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = ", ".join(map(str, missing[:3]))
        raise DataError(f"{len(missing)} of {len(paths)} shards are missing: {names}")
    if len(set(paths)) < len(paths):
        twice = Counter(paths).most_common(1)[0][0]
        raise DataError(f"shard {twice} is named twice: remove one, or weigh sources with MixtureData")
    return paths


def _matches(pattern: str) -> list[Path]:
    path = as_path(pattern)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif path.exists() or not any(c in pattern for c in "*?["):
        return [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(path)))]
    if not found:
        raise DataError(f"no shards match {pattern}")
    return found
