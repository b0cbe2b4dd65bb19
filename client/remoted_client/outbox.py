"""What goes to the daemon: at once as far as the socket takes it, and calls that are made together in one frame."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from remoted_client import wire
from remoted_client.lease import put

if TYPE_CHECKING:
    from remoted_client.attendant import Attendant
    from remoted_client.call_state import CallState
    from remoted_client.connection import Upload

#: No call waits for longer that its neighbours are made: the iterable of a map may take its time.
_HELD_SECONDS = 0.002


class Outbox:
    """``lock``, the connection's, is held around everything. ``attendant``: the connection's thread, when it has something to do."""

    def __init__(self, lock: threading.RLock, attendant: Attendant) -> None:
        self._lock = lock
        self._attendant = attendant
        self._waiting: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._held: list[CallState] = []
        self._sock: socket.socket | None = None
        #: Content that the daemon has of us.
        self.known: set[str] = set()

    def open(self, sock: socket.socket) -> None:
        """The daemon has welcomed us."""
        self._sock = sock

    def close(self) -> None:
        """The connection is gone, and with it all that was on its way."""
        self._sock = None
        for _, fds in self._waiting:
            wire.close_all(fds)
        self._waiting.clear()
        self._held.clear()
        self.known.clear()

    # -- calls ---------------------------------------------------------------------------------------------

    def start(self, state: CallState) -> None:
        """Send a call, or hold it for others that are made ``together`` with it; the thread sends these if that takes a while."""
        if not _gathering.is_on:
            self.send_calls([state])
            return
        self._held.append(state)
        if len(self._held) == 1:
            _gathering.boxes.add(self)
            self._attendant.after(_HELD_SECONDS, self.send_held)
        elif len(self._held) >= wire.FRAME_CALLS:
            self.send_held()

    def send_held(self) -> None:
        with self._lock:
            held, self._held = self._held, []
            self.send_calls(held)

    def send_calls(self, states: Iterable[CallState], again: bool = False) -> None:
        """Their content first, then they themselves; neighbours that differ in key and arguments only share a frame. ``again``: they may have been sent before."""
        frame: wire.CallsFrame | None = None
        sharing: list[CallState] = []
        for state in states:
            outgoing = state.outgoing
            assert outgoing is not None
            if again:
                outgoing.common.pop("fresh", None)
            is_new = any(upload.digest not in self.known for upload in outgoing.uploads)
            if frame is None or is_new or frame.common != outgoing.common or not frame.add(outgoing.key, outgoing.body):
                self._send_frame(frame, sharing)
                for upload in outgoing.uploads:
                    self.put(upload)
                frame, sharing = wire.CallsFrame(outgoing.common), []
                frame.add(outgoing.key, outgoing.body)
            sharing.append(state)
        self._send_frame(frame, sharing)

    def _send_frame(self, frame: wire.CallsFrame | None, sharing: list[CallState]) -> None:
        if frame is not None:
            was_sent = False
            for data in frame.frames():
                was_sent = self.write(data)
            for state in sharing:
                state.was_sent = was_sent

    def put(self, upload: Upload) -> None:
        """Content, unless the daemon has it."""
        if upload.digest not in self.known:
            self.known.add(upload.digest)
            self.write(*put(upload))

    # -- the socket ----------------------------------------------------------------------------------------

    def write(self, data: bytes, fds: tuple[int, ...] = ()) -> bool:
        """Never blocks. The descriptors are closed when sent. False: nothing left; the thread sees the end of the connection and sends again."""
        self._attendant.take_back()
        if not self._waiting and self._sock is not None:
            try:
                sent = wire.send(self._sock, data, fds, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                sent = -1
            except OSError:
                wire.close_all(fds)
                return False
            if sent >= 0:
                wire.close_all(fds)
                data, fds = data[sent:], ()
        if data:
            self._waiting.append((data, fds))
            self._attendant.wake()
        return True

    def flush(self) -> bool:
        """As far as the socket takes it. True if something is left."""
        while self._waiting and self._sock is not None:
            data, fds = self._waiting[0]
            try:
                sent = wire.send(self._sock, data, fds, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                return False  # the reader sees the end
            wire.close_all(fds)
            if sent == len(data):
                self._waiting.popleft()
            else:
                self._waiting[0] = (data[sent:], ())
        return False


class _Gathering(threading.local):
    """Does this thread make many calls at once, and where are they held?"""

    def __init__(self) -> None:
        self.is_on = False
        self.boxes: set[Outbox] = set()


_gathering = _Gathering()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Calls that this thread makes meanwhile are held for each other, no longer than this lasts."""
    before, _gathering.is_on = _gathering.is_on, True
    try:
        yield
    finally:
        _gathering.is_on = before
        while _gathering.boxes:
            _gathering.boxes.pop().send_held()
