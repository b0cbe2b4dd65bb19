"""One connection that a worker answers: opened by the daemon's leave, then without it (MECHANISMS 3).

A lease carries one call at a time. Whoever waits for that call reads the socket itself, thread or event loop: an
answer wakes exactly who wants it. ``reader`` says whose turn it is; calls that nobody waits for are read by the
connection's thread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from remoted_client import wire
from remoted_client.glance import Glance
from remoted_client.printed import Bookmark
from remoted_client.segments import Releases

if TYPE_CHECKING:
    from remoted_client.connection import Upload
    from remoted_client.home import Home
    from remoted_client.leased_call import LeasedCall

_PLAIN_CALL = b'{"n":%d,"use":%d,"plain":true}'
#: What most calls are answered with.
_PLAIN_ANSWER = b'{"n":%d,"plain":true}'
LINE = "line"
#: Of each instance the methods have numbers of their own: then they are given anew.
_USES_MOST = 1000


class Owner(Protocol):
    """The pool that a lease belongs to."""

    def on_granted(self, lease: Lease, header: dict[str, Any]) -> None: ...
    def on_refused(self, lease: Lease, header: dict[str, Any]) -> None: ...
    def on_answer(self, lease: Lease, frame: wire.Frame) -> None: ...
    def on_value(self, lease: Lease, payload: bytes) -> None:
        """The call in hand has returned, and there is nothing else to say of it."""
        ...

    def on_item(self, lease: Lease, frame: wire.Frame) -> None: ...
    def on_closed(self, lease: Lease) -> None: ...
    def on_fault(self, lease: Lease, error: Exception) -> None:
        """What came could not be handled."""
        ...


class Lease:
    """The socket, what the worker at its other end knows already, and the call in hand."""

    def __init__(self, owner: Owner, client: str, opened_at: float, home: Home | None = None) -> None:
        """``client``: what this process calls itself. ``home``: of the instance that it is opened for."""
        self.id = secrets.token_hex(16)
        self.opened_at = opened_at
        self.home = home
        self.worker = ""
        self.is_granted = False
        #: The last call that the worker accepted, once it has said that it takes no more.
        self.last_accepted: int | None = None
        #: What the daemon said of its end.
        self.ended: dict[str, Any] | None = None
        self.is_closed = False
        self.call: LeasedCall | None = None
        self.last_call: LeasedCall | None = None
        #: Who reads: a thread that waits for a call (the call itself), a loop (what it claimed it with), or ``LINE``.
        self.reader: object = None
        #: What is still to be done with an answer that waits for its output, or an end that waits for its reason.
        self.held: Callable[[], None] | None = None
        #: The worker's segments of which nothing is alive here any more.
        self.releases = Releases()
        #: The newest call of which all output was told.
        self.printed = 0
        self.output_bytes = 0
        #: How far into the daemon's log of this lease we are.
        self.bookmark = Bookmark()
        self._owner = owner
        self._client = client
        self._sock: socket.socket | None = None
        self._glance: Glance | None = None
        self._frames = wire.FrameReader()
        self._number = 0
        #: The header of the answer that will probably come.
        self._expected = b""
        self._uses: dict[tuple[Any, ...], int] = {}
        self._known: set[str] = set()
        #: Content that went out on this connection and of which it is not certain that the worker has read it.
        self._told: set[str] = set()

    # -- opening -------------------------------------------------------------------------------------------

    def open(self, sock: socket.socket, hello: bytes, request: bytes) -> None:
        """Ask for it. Nothing more is sent until the worker speaks."""
        self._sock, self._glance = sock, Glance(sock)
        self._sock.setblocking(True)
        with contextlib.suppress(ConnectionError):  # refused at the door: the reason can still be read
            self._sock.sendall(hello + request)

    def ask_again(self, uploads: tuple[Upload, ...], request: bytes) -> None:
        """The daemon lacked some of these."""
        with contextlib.suppress(ConnectionError):  # its end will be read
            for upload in uploads:
                self._send_content(upload)
            self._send(request)

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock is not None else -1

    def carries(self, call: LeasedCall) -> bool:
        """Is its answer still to come? One that only waits for its output is here already."""
        return self.call is call and self.held is None and not self.is_closed

    def granted(self, worker: str, known: set[str], releases: Releases) -> None:
        """``known``: what that worker has; this and ``releases`` are shared by all leases of it."""
        self.worker, self._known, self.releases, self.is_granted = worker, known, releases, True
        home, self.home = self.home, None
        if home is not None and home.worker != worker:
            home.worker = ""  # what was known of it is not true any more

    # -- calls ---------------------------------------------------------------------------------------------

    def start(self, call: LeasedCall) -> bool:
        """Send a call. False: the worker takes no more, and nothing of it was accepted. Raises what is wrong with the call, or this process."""
        self._number += 1
        self.call = self.last_call = call
        call.number = self._number
        try:
            name = call.use if call.home is None else (*call.use, call.home.drops)
            use = self._uses.get(name)
            if use is None:
                use = self._introduce(call, name)
            if call.is_plain and not call.is_stream and not call.copies and not self.releases:
                self._send(wire.frame(_PLAIN_CALL % (self._number, use), call.payload.inline))
            else:
                head, fds = self._head(call, use)
                self._send(wire.frame(head, call.payload.inline, len(fds)), fds)
        except ConnectionError:
            self.call = None
            return False
        self._expected = b"" if call.is_stream else _PLAIN_ANSWER % self._number
        return True

    def _head(self, call: LeasedCall, use: int) -> tuple[bytes, tuple[int, ...]]:
        """The header of a call, and the descriptors that go with it: segment, then payload."""
        fds = (call.payload.fd,) if call.payload.fd >= 0 else ()
        header: dict[str, Any] = {"n": self._number, "use": use, "freed": self.releases.take()}
        if call.is_plain:
            header["plain"] = True
        if call.copies:
            header["copies"] = True
        if call.is_stream:
            header["stream"] = True
        if call.segment is not None:
            header["segment"], header["buffers"] = call.segment.number, call.buffers
            call.segment.borrower = self.worker
            fds = (call.segment.fd, *fds)
        return wire.encode_header(header), fds

    def _introduce(self, call: LeasedCall, name: tuple[Any, ...]) -> int:
        """What this worker has not seen yet, and a number for what this connection has not named yet."""
        for upload in call.uploads:
            if upload.digest not in self._known and upload.digest not in self._told:
                self._send_content(upload)
                self._told.add(upload.digest)
        if len(self._uses) >= _USES_MOST:
            self._uses.clear()
        number = self._uses[name] = len(self._uses)
        code, modules, context, timeout_ms, *instance = name
        use = {"op": "use", "use": number, "code": code, "modules": modules, "context": context, "timeout_ms": timeout_ms, "client": self._client}
        if instance:
            use["instance"] = dict(zip(("id", "method", "constructor", "drops"), instance, strict=True))
        self._send(wire.encode(use))
        return number

    def tell(self, header: dict[str, Any]) -> None:
        """Something about the call in hand."""
        with contextlib.suppress(OSError):  # its end will be read
            self._send(wire.encode(header))

    def _send_content(self, upload: Upload) -> None:
        data, fds = put(upload)
        try:
            self._send(data, fds)
        finally:
            wire.close_all(fds)

    def _send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        if self._sock is None:
            raise ConnectionAbortedError("this lease was given up")
        while True:
            sent = wire.send(self._sock, data, fds)
            if sent == len(data):
                return
            data, fds = data[sent:], ()

    # -- answers -------------------------------------------------------------------------------------------

    def read(self, timeout: float | None) -> bool:
        """Block until something arrived and handle it. False on timeout. Ctrl-C works."""
        if self._sock is None or self._glance is None:
            return True  # given up meanwhile
        self._glance.wait()
        if timeout is not None:
            poller = select.poll()
            poller.register(self._sock, select.POLLIN)
            if not poller.poll(max(0.0, timeout) * 1000):
                return False
        self._receive(0)
        return True

    def read_now(self) -> None:
        """Handle what is there."""
        self._receive(wire.AT_ONCE)

    def _receive(self, flags: int) -> None:
        if self._sock is None:
            return
        try:
            data, fds = wire.receive(self._sock, wire.SOME_BYTES, flags)
            if self._expected and not fds and not self._told and (payload := self._frames.expected(self._expected, data)) is not None:
                self._owner.on_value(self, payload)
                return
            frames = self._frames.feed(data, fds) if data else []
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, wire.WireError):
            data, frames = b"", []
        except Exception as error:
            self._owner.on_fault(self, error)
            return
        self._handle_all(frames)
        if not data:
            self.is_closed = True
            self._owner.on_closed(self)

    def _handle_all(self, frames: list[wire.Frame]) -> None:
        """Of a lease that is given up because of one of them the others are of no use: several refusals come together."""
        for frame in frames:
            if self._sock is None:
                frame.close()
                continue
            try:
                self._handle(frame)
            except Exception as error:
                self._owner.on_fault(self, error)

    def _handle(self, frame: wire.Frame) -> None:
        header = frame.header
        op = header.get("op")
        if op is None:
            if self._told:  # what came before the call has been read
                self._known |= self._told
                self._told.clear()
            self._owner.on_answer(self, frame)
        elif op == "item":
            self._owner.on_item(self, frame)
        elif op == "grant":
            self._owner.on_granted(self, header)
        elif op == "goaway":
            self.last_accepted = header["last"]
        elif op == "refused":
            self._owner.on_refused(self, header)

    def close(self) -> None:
        """Idempotent."""
        self.is_closed = True
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._frames.close()


def put(upload: Upload) -> tuple[bytes, tuple[int, ...]]:
    """The frame that carries content, and a descriptor that is the caller's to close."""
    header = {"op": "put", "digest": upload.digest, "role": upload.role}
    data = upload.data
    if isinstance(data, bytes) and len(data) <= wire.INLINE_BYTES:
        return wire.encode(header, data), ()
    fd = wire.memfd("remoted-content", data) if isinstance(data, bytes) else os.dup(data.fd)
    return wire.encode(header, fd_count=1), (fd,)
