"""Parsing of arguments: errors as exceptions, options that several commands share."""

from __future__ import annotations

import argparse
import math
import re
from typing import NoReturn

from mmjax.errors import MmjaxError

DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class UsageError(MmjaxError):
    """The command line cannot be understood."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises UsageError and never guesses abbreviated options."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and leaving."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Document --debug, which main takes out of the arguments before they are parsed."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add --model and --dtype."""
    parser.add_argument("--model", required=True, metavar="DIR", help="a model folder, or a hub id")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the parameters (default: the folder's)")


def add_batch_size(parser: argparse.ArgumentParser, default: int = 32) -> None:
    """Add --batch-size."""
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=default,
        metavar="N",
        help=f"images or texts per step (default: {default})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def add_data(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add --data and the options that say how to read it."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        metavar="SOURCE",
        help="'digits', a folder with one sub-folder per class, a .csv or .tsv file, or WebDataset tars "
        "such as 'shards/{00000..00007}.tar'",
    )
    group.add_argument(
        "--dataset-type",
        choices=("auto", "digits", "folder", "csv", "webdataset"),
        default="auto",
        help="what SOURCE is (default: auto, from its name)",
    )
    group.add_argument(
        "--split",
        choices=("train", "test"),
        help="split of the digits, or of a folder that holds folders train and test (default: test)",
    )
    group.add_argument(
        "--csv-img-key", default="filepath", metavar="NAME", help="column of image paths (filepath)"
    )
    group.add_argument(
        "--csv-caption-key", default="title", metavar="NAME", help="column of captions (title)"
    )
    group.add_argument(
        "--csv-separator",
        metavar="CHAR",
        help=r"column separator (default: tab for .tsv, comma for .csv; '\t' is a tab)",
    )
    group.add_argument(
        "--image-root", metavar="DIR", help="folder of the paths in a CSV (default: the CSV's own)"
    )
    group.add_argument(
        "--max-broken",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of broken samples to leave out instead of stopping (default: 0)",
    )


def positive_int(text: str) -> int:
    """A whole number of at least 1.

    Example:
        >>> positive_int("12")
        12
    """
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """A number in 0..1.

    Example:
        >>> share("0.25")
        0.25
    """
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0.

    Example:
        >>> not_negative("1e-3")
        0.001
    """
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def byte_size(text: str) -> int:
    """A number of bytes with a unit: 500MB, 2GB, 1.5GiB.

    Example:
        >>> byte_size("2GB"), byte_size("1KiB")
        (2000000000, 1024)
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmg]i?)?b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB, 2GB or 1GiB")
    return size
