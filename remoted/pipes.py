"""The two pipes into which a worker prints: read as it comes, and read dry where somebody needs all of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_READ_BYTES = 64 * 1024


class Pipes:
    """The daemon's ends. ``deliver`` is called with the stream (1, 2) and what was printed there."""

    def __init__(self, deliver: Callable[[int, bytes], None]) -> None:
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
                self._loop.add_reader(fd, self._read, stream)
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

    def _read(self, stream: int) -> None:
        fd = self._fds.get(stream)
        # Bounded: a body that prints without end must not hold the loop.
        for _ in range(16):
            if fd is None:
                return
            try:
                data = os.read(fd, _READ_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # what cannot be read any more must not take the call's outcome with it
                data = b""
            if not data:
                self._close(stream)
                return
            self._deliver(stream, data)

    def _close(self, stream: int) -> None:
        fd = self._fds.pop(stream, None)
        if fd is not None:
            self._loop.remove_reader(fd)
            os.close(fd)
