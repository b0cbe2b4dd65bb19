"""Frames over one raw non-blocking socket: in order, with deadlines, both directions bounded.

asyncio's own transports drop passed descriptors (MECHANISMS 3), hence ``add_reader`` and recvmsg. What a slow
reader has not taken is bounded: who does not even take its results is dropped and may come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from remoted import foreign, turn
from remoted.limits import Limits
from remoted_client import wire

_READ_BYTES = 256 * 1024
#: Everybody's: what has been read is taken out at once.
_buffer = bytearray(_READ_BYTES)
#: Frames of one client that wait to be handled; beyond it the daemon stops reading that socket.
_INBOX_FRAMES = 2048
_INBOX_BYTES = 8 << 20
_INBOX_FDS = 8
#: What a descriptor that waits for its reader counts for: they are scarcer than memory.
_DESCRIPTOR_COST = 64 * 1024
#: Handled in one turn of the loop; then all others have theirs.
_TURN_FRAMES = 32
#: What is no hurry waits so long for something that is: to wake a client costs it, and us, more than the news is worth.
_LEISURE_SECONDS = 0.003


class Transport:
    """``on_frame`` gets one frame after the other, and what it returns is awaited before the next: a frame is closed when it was handled.

    ``on_failure`` hears what that has raised; ``on_room`` is told when the outbox is empty again.
    """

    def __init__(
        self,
        sock: socket.socket,
        limits: Limits,
        on_frame: Callable[[wire.Frame], Awaitable[None] | None],
        on_failure: Callable[[wire.Frame, Exception], None],
        on_room: Callable[[], None],
        on_closed: Callable[[], None],
        on_refusal: Callable[[str], None] = lambda code: None,
        pace: Callable[[int], float] = lambda count: 0.0,
    ) -> None:
        """``pace``: how many seconds to wait after so many frames."""
        sock.setblocking(False)
        self._sock = sock
        self._limits = limits
        self._on_frame, self._on_failure, self._on_room, self._on_closed, self._on_refusal = on_frame, on_failure, on_room, on_closed, on_refusal
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        self._turn = turn.current()
        self._reader = wire.FrameReader()
        #: Set once descriptors that it has sent and that are no memory are closed.
        self.foreign: asyncio.Future[None] | None = None
        self._inbox: deque[wire.Frame] = deque()
        self._inbox_bytes = self._inbox_fds = 0
        self._paused = False
        #: Something has to wait, so the task is at it: a frame's end, others' turn, or the client itself.
        self._waits = asyncio.Event()
        self._unfinished: tuple[wire.Frame, Awaitable[None]] | None = None
        #: Frames since the others had their turn.
        self._handled = 0
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._outbox_bytes = 0
        #: A frame about calls that more may join.
        self._calls: wire.CallsFrame | None = None
        self._open = True
        self._flushing = False
        self._leisure: asyncio.TimerHandle | None = None
        self._writer_set = False
        self._introduced = False
        self._drain_waiters: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(limits.hello_deadline_seconds, self._too_slow, "it did not introduce itself")
        self._loop.add_reader(sock.fileno(), self._turn.run, self._read)
        self._task = self._loop.create_task(self._serve())

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def is_full(self) -> bool:
        """Half of what may wait does: nothing that can be told later should be sent now."""
        return self._outbox_bytes > self._limits.outbox_bytes // 2

    @property
    def has_room_for_output(self) -> bool:
        """Output is the first to wait: it is in the log file and costs no memory there."""
        return self._outbox_bytes <= self._limits.outbox_bytes // 4

    @property
    def is_empty(self) -> bool:
        """The client has taken everything."""
        return not self._outbox_bytes

    def introduced(self) -> None:
        """The first frame was a good one: the deadline for it is over."""
        self._introduced = True
        self._stop_timer()

    # -- reading -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data, fds = wire.receive_into(self._sock, _buffer)
            if not data:
                self.close()
                return
            frames = self._reader.feed(data, foreign.sift(fds, foreign.is_memory))
        except (BlockingIOError, InterruptedError):
            return
        except wire.WireError as error:
            self.foreign = error.closed if isinstance(error, foreign.ForeignDescriptors) else None
            self.refuse_and_close(error.code, str(error))
            return
        except OSError:
            self.close()
            return
        self._watch_deadline(bool(frames))
        if frames:
            self._inbox.extend(frames)
            self._inbox_bytes += len(data)
            self._inbox_fds += len(fds)
            if len(self._inbox) > _INBOX_FRAMES or self._inbox_bytes > _INBOX_BYTES or self._inbox_fds > _INBOX_FDS:
                self._pause()
            if not self._waits.is_set():
                self._serve_now()

    def _watch_deadline(self, progress: bool) -> None:
        """Half a frame may not stay half for ever, however slowly it trickles (T12)."""
        if not self._introduced or not (progress or not self._timer or not self._reader.pending_bytes):
            return
        self._stop_timer()
        if self._reader.pending_bytes:
            self._timer = self._loop.call_later(self._limits.frame_deadline_seconds, self._too_slow, "a frame stayed incomplete")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pause(self) -> None:
        """It sends faster than its frames are handled. That is not its fault, so no deadline runs."""
        self._paused = True
        self._loop.remove_reader(self._sock.fileno())
        if self._introduced:
            self._stop_timer()

    def _resume(self) -> None:
        if self._open:
            self._paused = False
            self._loop.add_reader(self._sock.fileno(), self._turn.run, self._read)
            self._watch_deadline(progress=True)

    def _too_slow(self, why: str) -> None:
        self.refuse_and_close("TOO_SLOW", f"cannot wait any longer: {why}")

    def _serve_now(self) -> None:
        """Usually nothing has to wait, and a task would cost another turn of the loop."""
        while self._inbox and self._open and not self._paused and not self.is_full and self._handled < _TURN_FRAMES:
            self._unfinished = self._handle_next()
            if self._unfinished is not None:
                break
        if self._inbox or self._unfinished is not None or self._handled >= _TURN_FRAMES:
            self._waits.set()
        else:
            self._inbox_bytes = self._inbox_fds = 0

    async def _serve(self) -> None:
        """The rest, for as long as the connection lives."""
        while True:
            await self._waits.wait()
            await self._finish()
            while self._inbox:  # nothing is left there where the connection has ended meanwhile
                if self.is_full:
                    await self.drained()  # who does not take its answers is not asked for more
                    continue
                self._unfinished = self._handle_next()
                await self._finish()
            self._inbox_bytes = self._inbox_fds = 0
            if self._paused:
                self._resume()
            self._waits.clear()

    def _handle_next(self) -> tuple[wire.Frame, Awaitable[None]] | None:
        frame = self._inbox.popleft()
        self._handled += _weight(frame)
        unfinished = None
        try:
            unfinished = self._on_frame(frame)
        except Exception as error:
            self._on_failure(frame, error)
        finally:
            if unfinished is None:
                frame.close()
        if unfinished is None:
            return None
        if self._open:
            return frame, unfinished
        _drop(frame, unfinished)
        return None

    async def _finish(self) -> None:
        """What has begun; and others have their turn."""
        if self._unfinished is not None:
            (frame, unfinished), self._unfinished = self._unfinished, None
            try:
                await unfinished
            except Exception as error:
                self._on_failure(frame, error)
            finally:
                frame.close()
        if self._handled >= _TURN_FRAMES:
            handled, self._handled = self._handled, 0
            await asyncio.sleep(self._pace(handled))

    # -- writing -------------------------------------------------------------------------------------------

    def send(self, header: dict[str, Any], body: bytes = b"", fds: tuple[int, ...] = (), bounded: bool = True, hurry: bool = True) -> None:
        """Queue one frame; what one turn of the loop produces leaves together. Closes the descriptors once sent."""
        if not self._open:
            wire.close_all(fds)
            return
        if header["op"] == "refused":
            self._on_refusal(header["code"])
        self._end_calls()
        self._put(wire.encode(header, body, len(fds)), fds)
        self._send_soon(bounded, hurry)

    def send_call(self, op: str, word: Any, body: bytes = b"", fds: tuple[int, ...] = (), bounded: bool = True, hurry: bool = True) -> None:
        """The same about a call: it joins the frame before, if that is about such calls too."""
        if not self._open:
            wire.close_all(fds)
            return
        if fds:
            self._end_calls()
            self._put(wire.encode({"op": op, "calls": [word], "sizes": [0]}, fd_count=len(fds)), fds)
        elif self._calls is None or self._calls.common["op"] != op or not self._calls.add(word, body):
            self._end_calls()
            self._calls = wire.CallsFrame({"op": op})
            self._calls.add(word, body)
        self._send_soon(bounded, hurry)

    def _end_calls(self) -> None:
        """Whatever comes now comes behind them."""
        frame, self._calls = self._calls, None
        if frame is not None:
            for data in frame.frames():
                self._put(data, ())

    def _put(self, data: bytes, fds: tuple[int, ...]) -> None:
        self._outbox.append((data, fds))
        self._outbox_bytes += len(data) + _DESCRIPTOR_COST * len(fds)

    def _send_soon(self, bounded: bool, hurry: bool) -> None:
        if bounded and self._outbox_bytes > self._limits.outbox_bytes:
            self.close()  # it does not even take its results; it may come back and ask
        elif self._flushing:
            pass
        elif hurry:
            self._flush_soon()
        elif self._leisure is None:
            self._leisure = self._loop.call_later(_LEISURE_SECONDS, self._end_leisure)

    def _flush_soon(self) -> None:
        self._flushing = True
        self._turn.soon(self._flush)

    def _end_leisure(self) -> None:
        self._leisure = None
        if self._open and not self._flushing and (self._outbox or self._calls is not None):
            self._flush_soon()

    async def drained(self) -> None:
        """Until everything was taken, or the connection has ended."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._drain_waiters.append(future)
        await future

    def _flush(self) -> None:
        self._end_calls()
        while self._open and self._outbox:
            data, fds = self._gather()
            try:
                sent = wire.send(self._sock, data, fds)
            except (BlockingIOError, InterruptedError):
                self._outbox.appendleft((data, fds))
                self._loop.add_writer(self._sock.fileno(), self._flush)
                self._writer_set = True
                return
            except OSError:
                wire.close_all(fds)
                self.close()
                return
            wire.close_all(fds)
            self._outbox_bytes -= sent + _DESCRIPTOR_COST * len(fds)
            if sent < len(data):
                self._outbox.appendleft((data[sent:], ()))
        self._flushing = False
        if self._writer_set and self._open:
            self._writer_set = False
            self._loop.remove_writer(self._sock.fileno())
        self._wake_drain_waiters()
        if self._open:
            self._on_room()

    def _gather(self) -> tuple[bytes, tuple[int, ...]]:
        """The next frame, and those after it that carry no descriptors, as one write."""
        data, fds = self._outbox.popleft()
        if fds or not self._outbox or self._outbox[0][1]:
            return data, fds
        parts, size = [data], len(data)
        while self._outbox and not self._outbox[0][1] and size < _READ_BYTES:
            parts.append(self._outbox.popleft()[0])
            size += len(parts[-1])
        return b"".join(parts), ()

    def _wake_drain_waiters(self) -> None:
        waiters, self._drain_waiters = self._drain_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- the end -------------------------------------------------------------------------------------------

    def refuse_and_close(self, code: str, message: str) -> None:
        """The last frame says why."""
        self.send({"op": "refused", "about": "", "code": code, "message": message})
        self.close()

    def close(self) -> None:
        """Idempotent."""
        if not self._open:
            return
        self._end_calls()
        with contextlib.suppress(OSError):
            while self._outbox and not self._outbox[0][1]:
                self._sock.send(self._outbox.popleft()[0])  # at the end stands a refusal that explains it
        self._leave()
        foreign.leave(self._sock)
        self._on_closed()

    def detach(self) -> socket.socket | None:
        """The socket, out of the loop, with nothing read of what follows; None when the client sent on, or has gone."""
        if self._open:
            self._flush()
        if not self._open or self._outbox or self._inbox or self._reader.pending_bytes:
            return None
        self._leave()
        self._on_closed()
        return self._sock

    def _leave(self) -> None:
        self._open = False
        self._stop_timer()
        self._task.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._reader.close()
        if self._unfinished is not None:  # nobody will come to it
            _drop(*self._unfinished)
            self._unfinished = None
        while self._inbox:
            self._inbox.popleft().close()
        while self._outbox:
            wire.close_all(self._outbox.popleft()[1])
        self._wake_drain_waiters()


def _drop(frame: wire.Frame, unfinished: Awaitable[None]) -> None:
    """It has not begun, and will not."""
    if isinstance(unfinished, Coroutine):
        unfinished.close()
    elif isinstance(unfinished, asyncio.Future):
        unfinished.cancel()  # else whoever wakes one of those that wait takes it for one of them
    frame.close()


def _weight(frame: wire.Frame) -> int:
    """A frame counts for every call that it is about."""
    calls = frame.header.get("calls")
    return max(1, len(calls)) if isinstance(calls, list) else 1
