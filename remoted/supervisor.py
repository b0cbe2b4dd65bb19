"""What systemd hands over and what it wants to hear: listening sockets, readiness, signs of life (sd_listen_fds(3), sd_notify(3)).

Without systemd there is nothing to take and nobody to tell. The variables are taken out of the environment: no process of
anybody else's shall speak for the daemon (T27).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path

_FIRST_DESCRIPTOR = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
#: A sign of life must come twice in each period.
_HALF = 0.5


class Supervisor:
    """Made once, from the environment of a new daemon."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        found = {name: environ.pop(name, "") for name in _VARIABLES}
        self._address = found["NOTIFY_SOCKET"]
        self._sockets = _sockets(int(found["LISTEN_FDS"] or 0) if found["LISTEN_PID"] == str(os.getpid()) else 0)
        is_ours = found["WATCHDOG_PID"] in ("", str(os.getpid()))
        self._watchdog_seconds = int(found["WATCHDOG_USEC"] or 0) / 1e6 if is_ours else 0.0

    @property
    def is_systemd(self) -> bool:
        return bool(self._address)

    def take_socket(self, path: Path) -> socket.socket | None:
        """The socket that listens there already."""
        return self._sockets.pop(os.fspath(path), None)

    def say(self, *words: str) -> None:
        """As ``READY=1``. One who does not listen any more is no reason to fail."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto("\n".join(words).encode(), address)

    async def feed(self, makes_progress: Callable[[], Awaitable[object]]) -> None:
        """For as long as the daemon lives: a sign of life each time that the loop has turned and ``makes_progress`` is true (T58)."""
        if not self._watchdog_seconds:
            return
        while True:
            await makes_progress()
            self.say("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_seconds * _HALF)


def _sockets(count: int) -> dict[str, socket.socket]:
    """By path. What is no listening socket is closed."""
    found: dict[str, socket.socket] = {}
    for fd in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + count):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        if sock.family == socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found[str(sock.getsockname())] = sock
        else:
            sock.close()
    return found
