"""The life of a worker: greet the daemon, run one call after another, leave.

The main thread runs the bodies. A sync body runs outside the event loop, so that it may use ``asyncio.run``
itself; an async one runs on the one loop that lives as long as the worker (objects kept warm belong to it).
A second thread reads the channel while a body runs (cancel, credit for streams); the main thread reads it itself while it is idle.

A call that runs *inside* a waiting body (a nested call, MECHANISMS 15) gets a thread of its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from remoted_client import codec, wire
from remoted_client import context as client_context
from remoted_client.segments import SegmentPool

from . import preflight
from .calls import Outcome, Run, as_iterator, returned
from .given import Given
from .inbox import Inbox
from .lease import Lease
from .link import Link
from .loop import WarmLoop
from .outcomes import Reporter, close_payload
from .preparing import Bound, Preparer
from .streams import StandardStreams
from .window import Window

if TYPE_CHECKING:
    import asyncio

_END, _DROP = object(), object()
_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h


class Runtime:
    """Everything of one worker process."""

    def __init__(self, fd: int) -> None:
        self._link = Link(fd)
        self._streams = StandardStreams()
        self._loop = WarmLoop()
        self._segments = SegmentPool()
        decoder = codec.Decoder()
        self._preparer = Preparer(decoder)
        self._instances = self._preparer.instances
        self._reporter = Reporter(self._link, self._streams, decoder, self._segments)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._given = Given()
        self._windows: dict[str, Window] = {}
        self._leases: dict[str, Lease] = {}
        self._inbox = Inbox(self._loop, self._link, self._leases)
        #: Why, by attempt.
        self._cancelled: dict[str, str] = {}
        self._sync_attempt = ""
        #: Which of them the SIGINT that is under way is for.
        self._interrupting = ""
        #: Where output goes when no daemon is there, and whether anybody will ask for that of the newest call.
        self._spool, self._is_kept = -1, False
        self._handlers = self._all_handlers()

    # -- orders from the daemon (whoever reads the channel) -----------------------------------------------------------

    def _all_handlers(self) -> dict[str, Callable[[wire.Frame], None]]:
        return {
            "content": self._on_content,
            "run": self._on_run,
            "lease": self._on_lease,
            "revoke": self._on_revoke,
            "cancel": self._on_cancel,
            "recall": self._on_recall,
            "go_on": lambda frame: self._reporter.go_on(frame.header["attempt"]),
            "credit": self._on_credit,
            "close_stream": self._on_close_stream,
            "limits": self._on_limits,
            "ack": self._on_ack,
            "drop": lambda frame: self._instances.tell_drop(frame.header["instance"], lambda: self._inbox.put(_DROP)),
            "adopt": self._on_adopt,
            "forget_item": lambda frame: self._reporter.forget_item(frame.header["attempt"], frame.header["number"]),
            "end": lambda frame: self._end(),
        }

    def on_frame(self, frame: wire.Frame) -> None:
        handler = self._handlers.get(frame.op)
        if handler is not None:
            handler(frame)

    def _on_content(self, frame: wire.Frame) -> None:
        self._preparer.learn(frame.header["digest"], frame.fds[0] if frame.fds else frame.body)

    def _on_lease(self, frame: wire.Frame) -> None:
        connection, page = frame.fds
        lease = Lease(frame.header, connection, page, self._preparer.learn, self._segments)
        self._leases[lease.token] = lease
        if lease.is_concurrent:
            self._streams.route(self._send_output)
            threading.Thread(target=self._read_lease, args=(lease,), name="lease", daemon=True).start()
        else:
            self._inbox.put(lease)

    def _on_revoke(self, frame: wire.Frame) -> None:
        lease = self._leases.get(frame.header["attempt"])
        if lease is not None:
            lease.revoke()

    def _end(self) -> None:
        """What runs is finished, what is queued too; leases take no more calls."""
        for lease in list(self._leases.values()):
            lease.revoke()
        self._inbox.put(_END)

    def _on_run(self, frame: wire.Frame) -> None:
        for (attempt, job, position), body in wire.calls_of(frame):
            self._take(frame.header, attempt, job, position, frame.fds[0] if frame.fds else body)

    def _take(self, header: dict[str, Any], attempt: str, job: str, position: int, arguments: bytes | int) -> None:
        run = Run(
            attempt=attempt,
            job=job,
            code=header["code"],
            modules=header["modules"],
            context=header["context"],
            stream=header["stream"],
            inline=header["inline"],
            is_kept=header["kept"],
            arguments=arguments,
            position=position,
            is_concurrent=header["concurrent"],
            instance=dict(header["instance"]) if "instance" in header else None,
            is_raw=header["raw"],
            is_plain=header["plain"],
        )
        if run.stream:
            self._windows[run.attempt] = Window(header["window_items"], header["window_bytes"])
        if run.is_concurrent:
            self._streams.route(self._send_output)
        self._given.add(run)
        if run.inline:
            threading.Thread(target=self._run_inline, args=(run,), name=f"nested-{run.job}").start()
        else:
            self._inbox.put(run)

    def _send_output(self, attempt: str, stream: int, data: bytes) -> None:
        self._streams.note_printed()
        self._link.send({"op": "output", "attempt": attempt.partition("/")[0], "stream": stream}, data)

    def _on_cancel(self, frame: wire.Frame) -> None:
        attempt = frame.header["attempt"]
        self._cancelled[attempt] = frame.header["why"]
        self._close_window(attempt)
        if self._sync_attempt == attempt:
            self._interrupting = attempt
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        elif self._loop.made is not None:
            self._loop.made.call_soon_threadsafe(self._cancel_task, attempt)

    def _on_recall(self, frame: wire.Frame) -> None:
        taken = self._given.recall(frame.header["attempts"])
        if taken:
            self._link.send({"op": "recalled", "attempts": taken})

    def _cancel_task(self, attempt: str) -> None:
        """One that has not begun looks for itself: a task that is cancelled before its first step runs nothing, not even its end."""
        task = self._tasks.get(attempt)
        if task is not None and any(running.attempt == attempt for running in client_context.sole):
            task.cancel()

    def _on_credit(self, frame: wire.Frame) -> None:
        window = self._windows.get(frame.header["attempt"])
        if window is not None:
            window.give_back(frame.header["items"])

    def _on_close_stream(self, frame: wire.Frame) -> None:
        self._close_window(frame.header["attempt"])

    def _close_window(self, attempt: str) -> None:
        lease = self._leases.get(attempt.partition("/")[0])
        window = self._windows.get(attempt) if lease is None else lease.window
        if window is not None:
            window.close()

    def _on_limits(self, frame: wire.Frame) -> None:
        """User mode has rlimits only: private writable memory, not address space, which CUDA reserves by the terabyte."""
        if "uid" in frame.header:
            preflight.require(frame.header)
        page, outcomes, self._spool = frame.fds
        self._given.open(page)
        self._reporter.leave_in(outcomes)
        self._reporter.refusals.watch(str(frame.header["refusals_file"]), int(frame.header["tasks"]))
        limit = frame.header.get("data_bytes")
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(frame.header["descriptors"], most), most))

    def _on_ack(self, frame: wire.Frame) -> None:
        for attempt in frame.header["attempts"]:
            self._reporter.acknowledged(attempt)

    def _on_adopt(self, frame: wire.Frame) -> None:
        """Another daemon holds the other end. What runs is noted before the outcomes are repeated: nothing is missing from both."""
        running, waiting = self._given.look()
        nonce = frame.header["nonce"]
        self._reporter.repeat()
        for lease in list(self._leases.values()):
            lease.show(self._link.send, nonce)
            if lease.token not in self._leases:  # it has ended meanwhile: said once more, behind this
                self._link.send(lease.ending)
        self._greet(nonce=nonce, running=running, waiting=waiting, instances=self._instances.names(), drops=self._instances.drops)

    def on_closed(self) -> None:
        """The daemon is gone: what runs is finished and left in its outcome file, then the worker ends."""
        self._given.close()
        self._reporter.go_on()
        self._streams.keep_output(self._spool if self._is_kept else -1)
        for window in list(self._windows.values()):
            window.close()  # nobody will read on
        self._end()

    # -- the main thread -----------------------------------------------------------------------------------

    def serve(self) -> None:
        """Greet, then run calls until told to end."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        _keep_orphans()
        client_context.in_worker = True
        self._link.read_once(self.on_frame)  # its limits, and who it shall be
        self._greet()
        self._link.listen(self.on_frame, self.on_closed)
        while True:
            item = self._inbox.get()
            if item is _END:
                break
            if isinstance(item, Run) and item.lease is not None:
                self._dispatch(item)
            elif isinstance(item, Run):
                self._run_given(item)
            elif isinstance(item, Lease):
                self._serve_lease(item)
            else:
                self._instances.drop_next()
        self._finish_tasks()
        self._streams.finish_output()
        self._reporter.leave_behind()

    def _greet(self, **more: Any) -> None:
        import cloudpickle

        header = {"op": "hello", "protocol": wire.PROTOCOL, "pid": os.getpid(), "python": list(sys.version_info[:3]), "cloudpickle": cloudpickle.__version__}
        self._link.send({**header, "uids": list(os.getresuid()), "gids": list(os.getresgid()), **more})

    def _on_interrupt(self, number: int, frame: Any) -> None:
        """Ours stops the sync body that was cancelled and no later one; any other is the running body's, as without a daemon."""
        ours, self._interrupting = self._interrupting, ""
        if self._sync_attempt and ours in ("", self._sync_attempt):
            raise KeyboardInterrupt
        if not ours and (task := self._running_task()) is not None:
            task.cancel()  # as asyncio.run does

    def _running_task(self) -> asyncio.Task[Any] | None:
        """Of an async body that is at work in this moment."""
        task = self._loop.running_task()
        return task if task in self._tasks.values() else None

    def _run_given(self, run: Run) -> None:
        """The next of the daemon's calls, unless it was taken back; without concurrency nothing else begins beside it."""
        if not self._begin(run):
            return
        self._dispatch(run)
        if not run.is_concurrent:
            self._finish_tasks()

    def _begin(self, run: Run) -> bool:
        if not self._given.begin(run):
            self._windows.pop(run.attempt, None)
            if isinstance(run.arguments, int):
                os.close(run.arguments)
            return False
        self._is_kept = run.is_kept
        return True

    def _dispatch(self, run: Run) -> None:
        prepared = self._prepare(run)
        if isinstance(prepared, Outcome):
            self._finish(run, prepared)
        elif prepared.is_async:
            self._start_task(run, prepared)
        else:
            self._finish_tasks()
            self._run_sync(run, prepared)

    def _finish_tasks(self) -> None:
        if self._tasks:
            self._loop.finish(list(self._tasks.values()))

    # -- leases --------------------------------------------------------------------------------------------

    def _serve_lease(self, lease: Lease) -> None:
        """The main thread reads the client's connection itself: an answer is one receive and one send away."""
        lease.grant()
        while (run := self._next_call(lease)) is not None:
            self._instances.catch_up(run)
            self._dispatch(run)
            self._finish_tasks()
        self._close_lease(lease)

    def _next_call(self, lease: Lease) -> Run | None:
        """Meanwhile the loop runs what warm objects left on it."""
        if not lease.has_frames and self._loop.has_work():
            self._loop.run(self._loop.readable(lease.fileno()))
        return lease.next_call()

    def _read_lease(self, lease: Lease) -> None:
        """Several leases at once: each has a thread that reads, and the main thread runs the bodies."""
        lease.grant()
        while (run := lease.next_call()) is not None:
            run.answered = threading.Event()
            self._instances.await_drops(run)
            self._inbox.put(run)
            run.answered.wait()
        self._close_lease(lease)

    def _close_lease(self, lease: Lease) -> None:
        self._leases.pop(lease.token, None)
        lease.close()
        self._link.send(lease.ending)

    # -- running -------------------------------------------------------------------------------------------

    def _prepare(self, run: Run) -> Bound | Outcome:
        """The callable without arguments left, or the outcome if it cannot be made."""
        try:
            return self._preparer.prepare(run, others_run=bool(self._tasks))
        except BaseException as error:
            if type(error).__name__ == "StaleModules":
                return Outcome("stale", message=str(error))
            return self._raised(run, error)

    def _raised(self, run: Run, error: BaseException) -> Outcome:
        return self._reporter.raised(error, self._cancelled.get(run.attempt, ""))

    def _finish(self, run: Run, outcome: Outcome) -> None:
        self._windows.pop(run.attempt, None)
        if outcome.kind != "lost":  # without an outcome the next daemon says so
            self._reporter.report(run, outcome, self._cancelled.pop(run.attempt, ""))
        self._given.end(run.attempt)

    def _run_sync(self, run: Run, call: Bound) -> None:
        self._loop.offer()
        self._finish(run, self._execute_sync(run, call))

    def _execute_sync(self, run: Run, call: Bound) -> Outcome:
        token = self._enter(run)
        try:
            self._sync_attempt = run.attempt
            try:
                self._require_wanted(run)
                value = call()
                return self._stream_sync(run, value) if run.stream else returned(value)
            finally:
                self._sync_attempt = ""
        except BaseException as error:
            return self._raised(run, error)
        finally:
            self._leave(run, token)

    def _require_wanted(self, run: Run) -> None:
        """It may have been cancelled on its way here."""
        if run.attempt in self._cancelled:
            raise KeyboardInterrupt

    def _start_task(self, run: Run, call: Bound) -> None:
        task = self._tasks[run.attempt] = self._loop.start(self._run_async(run, call))
        task.add_done_callback(lambda _: self._tasks.pop(run.attempt, None))

    async def _run_async(self, run: Run, call: Bound) -> None:
        self._finish(run, await self._execute_async(run, call))

    async def _execute_async(self, run: Run, call: Bound) -> Outcome:
        token = self._enter(run)
        try:
            self._require_wanted(run)
            value = call()
            return await self._stream_async(run, value) if run.stream else returned(await value)
        except BaseException as error:
            return self._raised(run, error)
        finally:
            self._leave(run, token)

    def _run_inline(self, run: Run) -> None:
        """In a thread of its own, beside the body that waits for it."""
        if not self._begin(run):
            return
        prepared = self._prepare(run)
        if isinstance(prepared, Outcome):
            self._finish(run, prepared)
        elif not prepared.is_async:
            self._finish(run, contextvars.copy_context().run(self._execute_beside, run, prepared))
        else:
            self._loop.run_beside(self._run_async(run, prepared))

    def _execute_beside(self, run: Run, call: Bound) -> Outcome:
        """A sync body that is no main-thread body: its surroundings are its parent's already."""
        token = client_context.current.set(run.running)
        try:
            value = call()
            return self._stream_sync(run, value) if run.stream else returned(value)
        except BaseException as error:
            return self._raised(run, error)
        finally:
            client_context.current.reset(token)

    def _enter(self, run: Run) -> contextvars.Token[Any]:
        client_context.sole.append(run.running)
        return client_context.current.set(run.running)

    def _leave(self, run: Run, token: contextvars.Token[Any]) -> None:
        client_context.current.reset(token)
        client_context.sole.remove(run.running)

    # -- streams -------------------------------------------------------------------------------------------

    def _stream_sync(self, run: Run, value: Any) -> Outcome:
        items = as_iterator(value)
        if not hasattr(items, "__next__"):
            raise TypeError("cannot stream the result: a plain generator function returned an async iterator")
        try:
            for number, item in enumerate(items):  # type: ignore[arg-type]
                if not self._send_item(run, number, item):
                    return self._left(run)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()  # GeneratorExit at the yield where the caller left
        return returned(None)

    async def _stream_async(self, run: Run, value: Any) -> Outcome:
        from asyncio import to_thread

        items = as_iterator(value)
        number = 0
        try:
            async for item in items:  # type: ignore[union-attr]
                sent = await to_thread(self._send_item, run, number, item)
                number += 1
                if not sent:
                    return self._left(run)
        finally:
            aclose = getattr(items, "aclose", None)
            if aclose is not None:
                await aclose()
        return returned(None)

    def _left(self, run: Run) -> Outcome:
        """Nobody takes more items: the caller has left its loop or cancelled the call, or the daemon is gone and the rest with it."""
        self._require_wanted(run)
        return Outcome("lost") if self._link.closed and run.lease is None else returned(None)

    def _send_item(self, run: Run, number: int, item: Any) -> bool:
        """Waits until the caller has read enough of what was sent. False when it wants no more."""
        if run.lease is not None:
            return self._reporter.send_item(run, run.lease, item)
        payload = self._reporter.encode_for(run, item)
        size = len(payload) if isinstance(payload, bytes) else os.fstat(payload).st_size
        if not self._windows[run.attempt].take(size):
            close_payload(payload)
            return False
        return self._reporter.tell_item(run, number, payload)


def _keep_orphans() -> None:
    """What a body leaves behind stays below this process, where the daemon finds it whatever it does (MECHANISMS 5).

    Dead orphans stay zombies until the worker ends: nobody here can tell them from children a body will wait for.
    """
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main(fd: int, before_greeting: Callable[[], None] = lambda: None) -> None:
    """Entry of ``worker.pyz``: ``fd`` is the channel."""
    runtime = Runtime(fd)
    before_greeting()
    runtime.serve()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    # Threads that a body left behind must not keep a worker that was told to end.
    os._exit(0)


