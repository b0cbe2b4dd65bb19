"""How far a worker has come with what it was given: a page in a file that it writes and the daemon reads.

A worker has the next few short calls already while it runs one (``Jobs``). When it dies, those that it had not begun
are no attempts, so it must be known which they are. The worker stores the position of each call in the page before it
begins it (a store in shared memory, no system call). The page is a file, so that it can still be read when the daemon
has died as well; it is never synced: after a power cut whatever was given counts as begun.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from remoted_client import wire


class Begun(NamedTuple):
    """What the page says: the position of the newest call that was begun (0 before the first), and whether no other will be."""

    position: int
    is_last: bool


class Progress:
    """The page of one worker. It is the user's word: a false one changes how often his own calls are tried."""

    def __init__(self, path: Path, is_new: bool = True) -> None:
        """Not ``is_new``: that of a worker of an earlier daemon. Raises OSError."""
        self._path = path
        making = os.O_CREAT | os.O_EXCL if is_new else 0
        self.fd = os.open(path, os.O_RDWR | making | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if is_new:
            self._allocate()

    def _allocate(self) -> None:
        """A worker that writes into a page for which a full disk has no room dies of SIGBUS."""
        try:
            os.posix_fallocate(self.fd, 0, wire.PROGRESS_PAGE_BYTES)
        except OSError:
            self.close()
            raise

    def read(self) -> Begun:
        return _read(self.fd)

    def close(self) -> None:
        """The worker is dead, and what it has begun is known. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._path.unlink(missing_ok=True)


def read_page(path: Path) -> Begun | None:
    """The same, of a worker of an earlier daemon. None if nothing is known."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return _read(fd)
        finally:
            os.close(fd)
    return None


def _read(fd: int) -> Begun:
    data = os.pread(fd, wire.PROGRESS_PAGE.size, 0)
    if len(data) < wire.PROGRESS_PAGE.size:  # the worker has cut it off: whatever it was given counts
        return Begun(1 << 63, False)
    position, is_last = wire.PROGRESS_PAGE.unpack(data)
    return Begun(position, bool(is_last))
