"""systemd's journal: entries with fields by its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL), and lines that it reads from a stream.

An entry is one datagram of KEY=VALUE lines. It never blocks the daemon: what the journal does not take at once waits here, up to a bound, and beyond it is counted and lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Mapping
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")
_WAITING_MOST = 10_000
#: syslog(3): critical, error, warning, informational, debugging.
_LEVELS = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


class LeveledLines(logging.Formatter):
    """For a stream that the journal reads: it knows the time, and takes the level from the front of each line (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        level = next(level for least, level in _LEVELS if record.levelno >= least)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def is_read_from(fd: int, environ: Mapping[str, str]) -> bool:
    """Does the journal read what is written there (JOURNAL_STREAM, systemd.exec(5))? What somebody has redirected since has another file behind it."""
    status = os.fstat(fd)
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Journal:
    """Use from one event loop. Values must be single lines."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = path
        self._sock: socket.socket | None = None
        self._waiting: deque[bytes] = deque()
        self._loop = asyncio.get_running_loop()
        #: Entries that nobody will ever read.
        self.lost = 0

    def send(self, fields: Mapping[str, str]) -> None:
        """One entry, in order with the others."""
        if any("\n" in value for value in fields.values()):
            raise ValueError("cannot write to the journal: a value has several lines")
        if len(self._waiting) >= _WAITING_MOST:
            self.lost += 1
            return
        self._waiting.append("".join(f"{key}={value}\n" for key, value in fields.items()).encode("utf-8", "backslashreplace"))
        if len(self._waiting) == 1:
            self._flush()

    def _flush(self) -> None:
        """As much as the journal takes now; the rest when it has room."""
        while self._waiting:
            try:
                self._connected().send(self._waiting[0])
            except BlockingIOError:
                if self._sock is not None:
                    self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:  # it restarts, or is not there: a new connection finds out at the next entry
                self.lost += 1
                self._disconnect()
            self._waiting.popleft()
        if self._sock is not None:
            self._loop.remove_writer(self._sock)

    def _connected(self) -> socket.socket:
        if self._sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            try:
                sock.connect(str(self._path))
            except OSError:
                sock.close()
                raise
            self._sock = sock
        return self._sock

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None

    def close(self, patience_seconds: float = 1.0) -> None:
        """What waits is given once more time, for all of it together no more than this."""
        with contextlib.suppress(OSError):
            if self._sock is not None:
                self._sock.settimeout(patience_seconds)
                while self._waiting:
                    self._sock.send(self._waiting[0])
                    self._waiting.popleft()
        self.lost += len(self._waiting)
        self._waiting.clear()
        self._disconnect()
