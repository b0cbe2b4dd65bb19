"""Descriptors that are not what they are passed for: an open file, say, of a file system that its sender serves himself.

Whoever looks at such a file, closes it, or only closes the socket in which it lies, asks its server (fuse_flush, fs/fuse/file.c) and
waits as long as that likes, and no signal ends that. So nothing is asked of a descriptor before the kernel has said that it is
memory or a Unix socket, which concerns no file system; what a connection still holds is taken out of it before it is closed; and
whatever is no memory is closed by a thread of its own, behind which the file system is ended that keeps it waiting (decision 0076).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import functools
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from remoted_client import wire

log = logging.getLogger(__name__)
#: A file system that has not let go of a file after so long is ended: nobody of ours can end before.
_PATIENCE_SECONDS = 2.0
#: The kernel's own, one folder for each FUSE that is mounted, named by its device (Documentation/filesystems/fuse.rst).
_CONNECTIONS = Path("/sys/fs/fuse/connections")
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC, _STATX_BYTES, _STATX_DEVICE = 0x1000, 0x4000, 256, 136
_DRAIN_BYTES = 256 * 1024


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

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is over
            loop.call_soon_threadsafe(error.closed.set_result, None)

    let_go(fds, tell)
    raise error


def let_go(fds: list[int] | tuple[int, ...], then: Callable[[], object] = lambda: None) -> None:
    """Close whatever they are without waiting for it."""
    if others := _close_memory(fds):
        threading.Thread(target=_close, args=(others, then), name="foreign", daemon=True).start()
    else:
        then()


def _close_memory(fds: list[int] | tuple[int, ...]) -> list[int]:
    """Returns the others."""
    others = []
    for fd in fds:
        if is_memory(fd):
            os.close(fd)
        else:
            others.append(fd)
    return others


def leave(sock: socket.socket) -> None:
    """End a peer's connection; other processes that have it see its end too. What lies unread in it is taken out and let go."""
    if sock.fileno() < 0:
        return
    left: list[int] = []
    with contextlib.suppress(OSError, wire.WireError):
        sock.shutdown(socket.SHUT_RDWR)  # nothing comes any more
        while True:
            data, fds = wire.receive(sock, _DRAIN_BYTES, wire.AT_ONCE)
            left += _close_memory(fds)
            if not (data or fds):
                break
    is_empty = sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    last = sock.detach()
    if is_empty:
        os.close(last)
    else:  # behind an empty message there may be others, and in what nobody has accepted too
        left.append(last)
    if left:
        let_go(left)


class ByteSocket(socket.socket):
    """A connection on which bytes are passed and nothing else, for who does not look for anything else (asyncio)."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        try:
            data, fds = wire.receive(self, size, flags)
        except wire.WireError as error:
            raise ConnectionResetError(str(error)) from None
        if fds:
            let_go(fds)
            raise ConnectionResetError("descriptors were passed where none are taken")
        return data

    def close(self) -> None:
        leave(self)
        super().close()


# -- the thread of whom nobody waits for -------------------------------------------------------------------


def _close(fds: list[int], then: Callable[[], object]) -> None:
    waiting = {device for fd in fds if (device := _fuse_of(fd)) is not None}
    impatience = threading.Timer(_PATIENCE_SECONDS, _end, (waiting,))
    impatience.daemon = False  # the process does not end before
    if waiting:
        impatience.start()
    for fd in fds:
        with contextlib.suppress(OSError):  # as its server says; it is closed all the same (close(2))
            os.close(fd)
    impatience.cancel()
    then()


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _fuse_of(fd: int) -> Path | None:
    """The folder of the FUSE that the file belongs to, without a question to whoever serves it.

    statx(2) for nothing but the device, as it is cached: fuse_getattr (fs/fuse/dir.c) answers that to strangers too.
    """
    found = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        if _libc().statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, found):
            return None
    except AttributeError:  # a C library from before 2018
        return None
    major, minor = struct.unpack_from("=II", found, _STATX_DEVICE)
    folder = _CONNECTIONS / str(minor)
    return folder if major == 0 and folder.exists() else None


def _end(connections: set[Path]) -> None:
    """Whoever waits for these is answered with an error, now and from here on."""
    for folder in connections:
        with contextlib.suppress(OSError):
            owner = folder.stat().st_uid
            (folder / "abort").write_text("1", encoding="ascii")
            log.warning("a file of a file system of uid %d (FUSE connection %s) was passed here and could not be closed: that file system was ended", owner, folder.name)
