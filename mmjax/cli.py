"""The `mmjax` command: finds the subcommand, and turns every failure into one line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mmjax.commands import COMMANDS
from mmjax.commands.output import printable
from mmjax.commands.parser import CommandParser, UsageError, add_debug
from mmjax.errors import MmjaxError

_MODULES = {name: f"mmjax.commands.{'evaluate' if name == 'eval' else name}" for name in COMMANDS}
_INTERRUPTED, _BROKEN_PIPE = 128 + 2, 128 + 13
_LONGEST_LINE = 400
_LONGEST_WAIT = 3.0


def _epilog() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "commands:",
            *lines,
            "",
            "`mmjax COMMAND --help` says more about one. Exit codes: 0 done; 2 something to put right, on",
            "stderr in one line (--debug adds a traceback); 1 a fault of mmjax itself; 130 interrupted.",
        ]
    )


def _top_parser() -> CommandParser:
    parser = CommandParser("mmjax", "Vision-language systems in JAX, as pure functions.", _epilog())
    parser.usage = "mmjax [--help] [--version] [--debug] COMMAND ..."
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    add_debug(parser)
    parser.add_argument(
        "command", nargs="?", metavar="COMMAND", help="one of the commands below, and its arguments"
    )
    return parser


def _dispatch(arguments: list[str], debug: bool) -> int:
    """Run one command line from which --debug was taken: the exit code."""
    first = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    options = _top_parser().parse_args(arguments[: first + 1])
    if options.version:
        from mmjax import __version__

        print(f"mmjax {__version__}")
        return 0
    name = options.command
    if name is None:
        raise UsageError(f"no command given: choose from {', '.join(COMMANDS)} (see mmjax --help)")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}"
        raise UsageError(f"no command {name!r}: {hint} (see mmjax --help)")
    rest = arguments[first + 1 :]
    if name == "train":
        from mmjax.training.cli import main as train

        return train([*rest, "--debug"] if debug else rest)
    module = importlib.import_module(_MODULES[name])
    parser = CommandParser(f"mmjax {name}", module.__doc__ or "")
    module.configure(parser)
    add_debug(parser)
    # Some take options that argparse cannot know, such as the fields of an experiment.
    parse = getattr(module, "parse", None)
    options = parse(parser, rest) if parse else parser.parse_args(rest)
    options.debug = debug
    return module.run(options)


def _one_line(error: BaseException) -> str:
    text = " ".join(printable(" ".join(str(error).split())).split())
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]} ..."


def _explain(error: Exception) -> tuple[str, int]:
    """The message for an error, and the exit code."""
    if isinstance(error, MmjaxError):
        # Lists of faults keep their indented lines; nothing else may break a line or steer the terminal.
        return "\n  ".join(printable(line) for line in str(error).split("\n  ")), 2
    if isinstance(error, OSError) and error.strerror:
        place = (
            f"{printable(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
        )
        return f"{place}{error.strerror}", 2
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]:
        return f"out of memory: try a smaller --batch-size ({type(error).__name__}: {_one_line(error)})", 1
    return f"unexpected {type(error).__name__}: {_one_line(error)} (run with --debug for the traceback)", 1


def _leave_pipe() -> None:
    """Let nobody flush into the closed pipe again, as the interpreter does at its end."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _importing(frame: FrameType | None) -> bool:
    """Whether an import is under way in this frame or one of its callers."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _wake_main_thread() -> None:
    """Send Ctrl-C to the main thread, where it ends a wait; elsewhere it would only be noted."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def _interrupts() -> Iterator[list[float]]:
    """Note every Ctrl-C, and deliver those again that got lost.

    Python raises KeyboardInterrupt wherever the main thread happens to be. In a callback of the garbage
    collector (jax has one) it is printed and forgotten; while a module in C is imported it can crash the
    process. So it waits for imports to end, for a few seconds at most, and comes again when forgotten.

    Yields:
        The times at which signals came, in seconds.
    """
    seen: list[float] = []
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen  # somebody else takes care of Ctrl-C
        return
    running = True
    print_unraisable = sys.unraisablehook

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(time.monotonic())
        if not (_importing(frame) and seen[-1] - seen[0] < _LONGEST_WAIT):
            raise KeyboardInterrupt
        come_again()

    def come_again() -> None:
        # From a thread and a little later: here it would be lost once more.
        threading.Timer(0.05, lambda: _wake_main_thread() if running else None).start()

    def forgotten(problem: Any) -> None:
        if isinstance(problem.exc_value, KeyboardInterrupt):
            come_again()
        else:
            print_unraisable(problem)

    signal.signal(signal.SIGINT, note)
    sys.unraisablehook = forgotten
    try:
        yield seen
    finally:
        running = False
        sys.unraisablehook = print_unraisable
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmjax` with the given arguments.

    Args:
        argv: without the program's name; None means those of the process.

    Returns:
        The exit code: 0 done, 2 an error to put right, 1 an unexpected one, 130 interrupted, 141 when the
        reader of the output has gone.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        mmjax ...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if hasattr(sys.stdout, "reconfigure"):
        # A label that the terminal's encoding lacks is escaped rather than fatal.
        sys.stdout.reconfigure(errors="backslashreplace")
    with _interrupts() as interrupts:
        return _run([argument for argument in arguments if argument != "--debug"], debug, interrupts)


def _run(arguments: list[str], debug: bool, interrupts: list[float]) -> int:
    """Run one command line and report how it failed, if it did: the exit code."""
    try:
        try:
            code = _dispatch(arguments, debug)
        except SystemExit as end:  # argparse leaves this way after --help
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _leave_pipe()
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = ("interrupted", _INTERRUPTED) if interrupts else _explain(error)
        print(f"error: {message}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
