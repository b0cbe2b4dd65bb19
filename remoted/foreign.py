"""Descriptors that are not what they are passed for: an open file, say, of a file system that its sender serves himself.

Whoever looks at such a file, or only closes it, asks its server (fuse_flush, fs/fuse/file.c) and waits as long as that likes,
and no signal ends that. So nothing is asked of a descriptor before the kernel has said that it is memory or a Unix socket, which
concerns no file system; and what is neither is closed by a thread of its own, so that nobody else waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Callable

from remoted_client import wire


class ForeignDescriptors(wire.WireError):
    """``closed``: set once they are, which may be never."""

    def __init__(self) -> None:
        super().__init__("BAD_FDS", "cannot take the descriptors: only memory (memfd_create) is passed here")
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def is_memory(fd: int) -> bool:
    """Only memory can be sealed."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def is_memory_or_socket(fd: int) -> bool:
    """A TCP socket would not do: to close one can take as long as its sender has said (SO_LINGER)."""
    return is_memory(fd) or _is_unix_socket(fd)


def _is_unix_socket(fd: int) -> bool:
    try:
        found = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        return found.family == socket.AF_UNIX
    finally:
        found.detach()


def sift(fds: list[int], is_welcome: Callable[[int], bool]) -> list[int]:
    """The same, if all are welcome. Raises ForeignDescriptors, and nobody but a thread has to do with them then."""
    if all(map(is_welcome, fds)):
        return fds
    error, loop = ForeignDescriptors(), asyncio.get_running_loop()
    threading.Thread(target=_close, args=(fds, loop, error.closed), name="foreign", daemon=True).start()
    raise error


def _close(fds: list[int], loop: asyncio.AbstractEventLoop, closed: asyncio.Future[None]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):  # as its server says; it is closed all the same (close(2))
            os.close(fd)
    with contextlib.suppress(RuntimeError):  # the loop is over
        loop.call_soon_threadsafe(closed.set_result, None)
