"""Descriptors 0, 1 and 2 of the worker: kept whole whatever the user's code does to them."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import select
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from .routing import RoutedStream

#: As ``remoted/logs.py`` writes them.
_RECORD = struct.Struct("!BI")
_KEPT_BYTES = 64 << 20
_LOOK_MILLISECONDS = 50
#: Calls that take microseconds are not each followed by a look at what they did to the descriptors.
_RESTORE_SECONDS = 0.05


class StandardStreams:
    """Holds close-on-exec copies of the two pipes, so that a body that closes them harms only itself."""

    def __init__(self) -> None:
        self._copies = {fd: os.dup(fd) for fd in (0, 1, 2)}
        self._identity = {fd: _identity(fd) for fd in (0, 1, 2)}
        #: Read ends of the two pipes: without a daemon a full or broken pipe must not stop the body (MECHANISMS 4).
        self._readers = {fd: os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) for fd in (1, 2)}
        self._counted = (0, 0)
        self._looked = 0.0
        self._poller = select.poll()
        for fd in self._copies:
            self._poller.register(fd, 0)
        for fd in self._readers.values():
            self._poller.register(fd, select.POLLIN)
        self._keeping: threading.Thread | None = None
        self._finished = threading.Event()
        sys.stdout, sys.stderr = _open(1), _open(2)
        self._objects: tuple[Any, Any, Any] = (sys.stdin, sys.stdout, sys.stderr)

    def route(self, send: Callable[[str, int, bytes], object]) -> None:
        """Several calls at once from now on: each write is sent with the call that made it."""
        stdin, stdout, stderr = self._objects
        if not isinstance(stdout, RoutedStream):
            self._objects = (stdin, RoutedStream(stdout, 1, send), RoutedStream(stderr, 2, send))
            sys.stdin, sys.stdout, sys.stderr = self._objects

    def flush(self) -> None:
        """What Python still buffers goes out before the outcome is told."""
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except Exception:  # a body may have put anything there, or closed it
            with contextlib.suppress(Exception):
                sys.stderr.flush()

    def note_printed(self) -> None:
        """Output went another way."""
        _Counted.writes += 1

    def take_printed(self) -> bool:
        """May anything have been printed since the last question?

        By Python; by a child process, of which it is enough that it has ended; by anybody else if the daemon has not read
        it yet. What a C library wrote and the daemon has read already is on its way to the caller.
        """
        count = _Counted.writes, resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        printed, self._counted = count != self._counted, count
        # One system call for both questions: are the three descriptors open, is anything in the pipes?
        for fd, _ in self._poller.poll(0):
            if fd in self._copies:
                self._looked = 0.0
            else:
                printed = True
        return printed

    def restore_soon(self) -> None:
        """As ``restore``, when something was closed, or it has not been looked at for a while."""
        if time.monotonic() - self._looked > _RESTORE_SECONDS or sys.stdout is not self._objects[1] or sys.stderr is not self._objects[2]:
            self.restore()

    def restore(self) -> None:
        """Put back what the body closed or replaced."""
        self._looked = time.monotonic()
        for fd, copy in self._copies.items():
            if _identity(fd) != self._identity[fd]:
                os.dup2(copy, fd)
        sys.stdin, sys.stdout, sys.stderr = self._objects
        for fd, stream in ((1, sys.stdout), (2, sys.stderr)):
            if stream.closed:
                setattr(sys, "stdout" if fd == 1 else "stderr", _open(fd))
                self._objects = (sys.stdin, sys.stdout, sys.stderr)

    def keep_output(self, spool: int) -> None:
        """The daemon is gone: what is printed from now on goes to a file, for the next one to find; -1: to nobody."""
        thread = threading.Thread(target=self._keep, args=(spool,), name="output", daemon=True)
        thread.start()
        self._keeping = thread

    def finish_output(self) -> None:
        """Everything printed so far is in the file."""
        if self._keeping is not None:
            self._finished.set()
            self._keeping.join()

    def _keep(self, spool: int) -> None:
        poller = select.poll()
        for fd in self._readers.values():
            poller.register(fd, select.POLLIN)
        kept = 0
        with open(spool if spool >= 0 else os.devnull, "ab", buffering=0) as file:
            while poller.poll(0) or not self._finished.is_set():
                poller.poll(_LOOK_MILLISECONDS)
                for stream, fd in self._readers.items():
                    with contextlib.suppress(OSError):  # nothing there; or the disk is full, and the body goes on
                        data = os.read(fd, 65536)
                        kept += len(data)
                        if data and kept <= _KEPT_BYTES:
                            file.write(_RECORD.pack(stream, len(data)) + data)


class _Counted(io.FileIO):
    """A standard stream that knows that it was written to."""

    writes = 0

    def write(self, data: Any, /) -> int:
        _Counted.writes += 1
        return super().write(data)


def _open(fd: int) -> io.TextIOWrapper:
    """As on a terminal: every line leaves at once, and so does what ends with a carriage return.

    What is not UTF-8 in a string must not raise.
    """
    return io.TextIOWrapper(io.BufferedWriter(_Counted(fd, "w", closefd=False)), encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino
