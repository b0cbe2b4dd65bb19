"""The two pipes into which a worker prints: read as it comes, and read dry where somebody needs all of it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import struct
import termios
from collections.abc import Callable

_READ_BYTES = 64 * 1024
_COUNT = struct.Struct("i")


class Unread:
    """What waits at the head of a pipe, until it is read there or moved into a file; its ``data`` can be had either way."""

    __slots__ = ("_data", "_place", "pipe", "size")

    def __init__(self, pipe: int, size: int) -> None:
        """``size``: bytes; so many are there."""
        self.pipe = pipe
        self.size = size
        self._data: bytes | None = None
        self._place: tuple[int, int] | None = None

    @property
    def data(self) -> bytes:
        """Reads it, once."""
        if self._data is None:
            self._data = os.pread(self._place[0], self.size, self._place[1]) if self._place else os.read(self.pipe, self.size)
        return self._data

    def leave(self) -> None:
        """If nobody has taken it, it is gone."""
        if self._place is None and self._data is None:
            self._data = os.read(self.pipe, self.size)

    def move(self, file: int, offset: int) -> None:
        """Into ``file``, open for reading and writing, in one system call: at every moment it is in one of the two (splice(2)).

        ``size`` is then what has moved. Raises OSError; what has not moved is still in the pipe.
        """
        self.size = os.splice(self.pipe, file, self.size, offset_dst=offset, flags=os.SPLICE_F_NONBLOCK)
        self._place = (file, offset)


class Pipes:
    """The daemon's ends. ``deliver`` is called with the stream (1, 2) and what was printed there."""

    def __init__(self, deliver: Callable[[int, Unread], None]) -> None:
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._fds: dict[int, int] = {}
        self._is_watched = False

    def open(self) -> tuple[int, int]:
        """The write ends for the worker's stdout and stderr; the caller closes them once the worker has them."""
        ends: list[int] = []
        for stream in (1, 2):
            self._fds[stream], end = os.pipe2(os.O_CLOEXEC)
            ends.append(end)
        return ends[0], ends[1]

    def take(self, stdout: int, stderr: int) -> None:
        """The read ends of a worker that has its own already; they are this object's from here on."""
        self._fds = {1: stdout, 2: stderr}
        for fd in self._fds.values():
            os.set_blocking(fd, False)

    @property
    def ends(self) -> tuple[int, int]:
        """The read ends of stdout and stderr. Raises KeyError once one of them has been read to its end."""
        return self._fds[1], self._fds[2]

    def watch(self, is_watched: bool = True) -> None:
        """Read whatever comes from now on, or leave it there until somebody drains it."""
        if is_watched is self._is_watched:
            return
        self._is_watched = is_watched
        for stream, fd in self._fds.items():
            if is_watched:
                os.set_blocking(fd, False)
                self._loop.add_reader(fd, self._on_readable, stream)
            else:
                self._loop.remove_reader(fd)

    def drain(self) -> None:
        """Everything that was printed until now."""
        for stream in list(self._fds):
            self._read(stream)

    def close(self) -> None:
        """Idempotent; what nobody has read is gone."""
        for stream in list(self._fds):
            self._close(stream)

    def _on_readable(self, stream: int) -> None:
        if not self._read(stream) and (fd := self._fds.get(stream)) is not None and _has_ended(fd):
            self._close(stream)

    def _read(self, stream: int) -> bool:
        """Was there anything?"""
        found = False
        # Bounded: a body that prints without end must not hold the loop.
        for _ in range(16):
            fd = self._fds.get(stream)
            try:
                if fd is None or not (size := _waiting_bytes(fd)):
                    break
                found = True
                said = Unread(fd, min(size, _READ_BYTES))
                self._deliver(stream, said)
                said.leave()
            except OSError:  # what cannot be read any more must not take the call's outcome with it
                self._close(stream)
        return found

    def _close(self, stream: int) -> None:
        fd = self._fds.pop(stream, None)
        if fd is not None:
            self._loop.remove_reader(fd)
            os.close(fd)


def _waiting_bytes(fd: int) -> int:
    return int(_COUNT.unpack(fcntl.ioctl(fd, termios.FIONREAD, bytes(_COUNT.size)))[0])


def _has_ended(fd: int) -> bool:
    """Nobody can write into it any more, and nothing is left."""
    look = select.poll()
    look.register(fd, 0)
    return bool(look.poll(0)) and not _waiting_bytes(fd)
