"""A client's connection in this worker: numbered calls in, answers out, no daemon in between (MECHANISMS 3).

The client sends what the worker lacks (PUT), names a function once (USE) and then calls it by number. A call that was
taken off the socket is accepted: the shared page says so before anything of it runs. After GOAWAY nothing is.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from remoted_client import segments, wire
from remoted_client.glance import Glance

from .calls import Run
from .window import LeasedWindow

#: What most calls and their answers look like.
_PLAIN_ANSWER = b'{"n":%d,"plain":true}'
_PLAIN_CALL = b'{"n":%d,"use":%d,"plain":true}'


class Lease:
    """One lease. The main thread (or one thread of its own) reads it; any thread may revoke it."""

    def __init__(self, header: dict[str, Any], connection: int, page: int, learn: Callable[[str, bytes | int], None], pool: segments.SegmentPool) -> None:
        self.token: str = header["attempt"]
        self.is_concurrent: bool = header["concurrent"]
        self.is_stale = False
        self._id: str = header["lease"]
        self._window_size: tuple[int, int] = header["window_items"], header["window_bytes"]
        #: Of the call in hand, if it streams.
        self.window: LeasedWindow | None = None
        self._worker: str = header["worker"]
        self._spec: str = header["spec"]
        self._learn = learn
        self._segments = pool
        #: What the client calls itself, and its segments of which nothing is alive here any more.
        self._client = ""
        self._releases = segments.Releases()
        self._sock = socket.socket(fileno=connection)
        self._glance = Glance(self._sock)
        self._sock.setblocking(True)  # the flag travels with the descriptor
        self._page = mmap.mmap(page, wire.LEASE_PAGE_BYTES)
        self._page_fd = page
        self._reader = wire.FrameReader()
        self._frames: deque[wire.Frame] = deque()
        self._uses: dict[int, dict[str, Any]] = {}
        #: What was called last, and the header of the call that will probably come.
        self._use: dict[str, Any] = {}
        self._expected = b""
        self._lock = threading.Lock()
        self._accepted = self._answered = 0
        self._began = self._ended = self._timeout = 0
        self.is_revoked = False

    def grant(self) -> None:
        """The first word on the connection is the worker's."""
        self._send(wire.encode({"op": "grant", "lease": self._id, "worker": self._worker}))

    def fileno(self) -> int:
        return self._sock.fileno()

    def show(self, send: Callable[..., object], nonce: str) -> None:
        """Tell another daemon which lease this is, with its connection and its page; nothing once it is closed."""
        with self._lock:
            if self._sock.fileno() < 0:
                return
            fds = os.dup(self._sock.fileno()), os.dup(self._page_fd)
        send({"op": "leased", "nonce": nonce, "attempt": self.token, "lease": self._id, "spec": self._spec}, fds=fds)
        wire.close_all(fds)

    @property
    def ending(self) -> dict[str, Any]:
        """What the daemon is told when it is over."""
        return {"op": "lease_ended", "attempt": self.token, "kind": "stale" if self.is_stale else "ended", "message": ""}

    @property
    def has_frames(self) -> bool:
        """Something was read and not handled yet."""
        return bool(self._frames)

    def next_call(self) -> Run | None:
        """Blocks until there is one. None: no more calls, because of the client or because it was revoked."""
        while not self.is_revoked:
            while self._frames:
                try:
                    run = self._take(self._frames.popleft())
                except (LookupError, TypeError, ValueError):  # a client that breaks the protocol loses its lease, and no other its worker
                    return None
                if run is not None:
                    return run
            self._glance.wait()
            try:
                data, fds = wire.receive(self._sock, wire.SOME_BYTES)
                if self._expected and not fds and (payload := self._reader.expected(self._expected, data)) is not None:
                    return self._accept_plain(payload)
                self._frames.extend(self._reader.feed(data, fds))
            except (OSError, wire.WireError):
                return None
            if not data:
                return None
        return None

    def _take(self, frame: wire.Frame) -> Run | None:
        header = frame.header
        op = header.get("op")
        if op is None:
            return self._accept(header, frame)
        if op == "put":
            self._learn(header["digest"], frame.fds[0] if frame.fds else frame.body)
        elif op == "use":
            if "instance" in header:
                header["instance"] = _checked(header["instance"])
            self._uses[header["use"]], self._expected = header, b""  # the number may have meant another one
            self._meet(header["client"])
        else:
            self._credit(header)
        return None

    def hear(self, wait: bool) -> None:
        """What the caller of a stream says while it runs. At the end of the connection nobody wants more."""
        assert self.window is not None
        try:
            data, fds = wire.receive(self._sock, wire.SOME_BYTES, 0 if wait else wire.AT_ONCE)
            frames = self._reader.feed(data, fds)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, wire.WireError):
            data, frames = b"", []
        self._heed(frames)
        if not data:
            self.window.leave()

    def _heed(self, frames: list[wire.Frame]) -> None:
        """Words about the stream in hand are taken at once, whatever else came is for later."""
        for frame in frames:
            if frame.op in ("credit", "close_stream"):
                self._credit(frame.header)
            else:
                self._frames.append(frame)

    def _credit(self, header: dict[str, Any]) -> None:
        """It may come too late: then it concerns nobody."""
        if self.window is None or header["n"] != self._accepted:
            return
        if header["op"] == "credit":
            self.window.give_back(header["items"])
        else:
            self.window.leave()

    def _meet(self, client: str) -> None:
        if not self._client:
            self._client, self._releases = client, self._segments.enter(client)

    def _accept_plain(self, payload: bytes) -> Run:
        """The same function again, with plain arguments: most calls."""
        use, number = self._use, self._accepted + 1
        self.window, self._accepted = None, number
        self._began, self._timeout = time.clock_gettime_ns(time.CLOCK_BOOTTIME), use["timeout_ms"]
        self._note()
        run = Run(f"{self.token}/{number}", self._id, use["code"], use["modules"], use["context"], payload)
        run.is_plain, run.lease, run.number = True, self, number
        if "instance" in use:
            run.instance = dict(use["instance"])
        return run

    def _accept(self, header: dict[str, Any], frame: wire.Frame) -> Run | None:
        use, before = self._uses[header["use"]], self._accepted
        self._use = use
        self.window = LeasedWindow(*self._window_size, self.hear, self._hang_up) if "stream" in header else None
        number = self._accepted = header["n"]
        if self.window is not None and self.is_revoked:  # its caller cannot be heard any more
            self._accepted = before
            frame.close()
            return None
        if self.window is not None and self._frames:  # who leaves at once is read together with the call
            together = list(self._frames)
            self._frames.clear()
            self._heed(together)
        self._began, self._timeout = time.clock_gettime_ns(time.CLOCK_BOOTTIME), use["timeout_ms"]
        self._note()
        buffers, problem = self._buffers(header, frame)
        return Run(
            attempt=f"{self.token}/{number}",
            job=self._id,
            code=use["code"],
            modules=use["modules"],
            context=use["context"],
            arguments=self._arguments(header, frame),
            stream="stream" in header,
            instance=dict(use["instance"]) if "instance" in use else None,
            buffers=buffers,
            problem=problem,
            is_plain="plain" in header,
            copies="copies" in header,
            lease=self,
            number=number,
        )

    def _arguments(self, header: dict[str, Any], frame: wire.Frame) -> bytes | int:
        fds = frame.fds[1:] if "segment" in header else frame.fds
        return fds[0] if fds else frame.body

    def _buffers(self, header: dict[str, Any], frame: wire.Frame) -> tuple[list[memoryview] | None, segments.BadSegment | None]:
        """Arrays that lie in the client's segment; it gets it back when the last of them is gone. Or why they cannot be read."""
        for number in header.get("freed", ()):
            self._segments.take_back(number, self._client)
        if "segment" not in header:
            return None, None
        try:
            return segments.unpack(frame.fds[0], header["segment"], header["buffers"], self._releases), None
        except segments.BadSegment as error:
            return None, error

    def answer(self, number: int, header: dict[str, Any] | None, payload: bytes | int, segment: segments.Segment | None = None) -> None:
        """The outcome of one call; the descriptor is closed here. Without a header: a plain value. Nobody may be there to hear it."""
        try:
            if header is None and isinstance(payload, bytes) and not self._releases:
                self._send(wire.frame(_PLAIN_ANSWER % number, payload))
            else:
                self.say(number, {"plain": True} if header is None else header, payload, segment)
        finally:
            self._answered, self._ended = number, time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            self._note()
            self._expected = _PLAIN_CALL % (number + 1, self._use["use"])

    def say(self, number: int, header: dict[str, Any], payload: bytes | int, segment: segments.Segment | None = None) -> None:
        """An answer, or an item before it."""
        fds: tuple[int, ...] = ()
        if segment is not None:
            segment.borrower = self._client
            fds = (segment.fd,)
        if freed := self._releases.take():
            header["freed"] = freed
        head = wire.encode_header({"n": number, **header})
        if isinstance(payload, bytes):
            self._send(wire.frame(head, payload, len(fds)), fds)
            return
        try:
            self._send(wire.frame(head, fd_count=len(fds) + 1), (*fds, payload))
        finally:
            os.close(payload)

    def _note(self) -> None:
        wire.LEASE_PAGE.pack_into(self._page, 0, self._accepted, self._answered, self._began, self._timeout, self._ended)

    def _send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            with self._lock:
                sent = wire.send(self._sock, data, fds)
                while sent < len(data):
                    data = data[sent:]
                    sent = wire.send(self._sock, data)
        except OSError:
            return  # nobody is there any more

    def revoke(self) -> None:
        """From any thread: no call is accepted after this, and a thread that waits for one wakes up.

        A stream in hand goes on: its caller still has to say what it has read.
        """
        self.is_revoked = True
        if self._accepted == self._answered or self.window is None:
            self._hang_up()

    def _hang_up(self) -> None:
        """Nothing more is read."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def _is_alone(self) -> bool:
        """Has the client closed its end? Our own shutting down is no hang-up."""
        poller = select.poll()
        poller.register(self._sock, 0)
        return any(events & select.POLLHUP for _, events in poller.poll(0))

    def close(self) -> None:
        """Say which call was the last one accepted; the client sends later ones elsewhere."""
        self._send(wire.encode({"op": "goaway", "last": self._accepted}))
        if self._client:
            self._segments.leave(self._client, is_gone=not self.is_revoked or self._is_alone())
        with self._lock:
            self._sock.close()
            os.close(self._page_fd)
        self._page.close()
        self._reader.close()
        for frame in self._frames:
            frame.close()


def _checked(instance: dict[str, Any]) -> dict[str, Any]:
    """Which object, and which method of it; how many drops must have been told before. Raises LookupError, TypeError, ValueError."""
    return {**{word: str(instance[word]) for word in ("id", "method", "constructor")}, "drops": int(instance["drops"])}
