"""What this process knows of one call, filled by the connection's thread and read by everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from remoted_client import context, wire
from remoted_client.printed import Bookmark, Printed, echo, tell_fault, tell_preload
from remoted_client.unread import Unread
from remoted_client.wire import Status

if TYPE_CHECKING:
    from remoted_client.connection import Outgoing
    from remoted_client.reading import Reading

_TELL_SECONDS = 2.0
_WAITING = {
    "NO_ANSWER": "the daemon has not answered yet",
    "WAITING_GPU": "no GPU that could serve it is free",
    "FOREIGN_GPU_USE": "processes outside of remoted use the GPU",
    "WAITING_CPU": "other calls have the CPUs that it asks for",
    "WAITING_WORKER": "all workers of its pool are busy{}",
    "WAITING_ENV": "the environment of its dependencies is being built",
    "WAITING_TURN": "others have their turn",
    "WAITING_RETRY": "an attempt failed, and the next one comes soon",
    "WAITING_INSTANCE": "the worker that has its instance is busy",
    "WAITING_QUOTA": "your limit of calls that run at once is reached",
    "DRAINED": "an administrator drains the daemon: nothing new begins",
    "STARTING": "its worker is starting",
}
#: The reason that was told last, by function.
_told: dict[str, str] = {}
#: ``Status(word)`` costs ten times as much.
_STATUSES = {status.value: status for status in Status}
#: The standard error that was asked last, and whether somebody watches it: that is a system call.
_watched: tuple[Any, bool] = None, False


class CallState:
    """One call. Everything that ends it goes through ``_end``, once."""

    # What most calls never change stands here: making a call costs what is set in it.
    was_awaited = False
    resent = False
    #: It may have reached the daemon: a direct call is not sent again then.
    was_sent = False
    status = Status.IN_QUEUE
    reason = ""
    worker = ""
    _bookmark: Bookmark | None = None
    items_received = 0
    #: How it ended, or why that cannot be known; and whether either is there.
    done_frame: wire.Frame | None = None
    error: BaseException | None = None
    is_over = False
    #: The pickle of a plain value, of a call of which there is nothing else to say.
    returned: bytes | None = None
    known = False
    #: Who gives its outcome, which can be read once.
    handle: weakref.ref[Any] | None = None
    #: Of its pool, for words about waiting.
    workers_max = 0
    _condition: threading.Condition | None = None
    _news_waiters = 0
    _printed: Printed | None = None
    _unread: Unread | None = None
    #: How to say that items were taken, when nobody is left who reads them.
    _along: Callable[[dict[str, Any]], None] | None = None
    _echo = True
    outgoing: Outgoing | None = None
    key = ""
    id = ""
    is_detached = False
    #: Submitted by this process, and ended with it.
    is_mine = False
    #: Of the line, for who waits.
    reading: Reading | None = None

    def __init__(self, name: str, outgoing: Outgoing | None, *, durable: bool, detached: bool, stream: bool, echo: bool, call_id: str = "") -> None:
        self._begin(name, stream)
        self.is_durable = durable
        self._echo = echo
        if outgoing is not None:
            self.outgoing, self.key, self.is_mine = outgoing, outgoing.key, not detached
        if call_id:
            self.id = call_id
        if detached:
            self.is_detached = True

    def _begin(self, name: str, stream: bool) -> None:
        self.name, self.is_stream = name, stream
        self.items: deque[wire.Frame] = deque()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

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
            if self._bookmark is None:
                self._bookmark = Bookmark()
            self.add_output(frame.header["stream"], self._bookmark.take(frame))
        elif frame.op == "item":
            with self._lock:
                self._guard(frame)
                self.items.append(frame)
                self.items_received += 1
                self._notify()
            if self._along is not None:
                self.credit(1, self._along)
            return
        elif frame.op == "state":
            with self._lock:
                self.known = True
                self.status, self.reason = _STATUSES[frame.header["status"]], frame.header["reason"]
                self.worker = frame.header["worker"]
                self._notify_news()
            tell_preload(self.name, frame.header)
        frame.close()

    def add_output(self, stream: int, data: bytes) -> None:
        """Show and keep what it printed."""
        if self._printed is None:
            self._printed = Printed(self._echo)
        self._printed.add(stream, data)

    def reopen_log(self) -> int:
        """From where the next daemon shall tell what is printed."""
        return self._bookmark.come_back() if self._bookmark is not None else 0

    def on_done(self, frame: wire.Frame) -> None:
        with self._lock:
            self._guard(frame)
            self.known = self.is_over = True
            self.done_frame = frame
            self.id = frame.header["id"]
            self.status, self.reason = _STATUSES[frame.header["status"]], frame.header["reason"]
            self.worker = frame.header["worker"]
        self._end()

    def _guard(self, frame: wire.Frame) -> None:
        if frame.fds:
            if self._unread is None:
                self._unread = Unread()
            self._unread.add(frame)

    def fail(self, error: BaseException) -> None:
        """The call was not taken, or its record cannot be reached."""
        with self._lock:
            if self.is_over:
                return
            self.error, self.is_over = error, True
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._notify()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            _call_back(callback)

    def _notify_news(self) -> None:
        """Something short of the end: whoever waits for the end alone sleeps on (a wake-up costs 50 us)."""
        if self._news_waiters:
            self._notify()

    def _notify(self) -> None:
        """Wake threads and loops; called with the condition held."""
        if self._condition is not None:
            self._condition.notify_all()
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for loop, future in waiters:
                with contextlib.suppress(RuntimeError):  # that loop was closed
                    loop.call_soon_threadsafe(_wake, future)

    def look(self) -> None:
        """Somebody asks how it stands without waiting for it; the connection's thread keeps this up to date."""

    def credit(self, items: int, send: Callable[[dict[str, Any]], None]) -> None:
        """So many more items were read."""
        send({"op": "credit", "id": self.id, "items": items})

    def read_along(self, credited: int, send: Callable[[dict[str, Any]], None]) -> None:
        """Its items count as read from now on, and those that came already."""
        self._along = send
        self.credit(self.items_received - credited, send)

    def leave(self, send: Callable[[dict[str, Any]], None]) -> None:
        """No more items are wanted."""
        send({"op": "close_stream", "id": self.id})

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

    def text(self, stream: int) -> str:
        return self._printed.text(stream, self.id) if self._printed is not None else ""

    @property
    def has_callbacks(self) -> bool:
        return bool(self._callbacks)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if not self.is_over:
                self._callbacks.append(callback)
                return
        _call_back(callback)

    def wait(self, condition: Callable[[], bool], timeout: float | None, news: bool = True) -> bool:
        """Block this thread until ``condition()`` holds. False on timeout. Ctrl-C works. Without ``news`` only the end counts."""
        if condition():
            return True
        if self.reading is not None and not news:
            began = time.monotonic()
            self.reading.follow(self, timeout)
            timeout = timeout and max(0.0, timeout - (time.monotonic() - began))
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

    def wait_and_tell(self, condition: Callable[[], bool], timeout: float | None, news: bool = True) -> bool:
        """As ``wait``; whoever sits at a terminal is told why nothing happens."""
        if condition():
            return True
        if not _is_watched():
            return self.wait(condition, timeout, news)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _TELL_SECONDS if deadline is None else deadline - time.monotonic()
            if self.wait(condition, max(0.0, min(_TELL_SECONDS, left)), news):
                return True
            if left <= _TELL_SECONDS and deadline is not None:
                return False
            self._tell_waiting()

    async def wait_and_tell_async(self, condition: Callable[[], bool], news: bool = True) -> None:
        """The same for the running loop."""
        if not _is_watched():
            await self.wait_async(condition, news)
            return
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []

        def tell() -> None:
            if timers:
                self._tell_waiting()
            timers[:] = [loop.call_later(_TELL_SECONDS, tell)]

        tell()
        try:
            await self.wait_async(condition, news)
        finally:
            timers[0].cancel()

    def _tell_waiting(self) -> None:
        """Once per function and reason, until that changes."""
        if self.status is not Status.IN_QUEUE:
            _told.pop(self.name, None)
            return
        # Before there is a line to the daemon, that is the line's to say (``daemon.await_word``).
        silent = "NO_ANSWER" if self.was_sent or not self.is_durable else ""
        reason = self.reason or ("" if self.accepted else "WAITING_WORKER" if self.known else silent)
        if reason and _told.get(self.name) != reason:
            _told[self.name] = reason
            words = _WAITING.get(reason, "").format(f" (workersMax={self.workers_max})" if self.workers_max else "")
            echo.show(2, f"remoted: {self.name} waits: {words or reason} ({reason})\n")

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
            return self._take(self.items.popleft()) if self.items else None

    def take_outcome(self) -> wire.Frame:
        """With its descriptors, which can be read once."""
        with self._lock:
            assert self.done_frame is not None
            frame = self._take(self.done_frame)
            if frame.fds:
                self.done_frame = frame._replace(fds=())
            return frame

    def _take(self, frame: wire.Frame) -> wire.Frame:
        """Its descriptors are the caller's to close from now on."""
        if frame.fds and self._unread is not None:
            self._unread.take(frame)
        return frame


def _is_watched() -> bool:
    global _watched
    if context.in_worker or sys.stderr is None:
        return False
    if _watched[0] is not sys.stderr:
        try:
            _watched = sys.stderr, sys.stderr.isatty()
        except Exception:  # whatever stands there
            return False
    return _watched[1]


def _call_back(callback: Callable[[], None]) -> None:
    """What it raises is its own: the thread that ends a call has others to serve."""
    try:
        callback()
    except (Exception, SystemExit):
        tell_fault("a callback of add_done_callback has raised")


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
