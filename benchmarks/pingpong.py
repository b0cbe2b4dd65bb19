"""The floor under every call: two Python processes, one blocking Unix socket, pickle, a length before each message.

The kernel likes to put two that only ever wake each other on one core, where a wake-up is a switch and costs a fifth of what it costs between cores. A client and a worker
that have other work are on two, so the floor is; the other one is shown beside it (docs/decisions/0101).
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("!I")


def _read(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size)
    while data and len(data) < size:
        data += sock.recv(size - len(data))
    return data


def _send(sock: socket.socket, value: Any) -> None:
    data = pickle.dumps(value, protocol=5)
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _receive(sock: socket.socket) -> Any:
    """Raises EOFError at the end of the connection."""
    head = _read(sock, _LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    return pickle.loads(_read(sock, _LENGTH.unpack(head)[0]))


class PingPong:
    """A child that answers every pickle with its result, as the barest worker would."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno())]
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def call(self) -> Any:
        """One round trip: name, arguments and keywords there, a value back."""
        _send(self._sock, ("noop", (), {}))
        return _receive(self._sock)

    def call_apart(self, sample: Callable[[], list[float]]) -> list[float]:
        """The samples of calls between two cores, where there are two."""
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(self._child.pid, cores[-1:])
        os.sched_setaffinity(0, cores[:1])
        try:
            return sample()
        finally:
            os.sched_setaffinity(0, cores)
            os.sched_setaffinity(self._child.pid, cores)

    def close(self) -> None:
        self._sock.close()
        self._child.wait(10)


def _answer(fd: int) -> None:
    with socket.socket(fileno=fd) as sock:
        while True:
            try:
                _receive(sock)
            except EOFError:
                return
            _send(sock, None)


if __name__ == "__main__":
    _answer(int(sys.argv[1]))
