"""What the processes of a run say to each other beside the arrays: agreement, stopping together, failure.

Every process holds one TCP connection to process 0. A process that dies closes it, which the others learn
at once; one whose machine is gone falls silent. So a run never waits for long for a process that is no
more, whatever the collectives of the backend would do.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mmjax.errors import MmjaxError

Message = dict[str, Any]
RESTART = "start all processes again with --resume"
_GONE = "of this run ended or cannot be reached"
# The main thread may be about to say itself what went wrong, in better words than those of another process.
_GRACE = 1.0
_FAREWELL = 5.0
# Functions that C may still call must not be collected.
_HANDLERS: list[Any] = []


class PeerError(MmjaxError, RuntimeError):
    """Another process of the run ended, or cannot be reached.

    Attributes:
        exit_code: what this process should exit with.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Alone:
    """The channel of a run of one process: it agrees with itself."""

    index, count = 0, 1

    def agree(self, value: Any) -> list[Any]:
        """The values of all processes."""
        return [value]

    def may_go_on(self, step: int) -> bool:
        """Whether the step after `step` may be started."""
        return True

    @property
    def halt(self) -> tuple[int, int] | None:
        """The step to stop after and the signal it is for, once that is settled."""
        return None

    def verdict(self, wait: float = 0.0) -> PeerError | None:
        """Why the run is over for all, once that is known."""
        return None

    def request_stop(self, number: int) -> None:
        """Ask all processes to stop after one and the same step."""

    def tell(self, message: str, exit_code: int) -> None:
        """Have the others end too, for this reason."""

    def farewell(self) -> None:
        """Before this process ends with the run."""

    def close(self) -> None:
        """Leave in peace."""


class Channel(Alone):
    """One process's end of the connections; use `connect` of the module rendezvous.

    A thread of its own reads, answers and keeps the beat. When the run is over for all because of another
    process, and the main thread does not end by itself at once, the thread prints the reason and ends the
    process.

    Args:
        index: which process this is.
        peers: process number to connected socket; process 0 has all others, each of those has process 0.
        timeout: seconds of silence after which a peer counts as lost.
    """

    def __init__(self, index: int, count: int, peers: dict[int, socket.socket], timeout: float) -> None:
        self.index, self.count = index, count
        self._peers, self._timeout = peers, timeout
        self._changed = threading.Condition()
        self._outbox: collections.deque[tuple[int | None, Message]] = collections.deque()
        self._results: dict[int, list[Any]] = {}
        self._said: dict[int, dict[int, Any]] = {}
        self._number = 0
        self._allowed, self._holding, self._at = 0, False, dict[int, int]()
        self._halt: tuple[int, int] | None = None
        self._verdict: PeerError | None = None
        self._leaving = threading.Event()
        self._byes: set[int] = set()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        if index:
            speak_before_abort(f"{prefix(index)}error: process 0 {_GONE}; {RESTART}")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def agree(self, value: Any) -> list[Any]:
        """The values of all processes, by process; every process calls this in the same order.

        Args:
            value: JSON-serialisable.

        Raises:
            PeerError: another process ended.
        """
        number, self._number = self._number, self._number + 1
        self._send(0, {"kind": "say", "number": number, "value": value})
        with self._changed:
            self._changed.wait_for(lambda: number in self._results or self._verdict is not None)
            if number not in self._results:
                raise self._verdict or PeerError("")
            return self._results.pop(number)

    def may_go_on(self, step: int) -> bool:
        """Whether the step after `step` may be started; False once all have agreed to stop there.

        After a request to stop, every process promises where it stands; the farthest is where all stop.

        Raises:
            PeerError: another process ended.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: not self._holding or self._halt is not None or self._verdict is not None
            )
            if self._verdict is not None:
                raise self._verdict
            if self._halt is not None and step >= self._halt[0]:
                return False
            self._allowed = step + 1
            return True

    @property
    def halt(self) -> tuple[int, int] | None:
        """The step to stop after and the signal it is for, once that is settled."""
        return self._halt

    def verdict(self, wait: float = 0.0) -> PeerError | None:
        """Why the run is over for all, once that is known; waits up to `wait` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._verdict is not None, wait)
            if self._verdict is not None:
                self._leaving.set()
            return self._verdict

    def request_stop(self, number: int) -> None:
        """Ask all processes to stop after one and the same step; fit for a signal handler."""
        self._send(0, {"kind": "stop", "signal": number})

    def tell(self, message: str, exit_code: int) -> None:
        """Have the others end too, and wait until they have heard it."""
        self._leaving.set()
        self._send(0, {"kind": "end", "who": self.index, "message": message, "code": exit_code})
        with self._changed:
            self._changed.wait_for(lambda: self._verdict is not None, _FAREWELL)
        self.farewell()

    def farewell(self) -> None:
        """Before this process ends with the run: the first waits for the others."""
        self._leaving.set()
        with self._changed:
            # The service of process 0 has to outlive the others: its end would have XLA abort them.
            self._changed.wait_for(lambda: self.index != 0 or not self._peers, _FAREWELL)

    def close(self) -> None:
        """Leave in peace, when all others do."""
        self._send(0, {"kind": "bye"})
        with self._changed:
            self._changed.wait_for(lambda: len(self._byes) == self.count or self._verdict is not None)
            if self._verdict is not None:
                raise self._verdict
        self._leaving.set()
        self._send(None, {"kind": "over"})
        self._thread.join(_FAREWELL)
        leave_abort_alone()

    def _send(self, to: int | None, message: Message) -> None:
        # Only the thread writes to sockets: a signal handler may come in the middle of anything.
        self._outbox.append((to, message))
        with contextlib.suppress(OSError):
            self._wake_out.send(b".")

    def _serve(self) -> None:
        reader = selectors.DefaultSelector()
        reader.register(self._wake_in, selectors.EVENT_READ)
        heard, parts = dict.fromkeys(self._peers, time.monotonic()), dict.fromkeys(self._peers, b"")
        for peer, connection in self._peers.items():
            reader.register(connection, selectors.EVENT_READ, peer)
        beat, beaten = min(self._timeout / 4, 5.0), 0.0
        while True:
            for key, _ in reader.select(beat):
                if key.data is None:
                    with contextlib.suppress(OSError):
                        self._wake_in.recv(4096)
                    continue
                data = _receive(key.fileobj)  # type: ignore[arg-type]
                heard[key.data] = time.monotonic()
                *lines, parts[key.data] = (parts[key.data] + data).split(b"\n")
                for line in lines:
                    self._handle(key.data, json.loads(line))
                if not data:
                    reader.unregister(key.fileobj)
                    self._lose(key.data)
            now = time.monotonic()
            for peer in [peer for peer in self._peers if now - heard[peer] > self._timeout]:
                reader.unregister(self._peers[peer])
                self._lose(peer)
            while self._outbox:
                to, message = self._outbox.popleft()
                if message["kind"] == "over":
                    self._close_sockets()
                    reader.close()
                    return
                self._handle(0, message) if to == self.index else self._write(to, message)
            if now - beaten >= beat:
                beaten = now
                self._write(None, {"kind": "beat"})

    def _close_sockets(self) -> None:
        for connection in (*self._peers.values(), self._wake_in, self._wake_out):
            connection.close()

    def _write(self, to: int | None, message: Message) -> None:
        """Send to one peer, or to all."""
        line = json.dumps(message).encode() + b"\n"
        for peer, connection in list(self._peers.items()):
            if to is None or peer == to:
                # A connection that is gone is noticed where it is read.
                with contextlib.suppress(OSError):
                    connection.sendall(line)

    def _handle(self, peer: int, message: Message) -> None:
        kind = message["kind"]
        if self.index == 0 and kind in ("say", "stop", "at", "bye", "end"):
            self._handle_as_first(peer, message)
        elif kind == "hear":
            self._note(lambda: self._results.__setitem__(message["number"], message["values"]))
        elif kind == "hold":
            with self._changed:
                self._holding = True
                self._outbox.append((0, {"kind": "at", "step": self._allowed, "signal": message["signal"]}))
        elif kind == "halt":
            self._note(lambda: setattr(self, "_halt", (message["step"], message["signal"])))
        elif kind == "parted":
            self._note(lambda: self._byes.update(range(self.count)))
        elif kind == "end":
            self._condemn(message["message"], message["code"])

    def _handle_as_first(self, peer: int, message: Message) -> None:
        """What process 0 does for all, itself included."""
        kind = message["kind"]
        if kind == "say":
            said = self._said.setdefault(message["number"], {})
            said[peer] = message["value"]
            if len(said) == self.count:
                del self._said[message["number"]]
                values = [said[process] for process in range(self.count)]
                self._to_all({"kind": "hear", "number": message["number"], "values": values})
        elif kind == "stop" and not self._holding:
            self._to_all({"kind": "hold", "signal": message["signal"]})
        elif kind == "at":
            self._at[peer] = message["step"]
            if len(self._at) == self.count:
                farthest = max(self._at.values())
                self._to_all({"kind": "halt", "step": farthest, "signal": message["signal"]})
        elif kind == "bye":
            self._byes.add(peer)
            if len(self._byes) == self.count:
                self._to_all({"kind": "parted"})
        elif kind == "end":
            words = f"process {message['who']} of this run ended: {message['message']}"
            self._condemn(words, message["code"])

    def _to_all(self, message: Message) -> None:
        self._write(None, message)
        self._handle(0, message)

    def _note(self, change: Callable[[], Any]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    def _lose(self, peer: int) -> None:
        self._peers.pop(peer).close()
        self._note(lambda: None)
        if len(self._byes) < self.count:
            self._condemn(f"process {peer} {_GONE}; {RESTART}", 1)

    def _condemn(self, words: str, exit_code: int) -> None:
        """The run is over: for the others of process 0 by its word, and here as soon as can be."""
        if self._verdict is not None:
            return
        self._note(lambda: setattr(self, "_verdict", PeerError(words, exit_code)))
        if self.index == 0:
            self._write(None, {"kind": "end", "message": words, "code": exit_code})
        threading.Thread(target=self._end, args=(words, exit_code), daemon=True).start()

    def _end(self, words: str, exit_code: int) -> None:
        if self._leaving.wait(_GRACE if self.index == 0 or self._peers else 0.0):
            return
        self.farewell()
        say_last(f"{prefix(self.index)}error: {words}")
        os._exit(exit_code)


def prefix(index: int) -> str:
    """What stands before a line that a process other than the first prints."""
    return f"process {index}: " if index else ""


def say_last(line: str) -> None:
    """Print a line on stderr where the main thread may be anywhere, also in the middle of a print."""
    # A live bar hides the cursor.
    shown = "\x1b[?25h" if sys.stdout is not None and sys.stdout.isatty() else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{shown}{line}\n".encode())


def speak_before_abort(line: str) -> None:
    """XLA aborts a process whose coordinator is gone, over the head of Python: print what that means.

    Args:
        line: for stderr; the process then exits with 1.
    """

    def speak(number: int) -> None:
        say_last(line)
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(speak)
    _HANDLERS.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def leave_abort_alone() -> None:
    """Undo `speak_before_abort`."""
    ctypes.CDLL(None).signal(int(signal.SIGABRT), None)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""
