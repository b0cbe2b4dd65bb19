"""The worker's end of its channel: one thread reads, any thread sends."""

from __future__ import annotations

import contextlib
import errno
import os
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

    def read_forever(self, on_frame: Callable[[wire.Frame], None], on_closed: Callable[[], None]) -> None:
        """Runs in its own thread until the daemon is gone."""
        while True:
            try:
                data, fds = wire.receive(self._sock, wire.MESSAGE_BYTES)
            except OSError:
                data, fds = b"", []
            if not data:
                self.closed = True
                on_closed()
                return
            on_frame(wire.decode_message(data, fds))
