"""SIGTERM and Ctrl-C: finish the step, keep a checkpoint, leave; the second time leave at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
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


class Interrupts:
    """Context in which a first signal is remembered or raised, and a second one ends the process.

    Outside `polite` a first signal raises Interrupted where the program stands; inside, it only
    sets `requested`. Only the main thread can be sent signals; elsewhere the context does nothing.

    Args:
        on_request: called with the signal's number when `requested` is set, inside the signal handler.
    """

    def __init__(self, on_request: Callable[[int], None] = lambda number: None) -> None:
        self._on_request = on_request
        self.requested: int | None = None
        self.polite = False
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = self.requested is None, number
        if first and self.polite:
            self._on_request(number)
        elif first:
            raise Interrupted(number, "stopped between steps; --resume goes on from the newest checkpoint")


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
