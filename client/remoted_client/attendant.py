"""What the connection's thread does beside its own socket: timers, errands, and sockets that nobody else reads."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
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
        self._poller: select.epoll | None = None
        #: The connection's socket, what is listened for there, and why.
        self._sock_fd, self._events = -1, 0
        self._has_more, self._is_lent = False, False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def post(self, errand: Callable[[], None]) -> None:
        """Run it in the connection's thread, once there is a connection."""
        self._errands.append(errand)
        self.take_back()
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
        with select.epoll() as poller:
            self._poller, self._sock_fd, self._events, self._is_lent = poller, sock.fileno(), 0, False
            self._leases.clear()
            poller.register(self._sock_fd, 0)
            poller.register(self._wake_read, select.EPOLLIN)
            try:
                while True:
                    self._run_errands()
                    self._has_more = before_waiting()
                    self._listen()
                    for fd, events in poller.poll(self._until_timer()):
                        if fd == self._wake_read:
                            os.read(self._wake_read, 65536)
                        elif fd in self._leases:
                            self._read(self._leases[fd])
                        elif fd == self._sock_fd and events & ~select.EPOLLOUT and not on_readable():
                            return
                    self._run_timers()
            finally:
                with self._lock:
                    self._poller = None

    def lend(self, is_lent: bool) -> None:
        """Another thread reads the connection's socket meanwhile. Its end is heard of here all the same."""
        self._is_lent = is_lent
        self._listen()

    def take_back(self) -> None:
        """There is more on the line now than the call that is waited for; it may be that thread's own, from a signal handler."""
        if self._is_lent:
            self.lend(False)

    def _listen(self) -> None:
        with self._lock:
            events = (0 if self._is_lent else select.EPOLLIN) | (select.EPOLLOUT if self._has_more else 0)
            if self._poller is not None and events != self._events:
                self._poller.modify(self._sock_fd, events)
                self._events = events

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
        if self._poller is None or fd < 0 or lease.reader != LINE or self._leases.get(fd) is lease:
            return
        if fd in self._leases:
            self._unregister(self._leases[fd])  # that one was closed, and its number is in use again
        self._leases[fd] = lease
        self._poller.register(fd, select.EPOLLIN)

    def _unregister(self, lease: Lease) -> None:
        for fd in [fd for fd, known in self._leases.items() if known is lease]:
            del self._leases[fd]
            if self._poller is not None:
                with contextlib.suppress(ValueError, OSError):
                    self._poller.unregister(fd)


def _apart(errand: Callable[[], None]) -> None:
    """What goes wrong with one errand does not end the thread that everybody's calls need."""
    try:
        errand()
    except Exception:
        tell_fault("a fault in the thread that talks with the daemon")
