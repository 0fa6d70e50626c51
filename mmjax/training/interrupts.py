"""SIGTERM and Ctrl-C: finish the step, keep a checkpoint, leave; the second time leave at once."""

from __future__ import annotations

import contextlib
import enum
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop.

    Attributes:
        exit_code: 128 plus the signal's number: 130 after Ctrl-C, 143 after SIGTERM.
        agreed: whether all processes of the run stop here, and for this reason.
    """

    def __init__(self, number: int, message: str, *, agreed: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.agreed = 128 + number, agreed


class _Mode(enum.Enum):
    HOLD = enum.auto()
    RAISE = enum.auto()
    POLITE = enum.auto()


class Interrupts:
    """Context in which a first signal stops the run where nothing is left open; a second ends the process.

    A signal's handler runs between any two bytecodes, so what it raises may come between a file's opening
    and the `with` that closes it, into a `finally`, or into a callback of the compiler, which may then crash.
    Hence a first signal is held until the program comes to `check`, to `polite`, or to this context's end.
    Inside `polite` it only sets `requested`, and only inside `raising` it raises Interrupted where the
    program stands. Only the main thread can be sent signals; elsewhere the context does nothing.

    Args:
        on_request: called with the signal's number when it comes inside `polite`, in the signal handler.

    Attributes:
        requested: the signal that came; None before.
    """

    def __init__(self, on_request: Callable[[int], None] = lambda number: None) -> None:
        self._on_request = on_request
        self.requested: int | None = None
        self._held: int | None = None
        self._mode = _Mode.HOLD
        self._old: dict[int, object] = {}
        self._old_descriptor = -1

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._old_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
            threading.Thread(target=_quit_on_second, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old:
            for number, handler in self._old.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._old_descriptor)
            # Closing the writer ends the thread, which then closes its own end.
            self._writer.close()
            self._old = {}
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise Interrupted for a signal that was held: here nothing is half done."""
        if self._held is not None:
            number, self._held = self._held, None
            raise _between(number)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Context for work without an end in sight: a first signal raises Interrupted at once."""
        with self._in(_Mode.RAISE):
            yield
        self.check()

    @contextlib.contextmanager
    def polite(self) -> Iterator[None]:
        """Context for steps, which look at `requested` themselves; one that was held is raised first."""
        with self._in(_Mode.POLITE):
            yield

    @contextlib.contextmanager
    def _in(self, mode: _Mode) -> Iterator[None]:
        try:
            # In this order: a signal between the two lines is answered in the new way.
            self._mode = mode
            self.check()
            yield
        finally:
            # A signal that raises just before this line was the first, and only the first is raised.
            self._mode = _Mode.HOLD

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = self.requested is None, number
        if not first:
            return
        if self._mode is _Mode.POLITE:
            self._on_request(number)
        elif self._mode is _Mode.RAISE and not _in_collector(frame):
            raise _between(number)
        else:
            self._held = number


def _in_collector(frame: FrameType | None) -> bool:
    """Whether Python collects garbage right now: it prints what a callback of that raises, and goes on."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks:
            return True
        frame = frame.f_back
    return False


def _between(number: int) -> Interrupted:
    return Interrupted(number, "stopped between steps; --resume goes on from the newest checkpoint")


def _quit_on_second(reader: socket.socket) -> None:
    # Python runs handlers between two bytecodes of the main thread, which may sit in a compiler for
    # minutes; this thread hears of a signal at once.
    heard = 0
    with reader:
        while data := reader.recv(16):
            numbers = [number for number in data if number in SIGNALS]
            heard += len(numbers)
            if heard > 1:
                os._exit(128 + numbers[-1])
