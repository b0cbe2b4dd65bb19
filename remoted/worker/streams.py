"""Descriptors 0, 1 and 2 of the worker: kept whole whatever the user's code does to them."""

from __future__ import annotations

import contextlib
import os
import sys


class StandardStreams:
    """Holds close-on-exec copies of the two pipes, so that a body that closes them harms only itself."""

    def __init__(self) -> None:
        self._copies = {fd: os.dup(fd) for fd in (0, 1, 2)}
        self._identity = {fd: _identity(fd) for fd in (0, 1, 2)}
        self._objects = (sys.stdin, sys.stdout, sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            # Live output: every write leaves at once, and what is not UTF-8 in a string must not raise.
            stream.reconfigure(write_through=True, errors="backslashreplace")  # type: ignore[union-attr]

    def flush(self) -> None:
        """What Python still buffers goes out before the outcome is told."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a body may have put anything there, or closed it
                stream.flush()

    def restore(self) -> None:
        """Put back what the body closed or replaced."""
        for fd, copy in self._copies.items():
            if _identity(fd) != self._identity[fd]:
                os.dup2(copy, fd)
        sys.stdin, sys.stdout, sys.stderr = self._objects
        for fd, stream in ((1, sys.stdout), (2, sys.stderr)):
            if stream.closed:
                reopened = open(fd, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
                reopened.reconfigure(write_through=True)
                setattr(sys, "stdout" if fd == 1 else "stderr", reopened)
                self._objects = (sys.stdin, sys.stdout, sys.stderr)


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino
