"""The data socket: frames from clients to the two use cases, and what happens back to them.

Raw non-blocking sockets, because asyncio's transports drop passed descriptors (MECHANISMS 3). One connection is
one client process. Its frames are handled strictly in order, so a submission may refer to content sent just
before it. What a slow reader has not taken is bounded: output waits in the log file (an offset, no memory), and
a reader that does not even take its results is dropped and may come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import remoted
from remoted import logs
from remoted.access import Peer, admits
from remoted.calls import Call, Request
from remoted.errors import BadRequest, NotFound, Refused, RemotedError, StoreError
from remoted.jobs import Jobs
from remoted.leases import DirectCalls
from remoted.limits import Limits
from remoted.model import Reason
from remoted.spec import parse_options
from remoted.store import Row
from remoted.workers import Content
from remoted_client import wire

log = logging.getLogger(__name__)
_READ_BYTES = 256 * 1024
#: Frames of one client that wait to be handled; beyond it the daemon stops reading that socket.
_INBOX_FRAMES = 2048
_INBOX_BYTES = 8 << 20
#: Taken at one turn of the loop: what closed meanwhile is noticed before it counts against its user's next ones.
_ACCEPTS = 16
_OUTPUT_CHUNK_BYTES = 48 * 1024
#: What a descriptor that waits for its reader counts for: they are scarcer than memory.
_DESCRIPTOR_COST = 64 * 1024
#: JSON bytes that an error and a traceback may each take of a header (wire.HEADER_BYTES holds both).
_TEXT_BYTES = 24 * 1024
_SO_PEERPIDFD = 77  # linux 6.5, include/uapi/asm-generic/socket.h


def peer_of(sock: socket.socket) -> Peer:
    """The process that connected, as the kernel attests it. Raises OSError or ValueError; never guesses (T02)."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(uid, gid, pid)


def peer_pidfd(sock: socket.socket, pid: int) -> int | None:
    """A pidfd of the process that connected; None when it is gone already."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        try:
            return os.pidfd_open(pid)
        except ProcessLookupError:
            return None


class DataServer:
    """Accepts connections and keeps them within their limits."""

    def __init__(self, sock: socket.socket, jobs: Jobs, direct: DirectCalls, limits: Limits, daemon_uid: int) -> None:
        self.jobs = jobs
        self.direct = direct
        self.limits = limits
        self.connections: set[Connection] = set()
        self._sock = sock
        self._daemon_uid = daemon_uid
        self._per_uid: Counter[int] = Counter()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.error("cannot accept a connection: %s", error)
                return
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        """Identity, rule and caps come before the first byte is read."""
        try:
            peer = peer_of(sock)
        except (OSError, ValueError):
            sock.close()
            return
        over = self._per_uid[peer.uid] >= self.limits.connections_per_uid or len(self.connections) >= self.limits.connections_total
        if over or not admits(peer, self._daemon_uid):
            code = "OVER_LIMIT" if over else "FORBIDDEN"
            message = f"the limit connections_per_uid is {self.limits.connections_per_uid}" if over else "this daemon serves another user"
            with contextlib.suppress(OSError):
                sock.send(wire.encode({"op": "refused", "code": code, "message": f"cannot serve this connection: {message}"}))
            sock.close()
            return
        try:
            connection = Connection(self, sock, peer)
        except OSError as error:
            log.error("cannot serve a connection: %s", error)
            sock.close()
            return
        self._per_uid[peer.uid] += 1
        self.connections.add(connection)

    def gone(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._per_uid[connection.peer.uid] -= 1

    def close(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        for connection in list(self.connections):
            connection.close()


class Connection:
    """One client process: its frames in, its events out. Also the ``Watcher`` of its calls."""

    def __init__(self, server: DataServer, sock: socket.socket, peer: Peer) -> None:
        sock.setblocking(False)
        self.peer = peer
        self._server = server
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._reader = wire.FrameReader()
        self._inbox: deque[wire.Frame] = deque()
        self._inbox_bytes = 0
        self._paused = False
        self._arrived = asyncio.Event()
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._outbox_bytes = 0
        self._greeted = False
        self._open = True
        self._flushing = False
        self._writer_set = False
        self._secrets: list[tuple[int, str]] = []
        self._followed: dict[str, int] = {}
        self._watching: set[Call] = set()
        self._mine: set[str] = set()
        #: Submissions that are not committed yet: their calls are not known as ours before.
        self._submitting = 0
        #: News that found no room: a live call, or None for a job that is over and is read from the store.
        self._late: dict[str, Call | None] = {}
        self._telling_late = False
        self._pidfd = peer_pidfd(sock, peer.pid)
        self._caller = ""
        self._drain_waiters: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(server.limits.hello_deadline_seconds, self._too_slow, "it did not introduce itself")
        self._loop.add_reader(sock.fileno(), self._read)
        self._task = self._loop.create_task(self._serve())

    # -- reading -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data, fds = wire.receive(self._sock, _READ_BYTES)
            if not data:
                self._on_eof()
                return
            frames = self._reader.feed(data, fds)
        except (BlockingIOError, InterruptedError):
            return
        except wire.WireError as error:
            self._refuse_and_close(error.code, str(error))
            return
        except OSError:
            self._on_eof()
            return
        self._watch_deadline(bool(frames))
        if frames:
            self._inbox.extend(frames)
            self._inbox_bytes += len(data)
            self._arrived.set()
            if len(self._inbox) > _INBOX_FRAMES or self._inbox_bytes > _INBOX_BYTES:
                self._pause()

    def _watch_deadline(self, progress: bool) -> None:
        """Half a frame may not stay half for ever, however slowly it trickles (T12)."""
        if not self._greeted or not (progress or not self._timer or not self._reader.pending_bytes):
            return
        self._stop_timer()
        if self._reader.pending_bytes:
            self._timer = self._loop.call_later(self._server.limits.frame_deadline_seconds, self._too_slow, "a frame stayed incomplete")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pause(self) -> None:
        """It sends faster than its frames are handled. That is not its fault, so no deadline runs."""
        self._paused = True
        self._loop.remove_reader(self._sock.fileno())
        if self._greeted:
            self._stop_timer()

    def _resume(self) -> None:
        if self._open:
            self._paused = False
            self._loop.add_reader(self._sock.fileno(), self._read)
            self._watch_deadline(progress=True)

    def _too_slow(self, why: str) -> None:
        self._refuse_and_close("TOO_SLOW", f"cannot wait any longer: {why}")

    async def _serve(self) -> None:
        """Frames in order, for as long as the connection lives."""
        while True:
            while self._inbox:
                while self._open and self._is_full():
                    await self._drained()  # who does not take its answers is not asked for more
                await self._handle(self._inbox.popleft())
            self._inbox_bytes = 0
            if self._paused:
                self._resume()
            self._arrived.clear()
            await self._arrived.wait()

    async def _handle(self, frame: wire.Frame) -> None:
        handler = _HANDLERS.get(frame.op) if self._greeted or frame.op == "hello" else None
        try:
            if handler is None:
                raise BadRequest("UNKNOWN_OP", f"cannot handle {frame.op[:40]!r}" + ("" if self._greeted else ": say hello first"))
            result = handler(self, frame)
            if result is not None:
                await result
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._refuse(frame, "BAD_REQUEST", f"cannot read {frame.op[:40]!r}: {type(error).__name__} {error}")
        except Refused as error:
            self._refuse(frame, error.code, str(error))
        except RemotedError as error:
            self._refuse(frame, "STORE_ERROR" if isinstance(error, StoreError) else "FAILED", str(error))
        except Exception as error:  # whatever it is: the others go on, and who asked must hear of it
            log.exception("cannot handle %r", frame.op[:40])
            self._refuse(frame, "FAILED", f"cannot handle {frame.op[:40]!r}: {type(error).__name__} in the daemon; its log says more")
        finally:
            frame.close()

    def _refuse(self, frame: wire.Frame, code: str, message: str) -> None:
        reference = {name: frame.header[name] for name in ("key", "id", "digest") if isinstance(frame.header.get(name), str)}
        self.send({"op": "refused", "about": frame.op[:40], "code": code, "message": message[:4000], **reference})

    def _refuse_and_close(self, code: str, message: str) -> None:
        self.send({"op": "refused", "about": "", "code": code, "message": message})
        self.close()

    # -- what clients ask ----------------------------------------------------------------------------------

    def _on_hello(self, frame: wire.Frame) -> None:
        if frame.header["protocol"] != wire.PROTOCOL:
            self._refuse_and_close("VERSION_MISMATCH", f"cannot talk: you speak protocol {frame.header['protocol']}, this daemon {wire.PROTOCOL}; install the same remoted on both sides")
            return
        self._greeted = True
        self._stop_timer()
        started = int(frame.header.get("started", 0))
        self._caller = json.dumps([self.peer.pid, started])
        self.send({"op": "welcome", "protocol": wire.PROTOCOL, "version": remoted.__version__, "pid": os.getpid(), "uid": os.geteuid()})

    async def _on_put(self, frame: wire.Frame) -> None:
        digest, role = str(frame.header["digest"]), str(frame.header["role"])
        contents = self._server.jobs.contents
        copy = frame._replace(fds=tuple(map(os.dup, frame.fds)))
        await contents.put(self.peer.uid, digest, role, copy, self._server.jobs.clock.wall())
        if role == "context":
            contents.hold(self.peer.uid, digest)
            self._secrets.append((self.peer.uid, digest))

    def _on_submit(self, frame: wire.Frame) -> None:
        request = _parse_request(frame)
        accepted = self._server.jobs.submit(self.peer, request, "" if request.options.detach else self._caller)
        output = bool(frame.header.get("output", True))
        self._submitting += 1
        accepted.add_done_callback(lambda done: self._accepted(request, output, done))

    def _accepted(self, request: Request, output: bool, done: asyncio.Future[str]) -> None:
        self._submitting -= 1
        error = done.exception()
        if error is not None:
            code = error.code if isinstance(error, Refused) else "STORE_ERROR"
            self.send({"op": "refused", "about": "submit", "key": request.key, "code": code, "message": str(error)[:4000]})
        else:
            self._acknowledge(request, output, done.result())
        if not self._open:
            self._leave_calls()

    def _acknowledge(self, request: Request, output: bool, job_id: str) -> None:
        call = self._server.jobs.calls.get(job_id)
        if call is not None and not request.options.detach:
            self._mine.add(call.id)
        if not self._open:
            return
        self.send({"op": "accepted", "key": request.key, "id": job_id})
        if call is not None:
            self._watch(call, output)
        else:
            self._loop.create_task(self._tell_finished(job_id))

    def _on_call(self, frame: wire.Frame) -> None:
        request = _parse_request(frame)
        call = self._server.direct.submit(self.peer, request, self._caller)
        self.send({"op": "accepted", "key": request.key, "id": call.id})
        self._mine.add(call.id)
        self._watch(call, bool(frame.header.get("output", True)))

    async def _on_watch(self, frame: wire.Frame) -> None:
        """Attach to a job of this user's, live or over: ``Job.from_id`` and a client that came back."""
        job_id = str(frame.header["id"])
        try:
            call = self._find(job_id)
        except NotFound:
            await self._tell_finished(job_id, int(frame.header.get("offset", 0)))
            return
        if frame.header.get("mine"):
            self._mine.add(call.id)
        for number, content in list(enumerate(call.items))[int(frame.header.get("items", 0)) :]:
            self.on_item(call, number, content)
        self._watch(call, bool(frame.header.get("output", True)), max(0, int(frame.header.get("offset", 0))))

    def _on_cancel(self, frame: wire.Frame) -> None:
        self._runner(str(frame.header["id"])).cancel(self._find(str(frame.header["id"])))

    def _on_waiting(self, frame: wire.Frame) -> None:
        for runner in (self._server.jobs, self._server.direct):
            runner.block(self.peer, str(frame.header["id"]), bool(frame.header["waiting"]))

    def _on_credit(self, frame: wire.Frame) -> None:
        with contextlib.suppress(NotFound):  # the stream may be over while the caller still reads
            call = self._find(str(frame.header["id"]))
            self._runner(call.id).credit(call, max(0, min(int(frame.header["items"]), 1 << 20)))

    def _on_close_stream(self, frame: wire.Frame) -> None:
        with contextlib.suppress(NotFound):
            call = self._find(str(frame.header["id"]))
            if call.worker is not None:
                call.worker.close_stream(call.token)

    def _on_hold(self, frame: wire.Frame) -> None:
        """This process uses a pool: its ``workers_min`` holds while the process lives and some time after."""
        spec = self._server.jobs.contents.spec(self.peer.uid, str(frame.header["spec"]))
        pool = (self.peer.uid, spec.pool.class_, spec.pool.name)
        if spec.pool.workers_min:
            self._server.jobs.engine.hold_pool(pool, spec.pool.keep_warm_seconds)

    def _on_drop_instance(self, frame: wire.Frame) -> None:
        for runner in (self._server.jobs, self._server.direct):
            runner.drop_instance(str(frame.header["instance"]))

    def _find(self, call_id: str) -> Call:
        return self._runner(call_id).find(self.peer, call_id)

    def _runner(self, call_id: str) -> Jobs | DirectCalls:
        return self._server.direct if call_id in self._server.direct.calls else self._server.jobs

    def _watch(self, call: Call, output: bool, offset: int = 0) -> None:
        call.watchers.add(self)
        self._watching.add(call)
        if output:
            self._followed[call.id] = offset
            self._pump_output(call)
        self.on_state(call)

    # -- what happens to their calls (Watcher) -------------------------------------------------------------

    def on_state(self, call: Call) -> None:
        if self._is_full():
            self._late.setdefault(call.id, call)
            return
        self.send({"op": "state", "id": call.id, "status": call.status.value, "reason": call.reason.value if call.reason else "", "worker": call.worker_id})

    def on_output(self, call: Call, stream: int, data: bytes, offset: int) -> None:
        """Straight on when the reader keeps up; else the log is read when it has caught up."""
        if self._followed.get(call.id) != offset or self._outbox_bytes > self._server.limits.outbox_bytes // 4:
            return
        if call.log.size == offset + logs.RECORD_OVERHEAD + len(data):
            self._send_output(call, stream, data, call.log.size)
        else:
            self._pump_output(call)

    def _send_output(self, call: Call, stream: int, data: bytes, behind: int) -> None:
        """One record of the log; ``behind`` is the offset from which a client that comes back goes on."""
        self._followed[call.id] = behind
        self._send_record(call.id, stream, data, behind)

    def _send_record(self, call_id: str, stream: int, data: bytes, behind: int) -> None:
        for start in range(0, len(data), _OUTPUT_CHUNK_BYTES):
            last = start + _OUTPUT_CHUNK_BYTES >= len(data)
            header = {"op": "output", "id": call_id, "stream": stream, **({"offset": behind} if last else {})}
            self.send(header, data[start : start + _OUTPUT_CHUNK_BYTES])

    def _pump_output(self, call: Call, path: Path | None = None) -> None:
        """Send what the log holds beyond this reader's offset, as far as there is room."""
        while self._open and call.id in self._followed and self._outbox_bytes < self._server.limits.outbox_bytes // 4:
            offset = self._followed[call.id]
            records, _ = logs.read_records(path or call.log.path, offset, _OUTPUT_CHUNK_BYTES)
            if not records:
                return
            for stream, data in records:
                offset += logs.RECORD_OVERHEAD + len(data)
                self._send_output(call, stream, data, offset)

    def on_item(self, call: Call, number: int, content: Content) -> None:
        self._send_content({"op": "item", "id": call.id, "number": number}, content)

    def on_done(self, call: Call) -> None:
        """Log and result of a direct call are gone after this; a reader that lags behind keeps its own descriptors."""
        result = call.result or Content("", b"", None)
        if self._followed.get(call.id, call.log.size) >= call.log.size:
            self._tell_done(call, result)
            return
        try:
            log_fd = os.open(call.log.path, os.O_RDONLY | os.O_CLOEXEC)
            kept = replace(result, fd=os.dup(result.fd)) if result.fd is not None else result
        except OSError as error:
            log.error("cannot keep the output of %s for its reader: %s", call.id, error)
            self._tell_done(call, result)
            return
        self._loop.create_task(self._finish_output(call, log_fd, kept))

    async def _finish_output(self, call: Call, log_fd: int, result: Content) -> None:
        """All of the output comes before the outcome, at the reader's pace."""
        try:
            while self._open and self._followed.get(call.id, call.log.size) < call.log.size:
                before = self._followed[call.id]
                self._pump_output(call, Path(f"/proc/self/fd/{log_fd}"))
                if self._followed.get(call.id) == before:
                    if not self._outbox_bytes:
                        break
                    await self._drained()
            self._tell_done(call, result)
        finally:
            os.close(log_fd)
            if result.fd is not None:
                os.close(result.fd)

    async def _drained(self) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._drain_waiters.append(future)
        await future

    def _tell_done(self, call: Call, result: Content) -> None:
        self._followed.pop(call.id, None)
        self._mine.discard(call.id)
        self._watching.discard(call)
        self._late.pop(call.id, None)
        durable = not call.spec.pool.load_balanced
        if durable and self._is_full():
            self._late[call.id] = None
            return
        # A direct result is nowhere else; it takes no more room than its call's arguments did.
        self._send_content(_done_header(call), result, bounded=durable)

    async def _tell_late(self) -> None:
        """There is room again: what waited for it, oldest first."""
        self._telling_late = True
        try:
            while self._late and self._open and not self._is_full():
                call_id = next(iter(self._late))
                call = self._late.pop(call_id)
                if call is None:
                    await self._tell_finished(call_id)
                else:
                    self.on_state(call)
        finally:
            self._telling_late = False

    async def _replay_output(self, job_id: str, offset: int) -> None:
        """What a finished job printed beyond ``offset``, at the reader's pace."""
        path = self._server.jobs.records.log_path(job_id)
        while self._open:
            records, end = logs.read_records(path, offset, _OUTPUT_CHUNK_BYTES)
            if not records:
                return
            for stream, data in records:
                offset += logs.RECORD_OVERHEAD + len(data)
                self._send_record(job_id, stream, data, offset)
            offset = end
            if self._outbox_bytes > self._server.limits.outbox_bytes // 4:
                await self._drained()

    async def _tell_finished(self, job_id: str, offset: int = 0) -> None:
        """The same, of a job that was over before anybody here asked."""
        try:
            row = await self._server.jobs.records.row(self.peer, job_id)
            await self._replay_output(job_id, offset)
            for number, content in enumerate(await self._server.jobs.records.stored_items(job_id)):
                self._send_content({"op": "item", "id": job_id, "number": number}, content)
        except RemotedError as error:
            self.send({"op": "refused", "about": "watch", "id": job_id, "code": "NOT_FOUND", "message": str(error)})
            return
        self._send_content(_done_header_of_row(row), self._server.jobs.records.stored_result(row))

    # -- writing -------------------------------------------------------------------------------------------

    def _send_content(self, header: dict[str, Any], content: Content, bounded: bool = True) -> None:
        try:
            if content.inline is not None:
                self.send(header, content.inline, bounded=bounded)
            else:
                self.send(header, fds=(content.open(),), bounded=bounded)
        except OSError as error:
            self.send({**header, "lost": f"cannot read the stored payload: {error}"})

    def _is_full(self) -> bool:
        return self._outbox_bytes > self._server.limits.outbox_bytes // 2

    def send(self, header: dict[str, Any], body: bytes = b"", fds: tuple[int, ...] = (), bounded: bool = True) -> None:
        """Queue one frame; what one turn of the loop produces leaves together. Closes the descriptors once sent."""
        if not self._open:
            wire.close_all(fds)
            return
        data = wire.encode(header, body, len(fds))
        self._outbox.append((data, fds))
        self._outbox_bytes += len(data) + _DESCRIPTOR_COST * len(fds)
        if bounded and self._outbox_bytes > self._server.limits.outbox_bytes:
            self.close()  # it does not even take its results; it may come back and ask
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
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
                self._on_eof()
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
        if self._late and self._open and not self._telling_late:
            self._loop.create_task(self._tell_late())

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

    def _on_eof(self) -> None:
        """The client closed, or died."""
        self.close()

    def _leave_calls(self) -> None:
        """Blocking calls end with their caller's process, not with its connection."""
        if self._submitting:
            return  # comes back here when the last of them is known
        mine = [call for call in map(self._lookup, self._mine) if call is not None]
        pidfd, self._pidfd = self._pidfd, None
        if not mine:
            if pidfd is not None:
                os.close(pidfd)
        elif pidfd is None:
            _cancel_orphans(self._server, mine)
        else:
            watch_caller(self._server, pidfd, mine)

    def owns(self, call: Call) -> bool:
        """Does this client wait for the call itself, rather than look on?"""
        return call.id in self._mine

    def _lookup(self, call_id: str) -> Call | None:
        return self._server.jobs.calls.get(call_id) or self._server.direct.calls.get(call_id)

    def close(self) -> None:
        """Idempotent: forget everything about this client but its jobs."""
        if not self._open:
            return
        with contextlib.suppress(OSError):
            while self._outbox and not self._outbox[0][1]:
                self._sock.send(self._outbox.popleft()[0])  # at the end stands a refusal that explains it
        self._open = False
        self._stop_timer()
        self._task.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._reader.close()
        for frame in self._inbox:
            frame.close()
        for _, fds in self._outbox:
            wire.close_all(fds)
        for call in self._watching:
            call.watchers.discard(self)
        self._watching.clear()
        self._late.clear()
        for uid, digest in self._secrets:
            self._server.jobs.contents.release(uid, digest)
        self._wake_drain_waiters()
        self._server.gone(self)
        self._leave_calls()


def watch_caller(server: DataServer, pidfd: int, calls: list[Call]) -> None:
    """Cancel these calls when their caller's process ends, unless another connection of it took them over."""
    _Caller(server, pidfd, calls)


class _Caller:
    """A process whose connection has gone while its calls run. A ``Watcher``, so that it ends with the last of them."""

    def __init__(self, server: DataServer, pidfd: int, calls: list[Call]) -> None:
        self._server, self._pidfd, self._calls = server, pidfd, set(calls)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._ended)
        for call in calls:
            call.watchers.add(self)

    def on_state(self, call: Call) -> None:
        pass

    def on_output(self, call: Call, stream: int, data: bytes, offset: int) -> None:
        pass

    def on_item(self, call: Call, number: int, content: Content) -> None:
        pass

    def on_done(self, call: Call) -> None:
        self._calls.discard(call)
        if not self._calls:
            self._close()

    def _ended(self) -> None:
        calls = list(self._calls)
        for call in calls:
            call.watchers.discard(self)
        self._close()
        _cancel_orphans(self._server, calls)

    def _close(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)


def _cancel_orphans(server: DataServer, calls: list[Call]) -> None:
    for call in calls:
        taken_over = any(isinstance(watcher, Connection) and watcher.owns(call) for watcher in call.watchers)
        if not call.status.is_terminal and not taken_over:
            runner: Jobs | DirectCalls = server.direct if call.id in server.direct.calls else server.jobs
            runner.cancel(call, Reason.CALLER_GONE)


def _parse_request(frame: wire.Frame) -> Request:
    """Raises KeyError, TypeError, BadRequest on anything that is not as it must be."""
    header = frame.header
    arguments = str(header.get("arguments", ""))
    instance = header.get("instance")
    if instance is not None and (len(instance) != 3 or not all(isinstance(part, str) for part in instance)):
        raise BadRequest("BAD_REQUEST", "cannot read the instance: it is not [id, method, constructor]")
    key = header["key"]
    if not isinstance(key, str) or not 8 <= len(key) <= 64:
        raise BadRequest("BAD_REQUEST", "cannot use the submission key: it must have 8 to 64 characters")
    return Request(
        key=key,
        spec=str(header["spec"]),
        code=str(header["code"]),
        modules=str(header["modules"]),
        context=str(header["context"]),
        arguments=arguments,
        arguments_inline=None if arguments else frame.body,
        options=parse_options(header.get("options", {})),
        parent=str(header.get("parent", "")),
        instance=tuple(instance) if instance else None,
    )


def _end_of(text: str) -> str:
    """As much of the end of a text as a header has room for: a letter may take up to six bytes there."""
    while len(text) * 6 > _TEXT_BYTES and (size := len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))) > _TEXT_BYTES:
        text = text[-(len(text) * _TEXT_BYTES // size) :]
    return text


def _done_header(call: Call) -> dict[str, Any]:
    return {
        "op": "done",
        "id": call.id,
        "status": call.status.value,
        "reason": call.reason.value if call.reason else "",
        "kind": call.result_kind,
        "error": _end_of(call.error),
        "error_type": call.error_type[:1000],
        "traceback": _end_of(call.traceback),
        "attempts": call.attempts,
        "worker": call.worker_id,
        "gpus": list(call.devices),
        "submitted_at": call.submitted_at,
        "started_at": call.started_at,
        "ended_at": call.ended_at,
        "run_seconds": call.run_seconds,
        "items": len(call.items),
        "reconstructed": call.reconstructed,
    }


def _done_header_of_row(row: Row) -> dict[str, Any]:
    return {
        "op": "done",
        "id": row["id"],
        "status": row["status"],
        "reason": row["state_reason"],
        "kind": row["result_kind"],
        "error": _end_of(row["error"]),
        "error_type": row["error_type"][:1000],
        "traceback": _end_of(row["traceback"]),
        "attempts": row["attempts"],
        "worker": row["worker"],
        "gpus": row["gpus"].split(),
        "submitted_at": row["submitted_at"],
        "started_at": row["started_at"],
        "ended_at": row["ended_at"],
        "run_seconds": row["run_seconds"],
        "items": row["items"],
        "reconstructed": bool(row["reconstructed"]),
    }


_Handler = Callable[[Connection, wire.Frame], Awaitable[None] | None]
_HANDLERS: dict[str, _Handler] = {
    "hello": Connection._on_hello,
    "put": Connection._on_put,
    "submit": Connection._on_submit,
    "call": Connection._on_call,
    "watch": Connection._on_watch,
    "cancel": Connection._on_cancel,
    "waiting": Connection._on_waiting,
    "credit": Connection._on_credit,
    "close_stream": Connection._on_close_stream,
    "hold": Connection._on_hold,
    "drop_instance": Connection._on_drop_instance,
}
