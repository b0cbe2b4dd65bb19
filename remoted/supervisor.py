"""What systemd hands over and what it wants to hear: listening sockets, readiness, signs of life (sd_listen_fds(3), sd_notify(3)).

It also keeps descriptors for the next daemon, under names (FDSTORE=1); what it does with them is ``fdstore``'s business.

Without systemd there is nothing to take and nobody to tell. The variables are taken out of the environment: no process of
anybody else's shall speak for the daemon (T27).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path

from remoted_client import wire

_FIRST_DESCRIPTOR = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
#: A sign of life must come twice in each period.
_HALF = 0.5
#: One who does not take our words for so long hangs, and we do not hang with it.
_SEND_SECONDS = 1.0


class Supervisor:
    """Made once, from the environment of a new daemon. ``first`` descriptor of those that were handed over."""

    def __init__(self, environ: MutableMapping[str, str], first: int = _FIRST_DESCRIPTOR) -> None:
        found = {name: environ.pop(name, "") for name in _VARIABLES}
        self._address = found["NOTIFY_SOCKET"]
        count = int(found["LISTEN_FDS"] or 0) if found["LISTEN_PID"] == str(os.getpid()) else 0
        self._sockets, self._stored = _sorted(range(first, first + count), found["LISTEN_FDNAMES"].split(":"))
        is_ours = found["WATCHDOG_PID"] in ("", str(os.getpid()))
        self._watchdog_seconds = int(found["WATCHDOG_USEC"] or 0) / 1e6 if is_ours else 0.0

    @property
    def is_systemd(self) -> bool:
        return bool(self._address)

    def take_socket(self, path: Path) -> socket.socket | None:
        """The socket that listens there already."""
        return self._sockets.pop(os.fspath(path), None)

    def take_stored(self) -> dict[str, list[int]]:
        """What an earlier daemon has stored, by name, in no order; the taker's to close. It stays in the store until ``unstore``."""
        stored, self._stored = self._stored, {}
        return stored

    def say(self, *words: str) -> None:
        """As ``READY=1``. One who does not listen any more is no reason to fail."""
        with contextlib.suppress(OSError):
            self._send(words)

    def store(self, name: str, fds: tuple[int, ...]) -> bool:
        """Keep these for the next daemon, also after their other ends have gone. They stay the caller's. Was it told?"""
        try:
            return self._send(("FDSTORE=1", "FDPOLL=0", f"FDNAME={name}"), fds)
        except OSError:
            return False

    def unstore(self, name: str) -> None:
        """Close all of this name."""
        self.say("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _send(self, words: tuple[str, ...], fds: tuple[int, ...] = ()) -> bool:
        if not self._address:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_SEND_SECONDS)
            sock.connect("\0" + self._address[1:] if self._address.startswith("@") else self._address)
            wire.send(sock, "\n".join(words).encode(), fds)
        return True

    async def feed(self, makes_progress: Callable[[], Awaitable[object]]) -> None:
        """For as long as the daemon lives: a sign of life each time that the loop has turned and ``makes_progress`` is true (T58)."""
        if not self._watchdog_seconds:
            return
        while True:
            await makes_progress()
            self.say("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_seconds * _HALF)


def _sorted(fds: Iterable[int], names: list[str]) -> tuple[dict[str, socket.socket], dict[str, list[int]]]:
    """Listening sockets by path, and everything else by the name under which it was stored."""
    sockets: dict[str, socket.socket] = {}
    stored: dict[str, list[int]] = {}
    for number, fd in enumerate(fds):
        os.set_inheritable(fd, False)
        if (listening := _as_listening(fd)) is not None:
            sockets[str(listening.getsockname())] = listening
        else:
            stored.setdefault(names[number] if number < len(names) else "", []).append(fd)
    return sockets, stored


def _as_listening(fd: int) -> socket.socket | None:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return None
    sock = socket.socket(fileno=fd)
    if sock.family == socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return sock
    sock.detach()
    return None
