"""How the processes of a run come to hold the connections that a `Channel` speaks over."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from typing import Any

import numpy as np

from mmjax.parallel.channel import RESTART, Alone, Channel, PeerError

_ADDRESS_BYTES = 1024


def connect(timeout: float = 40.0, hosts: tuple[str, ...] = ()) -> Alone:
    """Connect the processes of a run; every process calls this at the same place.

    Args:
        timeout: seconds of silence after which a process counts as lost.
        hosts: names or addresses of process 0's machine that it knows itself by, beside its host name.

    Raises:
        PeerError: process 0 cannot be reached.
    """
    import jax
    from jax.experimental import multihost_utils

    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return Alone()
    address = np.zeros(_ADDRESS_BYTES, np.uint8)
    if index == 0:
        server = _listen(count)
        invitation = {
            "hosts": [*hosts, socket.gethostname(), "127.0.0.1"],
            "port": server.getsockname()[1],
            "token": secrets.token_hex(16),
        }
        text = json.dumps(invitation).encode()
        address[: len(text)] = np.frombuffer(text, np.uint8)
    try:
        text = multihost_utils.broadcast_one_to_all(address).tobytes().rstrip(b"\0")
    except jax.errors.JaxRuntimeError as error:
        raise PeerError(f"another process of this run ended while it was starting; {RESTART}") from error
    invitation = json.loads(text)
    if index == 0:
        with server:
            peers = _welcome(server, count, invitation["token"], timeout)
    else:
        peers = {0: _join(index, invitation, timeout)}
    return Channel(index, count, peers, timeout)


def _listen(count: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=count, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=count)


def _welcome(server: socket.socket, count: int, token: str, timeout: float) -> dict[int, socket.socket]:
    """Accept all others; who does not know the token is none of them."""
    peers: dict[int, socket.socket] = {}
    end = time.monotonic() + max(timeout, 30.0)
    while len(peers) < count - 1:
        server.settimeout(max(end - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
            connection.settimeout(timeout)
            hello = json.loads(_read_line(connection))
        except ValueError:
            continue
        except OSError as error:
            missing = sorted(set(range(1, count)) - set(peers))
            raise PeerError(
                f"process {', '.join(map(str, missing))} of this run did not connect; {RESTART}"
            ) from error
        if isinstance(hello, dict) and secrets.compare_digest(str(hello.get("token")), token):
            peers[int(hello["index"])] = connection
    return peers


def _read_line(connection: socket.socket) -> bytes:
    """One line and no byte more: what follows is for the channel."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _ADDRESS_BYTES:
        byte = connection.recv(1)
        if not byte:
            break
        line += byte
    return line


def _join(index: int, invitation: dict[str, Any], timeout: float) -> socket.socket:
    hosts, port = dict.fromkeys(invitation["hosts"]), invitation["port"]
    for host in hosts:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host, port), timeout=10.0)
            connection.settimeout(timeout)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = {"index": index, "token": invitation["token"]}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            return connection
    raise PeerError(f"process 0 of this run cannot be reached at {' or '.join(hosts)}, port {port}")
