"""What the connection's thread does beside its own socket: timers, errands, and sockets that nobody else reads."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from remoted_client.lease import LINE
from remoted_client.printed import tell_fault

if TYPE_CHECKING:
    from remoted_client.lease import Lease


class Attendant:
    """Any thread asks; the connection's thread does it in ``rounds``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errands: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._leases: dict[int, Lease] = {}
        self._selector: selectors.BaseSelector | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def post(self, errand: Callable[[], None]) -> None:
        """Run it in the connection's thread, once there is a connection."""
        self._errands.append(errand)
        self.wake()

    def after(self, seconds: float, errand: Callable[[], None]) -> None:
        with self._lock:
            heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), errand))
        self.wake()

    def attend(self, lease: Lease) -> None:
        """Read the answers of this lease until ``leave``."""
        self.post(lambda: self._register(lease))

    def leave(self, lease: Lease) -> None:
        self.post(lambda: self._unregister(lease))

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def rounds(self, sock: socket.socket, on_readable: Callable[[], bool], before_waiting: Callable[[], bool]) -> None:
        """Until ``on_readable`` says that the connection has ended. ``before_waiting``: is there something to write?"""
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            self._leases.clear()
            selector.register(sock, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            try:
                while True:
                    self._run_errands()
                    selector.modify(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if before_waiting() else 0))
                    for key, events in selector.select(self._until_timer()):
                        if key.fd == self._wake_read:
                            os.read(self._wake_read, 65536)
                        elif key.data is not None:
                            self._read(key.data)
                        elif events & selectors.EVENT_READ and not on_readable():
                            return
                    self._run_timers()
            finally:
                self._selector = None

    def _run_errands(self) -> None:
        while self._errands:
            _apart(self._errands.popleft())

    def _until_timer(self) -> float | None:
        with self._lock:
            return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        while True:
            with self._lock:
                if not self._timers or self._timers[0][0] > time.monotonic():
                    return
                errand = heapq.heappop(self._timers)[2]
            _apart(errand)

    def _read(self, lease: Lease) -> None:
        if lease.reader == LINE and not lease.is_closed:
            lease.read_now()
        if lease.reader != LINE or lease.is_closed:
            self._unregister(lease)

    def _register(self, lease: Lease) -> None:
        fd = lease.fileno()
        if self._selector is None or fd < 0 or lease.reader != LINE or self._leases.get(fd) is lease:
            return
        if fd in self._leases:
            self._unregister(self._leases[fd])  # that one was closed, and its number is in use again
        self._leases[fd] = lease
        self._selector.register(fd, selectors.EVENT_READ, lease)

    def _unregister(self, lease: Lease) -> None:
        for fd in [fd for fd, known in self._leases.items() if known is lease]:
            del self._leases[fd]
            if self._selector is not None:
                with contextlib.suppress(KeyError, ValueError, OSError):
                    self._selector.unregister(fd)


def _apart(errand: Callable[[], None]) -> None:
    """What goes wrong with one errand does not end the thread that everybody's calls need."""
    try:
        errand()
    except Exception:
        tell_fault("a fault in the thread that talks with the daemon")
