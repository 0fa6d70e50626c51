"""What commands print and write: tables, JSON, progress, files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mmjax.errors import DataError


def printable(text: object) -> str:
    """Text that changes nothing on a terminal: control and other unprintable characters are escaped.

    Example:
        >>> printable("a\\x1b[31mb")
        'a\\\\x1b[31mb'
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in str(text)
    )


def print_json(value: Any) -> None:
    """Print one JSON document; numbers that JSON does not have become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[str] = ()
) -> None:
    """Print a table: drawn on a terminal, plain aligned columns elsewhere, where no cell is ever cut.

    Args:
        columns: headings.
        rows: one text per column.
        numeric: headings of columns to align to the right.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich_table(columns, cells, numeric)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        aligned = (
            cell.rjust(width) if name in numeric else cell.ljust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        )
        print("  ".join(aligned).rstrip())


def _print_rich_table(columns: Sequence[str], cells: list[list[str]], numeric: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in columns:
        table.add_column(name, justify="right" if name in numeric else "left", overflow="fold")
    for line in cells:
        # Text, not str: brackets in labels and file names are no markup.
        table.add_row(*(Text(cell) for cell in line))
    Console(file=sys.stdout).print(table)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr when that is a terminal.

    Args:
        what: a word or two.
        total: units expected, None when unknown.

    Yields:
        A function to call with the number of units done since the last call.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output path before the work starts.

    Raises:
        DataError: the folder does not exist or cannot be written, or the file exists without force.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder, name a file")
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such folder; make it first")
    if path.exists() and not force:
        raise DataError(f"{path}: exists; name another file, or overwrite it with --force")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path.parent}: cannot be written to")


def write_whole(path: Path, write: Callable[[IO[bytes]], object], *, force: bool) -> None:
    """Write a file so that its name never stands for a part of it.

    Args:
        path: the file; see check_output.
        write: gets the open binary file.
        force: replace an existing file.

    Raises:
        DataError: as check_output; OSError: the disk is full, for example; the old file is then untouched.
    """
    check_output(path, force=force)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp keeps files to their owner; what a command writes has the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def count_text(count: int) -> str:
    """A number with a separator for thousands.

    Example:
        >>> count_text(1234567)
        '1,234,567'
    """
    return f"{count:,}"


def byte_text(count: int) -> str:
    """A number of bytes in the unit that suits it.

    Example:
        >>> byte_text(999), byte_text(1500), byte_text(2_000_000_000)
        ('999 B', '1.5 kB', '2.0 GB')
    """
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            break
    return f"{value:.1f} {unit}"


def percent(value: float) -> str:
    """A share as a percentage with two decimals.

    Example:
        >>> percent(0.12345)
        '12.35%'
    """
    return f"{100 * value:.2f}%"
