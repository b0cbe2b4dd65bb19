"""What this process knows of one call, filled by the connection's thread and read by everybody else."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from remoted_client import wire
from remoted_client.wire import Status

if TYPE_CHECKING:
    from remoted_client.connection import Outgoing

#: What is kept of a call's output for ``JobOutput.stdout``: its last part. The daemon keeps more.
_KEPT_CHARACTERS = 16 << 20


class CallState:
    """One call. Everything that ends it goes through ``_end``, once."""

    def __init__(self, name: str, outgoing: Outgoing | None, *, durable: bool, detached: bool, stream: bool, echo: bool, call_id: str = "") -> None:
        self.name = name
        self.outgoing = outgoing
        self.key = outgoing.key if outgoing else ""
        self.id = call_id
        self.is_durable = durable
        self.is_detached = detached
        self.is_stream = stream
        #: Submitted by this process, and ended with it.
        self.is_mine = outgoing is not None and not detached
        self.was_awaited = False
        self.resent = False
        #: It may have reached the daemon: a direct call is not sent again then.
        self.was_sent = False
        self.status = Status.IN_QUEUE
        self.reason = ""
        self.worker = ""
        self.log_offset = 0
        self.items_received = 0
        self.items: deque[wire.Frame] = deque()
        self.done_frame: wire.Frame | None = None
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._condition: threading.Condition | None = None
        self._news_waiters = 0
        self._callbacks: list[Callable[[], None]] = []
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._echo = echo
        self._printed: Printed | None = None
        self.known = False

    # -- the connection's thread ---------------------------------------------------------------------------

    def on_accepted(self, call_id: str) -> None:
        with self._lock:
            self.id = call_id
            self._notify_news()

    @property
    def accepted(self) -> bool:
        return bool(self.id)

    def on_event(self, frame: wire.Frame) -> None:
        if frame.op == "output":
            self._on_output(frame)
        elif frame.op == "item":
            with self._lock:
                self.items.append(frame)
                self.items_received += 1
                self._notify()
            return
        elif frame.op == "state":
            with self._lock:
                self.known = True
                self.status, self.reason = Status(frame.header["status"]), frame.header["reason"]
                self.worker = frame.header["worker"]
                self._notify_news()
        frame.close()

    def _on_output(self, frame: wire.Frame) -> None:
        self.log_offset = frame.header.get("offset", self.log_offset)
        if self._printed is None:
            self._printed = Printed(self._echo)
        self._printed.add(frame.header["stream"], frame.body)

    def on_done(self, frame: wire.Frame) -> None:
        with self._lock:
            self.known = True
            self.done_frame = frame
            self.id = frame.header["id"]
            self.status, self.reason = Status(frame.header["status"]), frame.header["reason"]
            self.worker = frame.header["worker"]
        self._end()

    def fail(self, error: BaseException) -> None:
        """The call was not taken, or its record cannot be reached."""
        with self._lock:
            if self.is_over:
                return
            self.error = error
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._notify()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def _notify_news(self) -> None:
        """Something short of the end: whoever waits for the end alone sleeps on (a wake-up costs 50 us)."""
        if self._news_waiters:
            self._notify()

    def _notify(self) -> None:
        """Wake threads and loops; called with the condition held."""
        if self._condition is not None:
            self._condition.notify_all()
        waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):  # that loop was closed
                loop.call_soon_threadsafe(_wake, future)

    def look(self) -> None:
        """Somebody asks how it stands without waiting for it; the connection's thread keeps this up to date."""

    def request_cancel(self, send: Callable[[dict[str, Any]], None]) -> None:
        """Now, or as soon as the daemon has given the call an id."""
        if self.accepted:
            send({"op": "cancel", "id": self.id})
            return

        def wait() -> None:
            self.wait(lambda: self.accepted or self.is_over, 60.0)
            if self.accepted and not self.is_over:
                send({"op": "cancel", "id": self.id})

        threading.Thread(target=wait, name="remoted-cancel", daemon=True).start()

    # -- everybody else ------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        return self.done_frame is not None or self.error is not None

    def text(self, stream: int) -> str:
        return self._printed.text(stream) if self._printed is not None else ""

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if not self.is_over:
                self._callbacks.append(callback)
                return
        callback()

    def wait(self, condition: Callable[[], bool], timeout: float | None, news: bool = True) -> bool:
        """Block this thread until ``condition()`` holds. False on timeout. Ctrl-C works. Without ``news`` only the end counts."""
        with self._lock:
            self._news_waiters += news
            try:
                if self._condition is None:
                    self._condition = threading.Condition(self._lock)
                return self._condition.wait_for(condition, timeout)
            finally:
                self._news_waiters -= news

    def wait_accepted(self, timeout: float) -> bool:
        return self.wait(lambda: self.accepted or self.is_over, timeout)

    async def wait_async(self, condition: Callable[[], bool], news: bool = True) -> None:
        """The same for the running loop."""
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                if condition():
                    return
                future: asyncio.Future[None] = loop.create_future()
                self._waiters.append((loop, future))
                self._news_waiters += news
            try:
                await future
            finally:
                with self._lock:
                    self._news_waiters -= news

    def take_item(self) -> wire.Frame | None:
        with self._lock:
            return self.items.popleft() if self.items else None


class Printed:
    """What a call has printed: shown at once where the caller is, and its last part kept."""

    def __init__(self, echo: bool) -> None:
        self._echo = echo
        self._texts: dict[int, list[str]] = {1: [], 2: []}
        self._kept = {1: 0, 2: 0}
        self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in (1, 2)}

    def add(self, stream: int, data: bytes) -> None:
        text = self._decoders[stream].decode(data)
        kept = self._texts[stream]
        kept.append(text)
        self._kept[stream] += len(text)
        while self._kept[stream] > _KEPT_CHARACTERS and len(kept) > 1:
            self._kept[stream] -= len(kept.pop(0))
        if self._echo and text:
            target = sys.stdout if stream == 1 else sys.stderr
            with contextlib.suppress(Exception):  # a closed or replaced stream of the caller's is not our failure
                target.write(text)
                target.flush()

    def text(self, stream: int) -> str:
        return "".join(self._texts[stream])


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def payload_of(frame: wire.Frame) -> Any:
    """The frame's payload for the decoder: bytes, or a file that is closed when it was read."""
    if not frame.fds:
        return frame.body
    file = open(frame.fds[0], "rb", closefd=False)
    os.lseek(frame.fds[0], 0, os.SEEK_SET)
    return file
