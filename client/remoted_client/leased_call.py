"""A call that travels on a lease: as a ``CallState``, but whoever waits for it may read its answer from the socket."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from remoted_client.call_state import CallState
from remoted_client.lease import Lease
from remoted_client.unread import drop
from remoted_client.wire import Frame, Status

if TYPE_CHECKING:
    from remoted_client.connection import Upload
    from remoted_client.home import Home
    from remoted_client.payload import Payload
    from remoted_client.segments import Segment


#: A window of the worker's holds 64, or 16 MiB: with the first of that size the reader has no others left.
_CREDITED_ITEMS = 16


class Pool(Protocol):
    """Where its lease comes from."""

    def claim(self, call: LeasedCall, reader: object) -> Lease | None:
        """The lease that carries the call, to be read by this reader alone; None if it waits, or somebody reads."""
        ...

    def unclaim(self, lease: Lease, reader: object) -> None: ...
    def receive(self, call: LeasedCall) -> bool:
        """Wait for its answer in this thread and take it. False: that cannot be done, or the call has gone elsewhere."""
        ...

    def attend(self, call: LeasedCall) -> None:
        """Let the connection's thread read its answer."""
        ...

    def take_back(self, segment: Segment) -> None:
        """Nobody has seen it."""
        ...

    def tell(self, call: LeasedCall, header: dict[str, Any]) -> None:
        """Say something about it to the worker that has it, if one has."""
        ...

    def withdraw(self, call: LeasedCall) -> bool:
        """Take it back while it waits, or see that it is over. False: a worker has it."""
        ...


# As names of this module: members are looked up slowly in an enum.
_IN_PROGRESS, _COMPLETED = Status.IN_PROGRESS, Status.COMPLETED


class LeasedCall(CallState):
    """One call. ``use`` names what is called: digests of code, modules and context, and the timeout in milliseconds.

    Of a method also the instance, its own name and the digest of what the constructor is given.
    """

    known = is_mine = True
    is_durable = False
    queued_at = 0.0
    #: No segments, in neither direction.
    copies = False
    #: The large buffers of its arguments, and how many they are.
    segment: Segment | None = None
    buffers = 0
    lease: Lease | None = None
    number = 0
    #: Of the instance whose method it calls. Forgotten before anybody hears that it is over: what they do then comes behind the drop.
    home: Home | None = None
    #: A worker that had not accepted it does not get another one to run it.
    is_cancelled = False
    #: Items that were read and of which the worker has not heard; and whether any more are wanted.
    _unsaid = 0
    _is_left = False

    def __init__(self, name: str, pool: Pool, use: tuple[Any, ...], uploads: tuple[Upload, ...], payload: Payload, is_plain: bool, stream: bool) -> None:
        self._begin(name, stream)
        self.pool, self.use, self.uploads = pool, use, uploads
        self.payload, self.is_plain = payload, is_plain

    # -- the pool ------------------------------------------------------------------------------------------

    def on_sent(self, lease: Lease) -> bool:
        """A worker gets it. True if somebody waits for it, who will read the answer."""
        with self._lock:
            self.lease, self.id, self.worker = lease, f"{lease.id}-{self.number}", lease.worker
            self.status, self.reason = _IN_PROGRESS, ""
            if not self._news_waiters and not self._waiters:
                return False
            self._notify()
            return True

    def on_waiting(self, reason: str) -> None:
        """Why no worker has it yet."""
        self.status, self.reason, self.lease = Status.IN_QUEUE, reason, None

    def wake(self) -> None:
        """Whoever waits may read now."""
        with self._lock:
            self._notify_news()

    def on_answer(self, header: dict[str, Any], frame: Frame) -> None:
        """The end of it: the worker's answer in the words of a ``done`` frame."""
        self.home = None
        self.on_done(Frame({"id": self.id, "worker": self.worker, **header}, frame.body, frame.fds))

    def on_value(self, payload: bytes) -> None:
        """It has returned something plain."""
        self.home = None
        with self._lock:
            self.returned, self.is_over, self.status = payload, True, _COMPLETED
            is_awaited = self._callbacks or self._waiters or self._condition is not None
        if is_awaited:
            self._end()

    def fail(self, error: BaseException) -> None:
        self.home = None
        super().fail(error)

    def _end(self) -> None:
        if self.segment is not None and self.lease is None:
            self.pool.take_back(self.segment)
        super()._end()

    # -- a stream ------------------------------------------------------------------------------------------

    def on_event(self, frame: Frame) -> None:
        if frame.op == "item" and self._is_left:
            drop(frame)
        else:
            super().on_event(frame)

    def credit(self, items: int, send: Callable[[dict[str, Any]], None]) -> None:
        """Not each for itself, while more of them are here to be read."""
        self._unsaid += items
        if not self.items or self._unsaid >= _CREDITED_ITEMS:
            items, self._unsaid = self._unsaid, 0
            self.pool.tell(self, {"op": "credit", "n": self.number, "items": items})

    def leave(self, send: Callable[[dict[str, Any]], None]) -> None:
        with self._lock:
            self._is_left = True
            unread, self.items = [self._take(frame) for frame in self.items], deque()
        for frame in unread:
            drop(frame)
        if self.pool.withdraw(self):
            return
        self.pool.tell(self, {"op": "close_stream", "n": self.number})
        self.pool.attend(self)  # what was on its way is read, or the worker could not send that it has ended

    # -- everybody else ------------------------------------------------------------------------------------

    def look(self) -> None:
        if not self.is_over:
            self.pool.attend(self)

    def request_cancel(self, send: Callable[[dict[str, Any]], None]) -> None:
        self.is_cancelled = True
        if self.pool.withdraw(self):
            return
        # Only now: the thread that sends the call held the pool's lock until it had noted where it went.
        lease = self.lease
        if lease is not None:
            send({"op": "cancel", "id": lease.id, "number": self.number})
            self.pool.attend(self)

    def wait_and_tell(self, condition: Callable[[], bool], timeout: float | None, news: bool = True) -> bool:
        """Of one that a worker has there is nothing to tell."""
        if timeout is None and not self.is_stream and self.pool.receive(self):
            return True
        return super().wait_and_tell(condition, timeout, news)

    def wait(self, condition: Callable[[], bool], timeout: float | None, news: bool = True) -> bool:
        """Reads the answer itself if it can; the lease's socket is this thread's meanwhile."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not condition():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            lease = self.pool.claim(self, self)
            if lease is None:
                super().wait(lambda: condition() or self._is_claimable, left, news=True)
                continue
            try:
                while lease.read(None if deadline is None else deadline - time.monotonic()) and lease.carries(self) and not condition():
                    pass
            finally:
                self.pool.unclaim(lease, self)
        return True

    async def wait_async(self, condition: Callable[[], bool], news: bool = True) -> None:
        """The same on the running loop, which listens to the lease's socket until it has said that it does not."""
        loop_reader = object()
        while not condition():
            lease = self.pool.claim(self, loop_reader)
            if lease is None:
                await super().wait_async(lambda: condition() or self._is_claimable, news=True)
                continue
            try:
                await _answered(lease, self, condition)
            finally:
                self.pool.unclaim(lease, loop_reader)

    @property
    def _is_claimable(self) -> bool:
        lease = self.lease
        return lease is not None and lease.reader is None and lease.carries(self)


async def _answered(lease: Lease, call: LeasedCall, condition: Callable[[], bool]) -> None:
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        lease.read_now()
        if (not lease.carries(call) or condition()) and not over.done():
            over.set_result(None)

    fd = lease.fileno()
    loop.add_reader(fd, readable)
    try:
        await over
    finally:
        loop.remove_reader(fd)


def translated(lease: Lease, call: LeasedCall, header: dict[str, Any]) -> dict[str, Any]:
    """A worker's answer as the daemon would have told it, with what its payload needs to be read."""
    apart = {"segment": header["segment"], "buffers": header["buffers"], "releases": header["releases"]} if "segment" in header else {}
    if call.home is not None and "constructed" in header:
        apart["reconstructed"] = call.home.note_construction()
    if "kind" not in header:
        return {**_DONE, **apart, "plain": header.get("plain", False)}
    kind, why = header["kind"], header["why"]
    if kind == "returned":
        status, reason = Status.COMPLETED, ""
    elif why == "TIMEOUT":
        status, reason = Status.TIMED_OUT, "TIMEOUT"
    elif why:
        status, reason = Status.CANCELLED, why
    else:
        status, reason = Status.FAILED, "EXITED" if kind == "exited" else "EXCEPTION"
    error = header["message"]
    if status is Status.TIMED_OUT:
        error = f"the call ran longer than its timeout of {call.use[3] / 1000:g} s and was stopped"
    return {**header_of(status, reason, error, kind), **apart, "error_type": header["error_type"], "traceback": header["traceback"]}


_DONE = {"status": "COMPLETED", "reason": "", "kind": "returned", "error": "", "error_type": "", "traceback": ""}


def header_of(status: Status, reason: str, error: str, kind: str = "") -> dict[str, Any]:
    """The words of a ``done`` frame."""
    return {"status": status.value, "reason": reason, "kind": kind, "error": error, "error_type": "", "traceback": ""}
