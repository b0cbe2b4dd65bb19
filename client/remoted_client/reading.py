"""Who reads the line: its own thread, or whoever waits for the only call that is on it, so that an answer wakes one thread and not two.

Who waits handles nothing but what tells how this call stands and ends, and takes it from the socket when it has handled it: Ctrl-C may come
between any two steps, and the line's thread then reads the same again. All else it leaves there, and waits as others do.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from remoted_client import wire
from remoted_client.glance import Glance

if TYPE_CHECKING:
    from remoted_client.attendant import Attendant
    from remoted_client.call_state import CallState

#: More than this many bytes, and each read costs pages of its own.
_READ_BYTES = 96 * 1024
_PEEKED_BYTES = 16 * 1024
_LEAVE_SECONDS = 1.0
#: As long as a durable call takes whose body does nothing.
_LOOK_SECONDS = 2e-3


class Reading:
    """``handle``: what is done with a frame. ``is_alone``: is this the only call on the line, and nobody but its waiter to hear of its end?"""

    def __init__(self, attendant: Attendant, handle: Callable[[wire.Frame], None], is_alone: Callable[[CallState], bool]) -> None:
        self._attendant, self._handle, self._is_alone = attendant, handle, is_alone
        self._sock: socket.socket | None = None
        #: What a thread that waits listens to.
        self._poller = select.poll()
        self._glance = Glance()
        self._frames = wire.FrameReader()
        #: What is read is handled before anybody reads on.
        self._lock = threading.Lock()
        #: Held by whoever waits; and what wakes that thread, where the line's thread had begun to read.
        self._borrowed = threading.Lock()
        self._bell, self._is_rung = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), False

    def open(self, sock: socket.socket, frames: wire.FrameReader) -> None:
        """``frames`` holds the beginning of one, if there is any."""
        self._sock, self._frames, self._borrowed = sock, frames, threading.Lock()
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)
        self._poller.register(self._bell, select.POLLIN)
        self._glance = Glance(sock, self._bell, seconds=_LOOK_SECONDS)

    def close(self) -> None:
        """Nobody reads any more, so the socket can be closed."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes who waits
            self._borrowed.acquire(timeout=_LEAVE_SECONDS)  # Ctrl-C may have kept its holder from giving it back
            self._sock = None
            self._frames.close()

    def read(self) -> bool:
        """Handle what has arrived. False at the end of the connection. The line's thread."""
        assert self._sock is not None
        with self._lock:
            try:
                data, fds = wire.receive(self._sock, _READ_BYTES)
                frames = self._frames.feed(data, fds) if data else []
            except (BlockingIOError, InterruptedError):
                return True
            except (OSError, wire.WireError):
                return False
            for frame in frames:
                self._handle(frame)
            if self._borrowed.locked() and not self._is_rung:
                self._is_rung = True
                os.eventfd_write(self._bell, 1)
            return bool(data)

    def follow(self, state: CallState, timeout: float | None) -> None:
        """Read in this thread until the call is over, or something else has to be read, or for so many seconds."""
        if self._is_alone(state) and self._borrowed.acquire(blocking=False):
            try:
                self._follow(state, None if timeout is None else time.monotonic() + timeout)
            finally:
                self._borrowed.release()

    def _follow(self, state: CallState, deadline: float | None) -> None:
        sock = self._sock
        if sock is None:
            return
        if self._is_rung:  # behind the one before
            self._hush()
        try:
            self._attendant.lend(True)
            with self._lock:  # what the line's thread is at
                pass
            while not state.is_over:
                left = None if deadline is None else deadline - time.monotonic()
                if left is None or left > _LOOK_SECONDS:
                    self._glance.wait()
                ready = self._poller.poll(None if left is None else max(0.0, left) * 1000)
                with self._lock:
                    if not ready or not self._read_about(state, sock) or any(fd == self._bell for fd, _ in ready):
                        return
        finally:
            self._attendant.lend(False)

    def _hush(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            self._is_rung = False
            os.eventfd_read(self._bell)

    def _read_about(self, state: CallState, sock: socket.socket) -> bool:
        """False where there is something else, which the line's thread shall read."""
        try:
            data = sock.recv(_PEEKED_BYTES, socket.MSG_PEEK)
            frames = wire.FrameReader().feed(data) if data and not self._frames.pending_bytes else []
            if not frames or not _are_about(state, frames):
                return False
            for frame in frames:
                self._handle(frame)
            sock.recv(len(data))
        except (BlockingIOError, InterruptedError):
            return True
        except (OSError, wire.WireError):
            return False
        return True


def _are_about(state: CallState, frames: list[wire.Frame]) -> bool:
    """Do they tell of this call alone that it was accepted, how it stands, and how it ended?"""
    known = {state.key, state.id}
    for frame in frames:
        words: list[Any] = [frame.header] if frame.op == "state" else frame.header["calls"] if frame.op in ("accepted", "done") else []
        if len(words) != 1:
            return False
        key, call_id = words[0] if frame.op == "accepted" else (words[0].get("key", ""), words[0]["id"])
        if known.isdisjoint((key or call_id, call_id)):
            return False
        known.add(call_id)
    return True
