"""One end of a worker's channel: numbered nothing, whole messages, bounded outbox.

A SOCK_SEQPACKET socketpair: a message is read whole or not at all, so another daemon can go on where this
one stopped (MECHANISMS 4). The worker is hostile (boundary b3): every message is parsed with the caps of
``wire`` and a broken one closes the channel.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from remoted import foreign, turn
from remoted_client import wire

#: A worker that does not read is of no use; what waits for it is bounded in messages (each <= 128 KiB).
OUTBOX_MESSAGES = 4096
#: Every channel reads into it, and takes away what it has read at once.
_buffer = bytearray(wire.MESSAGE_BYTES)


def pair() -> tuple[socket.socket, socket.socket]:
    """(daemon's end, worker's end), both close-on-exec; the buffers hold several full messages."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return ours, theirs


class Channel:
    """Sends and receives frames with one worker on the event loop; never blocks it."""

    def __init__(
        self, sock: socket.socket, on_frame: Callable[[wire.Frame], None], on_closed: Callable[[str], None], is_welcome: Callable[[int], bool] = foreign.is_memory
    ) -> None:
        """``is_welcome``: which descriptors may be passed."""
        sock.setblocking(False)
        self._is_welcome = is_welcome
        self._sock = sock
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()
        #: A message about calls that more may join.
        self._calls: wire.CallsFrame | None = None
        self._loop = asyncio.get_running_loop()
        self._turn = turn.current()
        self._open = True
        #: The kernel's buffer was full at the last write.
        self._is_full = False
        self._loop.add_reader(sock.fileno(), self._turn.run, self._read)

    @property
    def is_open(self) -> bool:
        """False once either side has closed it."""
        return self._open

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, header: dict[str, Any], body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Send or queue one message. The descriptors are the channel's from here on: it closes them."""
        self.end_calls()
        self._send(wire.encode(header, body, len(fds)), fds)

    def send_call(self, common: dict[str, Any], word: Any, body: bytes) -> None:
        """A message about a call, or a part of one: neighbours that have all this in common leave together, at the end of this turn."""
        if self._calls is None or (self._calls.common is not common and self._calls.common != common) or not self._calls.add(word, body):
            if self._calls is None:
                self._turn.soon(self.end_calls)
            self.end_calls()
            self._calls = wire.CallsFrame(common)
            self._calls.add(word, body)

    def end_calls(self) -> None:
        """Nothing joins them any more."""
        frame, self._calls = self._calls, None
        if frame is not None:
            for data in frame.frames():
                self._send(data, ())

    def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        if not self._open or len(self._outbox) >= OUTBOX_MESSAGES:
            wire.close_all(fds)
            if self._open:
                self._fail("the worker does not read its channel")
            return
        self._outbox.append((data, fds))
        if len(self._outbox) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._outbox:
            data, fds = self._outbox[0]
            try:
                wire.send(self._sock, data, fds)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._sock.fileno(), self._flush)
                self._is_full = True
                return
            except OSError as error:
                self.drain()  # what it said before it went
                self._fail(str(error))
                return
            self._outbox.popleft()
            wire.close_all(fds)
        if self._is_full:
            self._is_full = False
            self._loop.remove_writer(self._sock.fileno())

    def _read(self) -> None:
        """Everything that waits, a bounded number at a time, so that one worker cannot hold the loop."""
        for _ in range(64):
            if not self._read_one():
                return

    def drain(self) -> None:
        """What a dead worker has said; bounded all the same, for one that lives and has only stopped to listen."""
        for _ in range(OUTBOX_MESSAGES):
            if not self._read_one():
                return

    def _read_one(self) -> bool:
        if not self._open:
            return False
        try:
            data, fds = wire.receive_into(self._sock, _buffer)
            if not data:
                self._fail("the worker closed its channel")
                return False
            frame = wire.decode_message(data, foreign.sift(fds, self._is_welcome))
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionResetError:
            return True  # told once when it died with messages of ours unread, before what it had said itself (net/unix/af_unix.c)
        except (OSError, wire.WireError) as error:
            self._fail(str(error))
            return False
        self._on_frame(frame)
        return True

    def _fail(self, why: str) -> None:
        if self._open:
            self.close()
            self._on_closed(why)

    def close(self, goes_on: bool = False) -> None:
        """Idempotent; tells nobody. ``goes_on``: with the next daemon, who may have another descriptor of the same socket."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        if goes_on:
            self._sock.close()
        else:
            foreign.leave(self._sock)
        for _, fds in self._outbox:
            wire.close_all(fds)
        self._outbox.clear()
