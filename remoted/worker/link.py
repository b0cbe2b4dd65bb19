"""The worker's end of its channel: any thread sends, and two read.

Whoever waits reads: the main thread while it has nothing to do, so that a call wakes who will run it, and the channel's own
thread while bodies run. What one of them reads it handles before the other reads on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

from remoted_client import wire


class Link:
    """Whole messages to and from the daemon. ``closed`` is set once the daemon is gone."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.set_inheritable(False)
        self._sock.setblocking(True)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.closed = False
        self._buffer = bytearray(wire.MESSAGE_BYTES)
        self._reading = threading.Lock()
        #: It was read to its end.
        self._is_over = False
        #: What the channel's thread waits on; and the main thread.
        self._watched, self._poller = select.epoll(), select.poll()
        self._watched.register(fd, select.EPOLLIN)
        self._poller.register(fd, select.POLLIN)
        #: Does the main thread read? And what wakes it where the other one had begun to.
        self._is_lent = False
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller.register(self._bell, select.POLLIN)

    def send(self, header: dict[str, Any], body: bytes = b"", fds: tuple[int, ...] = ()) -> bool:
        """False when the daemon is gone. The descriptors stay the caller's."""
        if os.getpid() != self._pid:
            os._exit(0)  # a child that a body forked has come back from it: it is no worker, and has no say
        data = wire.encode(header, body, len(fds))
        with self._lock:
            try:
                wire.send(self._sock, data, fds)
            except OSError as error:
                self.closed = True
                if error.errno == errno.EBADF:
                    os._exit(1)  # a body has closed it: nobody hears of this worker any more, and it hears of nobody
        return not self.closed

    def send_payload(self, header: dict[str, Any], payload: int | bytes) -> bool:
        """A payload of any size: inline when small, else as the descriptor, which is closed here."""
        if isinstance(payload, bytes):
            return self.send(header, payload)
        try:
            size = os.fstat(payload).st_size
            if size <= wire.INLINE_BYTES:
                return self.send({**header, "size": size}, os.pread(payload, size, 0))
            return self.send({**header, "size": size}, fds=(payload,))
        finally:
            os.close(payload)

    def read_once(self, on_frame: Callable[[wire.Frame], None]) -> None:
        """Wait for one message; nothing if the daemon is gone."""
        with contextlib.suppress(OSError):
            data, fds = wire.receive(self._sock, wire.MESSAGE_BYTES)
            if data:
                on_frame(wire.decode_message(data, fds))

    def listen(self, on_frame: Callable[[wire.Frame], None], on_closed: Callable[[], None]) -> None:
        """From here on, until the daemon is gone."""
        self._on_frame, self._on_closed = on_frame, on_closed
        threading.Thread(target=self._read_forever, name="channel", daemon=True).start()

    def _read_forever(self) -> None:
        while not self._is_over:
            try:
                self._watched.poll()
            except OSError:  # a body has closed it
                with self._reading:
                    self._end()
            self._read()
            if self._is_lent:
                self._ring()

    def read_while(self, is_idle: Callable[[], bool]) -> None:
        """In this thread, which waits for nothing else meanwhile."""
        if not is_idle() or self._is_over:
            return
        self._is_lent = True
        self._watch(0)
        with self._reading:  # what the other thread is at
            pass
        while is_idle() and not self._is_over:
            for fd, _ in self._poller.poll():
                if fd == self._bell:
                    self._hush()
            self._read()
        self._is_lent = False
        self._watch(select.EPOLLIN)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # a body has closed it
            os.eventfd_write(self._bell, 1)

    def _hush(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_read(self._bell)

    def _watch(self, events: int) -> None:
        """What the channel's thread shall wake up for. The end of the connection always wakes it."""
        with contextlib.suppress(OSError):
            self._watched.modify(self._sock.fileno(), events)

    def _read(self) -> None:
        """One message, unless the other thread has been faster."""
        with self._reading:
            if self._is_over:
                return
            try:
                data, fds = wire.receive_into(self._sock, self._buffer, wire.AT_ONCE)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if data:
                self._on_frame(wire.decode_message(data, fds))
            else:
                self._end()

    def _end(self) -> None:
        if not self._is_over:
            self.closed = self._is_over = True
            self._on_closed()
