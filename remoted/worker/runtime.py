"""The life of a worker: greet the daemon, run one call after another, leave.

The main thread runs the bodies. A sync body runs outside the event loop, so that it may use ``asyncio.run``
itself; an async one runs on the one loop that lives as long as the worker (objects kept warm belong to it).
A second thread reads the channel: it takes orders while a body runs (cancel, credit for streams).

A call that runs *inside* a waiting body (a nested call, MECHANISMS 15) gets a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from remoted_client import codec, plain, wire
from remoted_client import context as client_context
from remoted_client.payload import PayloadWriter
from remoted_client.segments import Collector, Segment, SegmentPool

from .calls import Instances, Outcome, Run, as_iterator, is_async, raised, returned, shorten
from .context import CallContext
from .inbox import Inbox
from .lease import Lease
from .link import Link
from .streams import StandardStreams
from .window import Window

_END = object()
_NOTHING = contextlib.nullcontext()
_MODULES_SECONDS = 0.1
_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
#: What the worker itself puts into the environment of every call.
_OWN_VARIABLES = ("REMOTED_SOCKET", "REMOTED_WORKER_ID", "REMOTED_PYTHON", "CUDA_VISIBLE_DEVICES")


class Runtime:
    """Everything of one worker process."""

    def __init__(self, fd: int) -> None:
        self._link = Link(fd)
        self._streams = StandardStreams()
        self._loop = asyncio.new_event_loop()
        self._inbox = Inbox(self._loop)
        self._decoder = codec.Decoder()
        self._instances = Instances()
        self._contents: dict[str, bytes | int] = {}
        self._contexts: dict[str, CallContext] = {}
        self._modules: tuple[str, Any] | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._windows: dict[str, Window] = {}
        #: Why, by attempt.
        self._cancelled: dict[str, str] = {}
        self._unacknowledged: dict[str, tuple[Run, dict[str, Any], bytes | int]] = {}
        self._leases: dict[str, Lease] = {}
        self._segments = SegmentPool()
        #: Something may be going on there between two calls.
        self._loop_was_used = False
        self._sync_attempt = ""
        #: The code that was bound last, and whether it is asynchronous.
        self._asked, self._is_async = "", False
        self._output_path = ""
        self._base_path = list(sys.path)
        self._own = {name: os.environ[name] for name in _OWN_VARIABLES if name in os.environ}

    # -- orders from the daemon (channel thread) -----------------------------------------------------------

    def on_frame(self, frame: wire.Frame) -> None:
        handler: Callable[[wire.Frame], None] | None = {
            "content": self._on_content,
            "run": self._on_run,
            "lease": self._on_lease,
            "revoke": self._on_revoke,
            "cancel": self._on_cancel,
            "credit": self._on_credit,
            "close_stream": self._on_close_stream,
            "limits": self._on_limits,
            "ack": self._on_ack,
            "drop": lambda frame: self._inbox.put(("drop", frame.header["instance"])),
            "end": lambda frame: self._end(),
        }.get(frame.op)
        if handler is not None:
            handler(frame)

    def _on_content(self, frame: wire.Frame) -> None:
        self._learn(frame.header["digest"], frame.fds[0] if frame.fds else frame.body)

    def _learn(self, digest: str, content: bytes | int) -> None:
        self._contents[digest] = content

    def _on_lease(self, frame: wire.Frame) -> None:
        connection, page = frame.fds
        lease = Lease(frame.header, connection, page, self._learn, self._segments)
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
        header = frame.header
        run = Run(
            attempt=header["attempt"],
            job=header["job"],
            code=header["code"],
            modules=header["modules"],
            context=header["context"],
            stream=header["stream"],
            inline=header["inline"],
            outcome_path=header["outcome_path"],
            arguments=frame.fds[0] if frame.fds else frame.body,
            instance=header.get("instance"),
        )
        self._output_path = run.outcome_path.replace(".outcome", ".output")
        if run.stream:
            self._windows[run.attempt] = Window(header["window_items"], header["window_bytes"])
        if header["concurrent"]:
            self._streams.route(self._send_output)
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
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            self._loop.call_soon_threadsafe(self._cancel_task, attempt)

    def _cancel_task(self, attempt: str) -> None:
        task = self._tasks.get(attempt)
        if task is not None:
            task.cancel()

    def _on_credit(self, frame: wire.Frame) -> None:
        window = self._windows.get(frame.header["attempt"])
        if window is not None:
            window.give_back(frame.header["items"])

    def _on_close_stream(self, frame: wire.Frame) -> None:
        self._close_window(frame.header["attempt"])

    def _close_window(self, attempt: str) -> None:
        window = self._windows.get(attempt)
        if window is not None:
            window.close()

    def _on_limits(self, frame: wire.Frame) -> None:
        """User mode has rlimits only: private writable memory, not address space, which CUDA reserves by the terabyte."""
        limit = frame.header.get("data_bytes")
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(frame.header["descriptors"], most), most))

    def _on_ack(self, frame: wire.Frame) -> None:
        """The outcome is committed: nobody will ask for it again."""
        kept = self._unacknowledged.pop(frame.header["attempt"], None)
        if kept is not None and isinstance(kept[2], int):
            os.close(kept[2])

    def on_closed(self) -> None:
        """The daemon is gone: what runs is finished and left in its outcome file, then the worker ends."""
        self._streams.keep_output(self._output_path)
        self._end()

    # -- the main thread -----------------------------------------------------------------------------------

    def serve(self) -> None:
        """Greet, then run calls until told to end."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        _keep_orphans()
        asyncio.set_event_loop(self._loop)
        client_context.in_worker = True
        self._greet()
        threading.Thread(target=self._link.read_forever, args=(self.on_frame, self.on_closed), name="channel", daemon=True).start()
        while True:
            item = self._inbox.get(self._loop_was_used)
            if item is _END:
                break
            if isinstance(item, Run):
                self._dispatch(item)
            elif isinstance(item, Lease):
                self._serve_lease(item)
            else:
                self._drop_instance(item[1])
        self._finish_tasks()
        self._streams.finish_output()
        for run, header, payload in list(self._unacknowledged.values()):
            if run.outcome_path.endswith(".outcome"):
                self._leave_outcome(run, header, payload)

    def _greet(self) -> None:
        import cloudpickle

        self._link.send(
            {
                "op": "hello",
                "protocol": wire.PROTOCOL,
                "pid": os.getpid(),
                "python": list(sys.version_info[:3]),
                "cloudpickle": cloudpickle.__version__,
                "uids": list(os.getresuid()),
                "gids": list(os.getresgid()),
            }
        )

    def _on_interrupt(self, number: int, frame: Any) -> None:
        """SIGINT stops the sync body that was cancelled, and nothing else."""
        if self._sync_attempt and self._sync_attempt in self._cancelled:
            raise KeyboardInterrupt

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
            self._loop.run_until_complete(asyncio.wait(list(self._tasks.values())))

    def _drop_instance(self, instance: str) -> None:
        with contextlib.suppress(Exception):  # a user's close() may fail; the instance is gone all the same
            self._instances.drop(instance)

    # -- leases --------------------------------------------------------------------------------------------

    def _serve_lease(self, lease: Lease) -> None:
        """The main thread reads the client's connection itself: an answer is one receive and one send away."""
        lease.grant()
        while (run := self._next_call(lease)) is not None:
            self._dispatch(run)
            self._finish_tasks()
        self._close_lease(lease)

    def _next_call(self, lease: Lease) -> Run | None:
        """Meanwhile the loop runs what warm objects left on it."""
        if self._loop_was_used and not lease.has_frames and asyncio.all_tasks(self._loop):
            self._loop.run_until_complete(self._readable(lease))
        return lease.next_call()

    async def _readable(self, lease: Lease) -> None:
        arrived = asyncio.Event()
        self._loop.add_reader(lease.fileno(), arrived.set)
        try:
            await arrived.wait()
        finally:
            self._loop.remove_reader(lease.fileno())

    def _read_lease(self, lease: Lease) -> None:
        """Several leases at once: each has a thread that reads, and the main thread runs the bodies."""
        lease.grant()
        while (run := lease.next_call()) is not None:
            run.answered = threading.Event()
            self._inbox.put(run)
            run.answered.wait()
        self._close_lease(lease)

    def _close_lease(self, lease: Lease) -> None:
        self._leases.pop(lease.token, None)
        lease.close()
        self._link.send({"op": "lease_ended", "attempt": lease.token, "kind": "stale" if lease.is_stale else "ended", "message": ""})

    # -- preparing -----------------------------------------------------------------------------------------

    def _prepare(self, run: Run) -> Any:
        """The callable without arguments left, or the outcome if it cannot be made; its caller's surroundings in place."""
        try:
            with self._surroundings(run):
                self._install_modules(run)
                return self._bind(run)
        except BaseException as error:
            if type(error).__name__ == "StaleModules":
                return Outcome("stale", message=str(error))
            return raised(error, self._survives, run.attempt in self._cancelled)

    def _install_modules(self, run: Run) -> None:
        """At every call: a module that a body imported from disk may have been edited since (it is then stale)."""
        if self._modules is None or self._modules[0] != run.modules:
            found = codec.ModuleSet.from_bytes(self._content(run.modules)) if run.modules else codec.ModuleSet()
            self._modules = (run.modules, found)
        # A lease is one run of one script: it goes on with what it has imported, like any script.
        codec.install_modules(self._modules[1], _MODULES_SECONDS if run.number > 1 else 0.0)

    def _content(self, digest: str) -> bytes:
        found = self._contents[digest]
        if isinstance(found, int):
            with open(found, "rb") as file:
                found = self._contents[digest] = file.read()
        return found

    def _surroundings(self, run: Run) -> contextlib.AbstractContextManager[None]:
        """For good, unless other bodies are at work: those get theirs back."""
        if run.context not in self._contexts:
            self._contexts[run.context] = CallContext(json.loads(self._content(run.context)))
        context = self._contexts[run.context]
        if run.inline or self._tasks:
            return context.applied(self._own, self._base_path)
        context.apply(self._own, self._base_path)
        return _NOTHING

    def _bind(self, run: Run) -> _Bound:
        target: Any = self._decoder.load_target(self._content(run.code), run.code)
        if run.instance is not None:
            target, run.instance["constructed"] = self._instances.method(run.instance, lambda: self._construct(target, run))
        if run.instance is not None or self._asked != run.code:
            self._asked, self._is_async = run.code, is_async(target)
        args, kwargs = self._load_arguments(run)
        return _Bound(target, self._is_async, args, kwargs)

    def _construct(self, kind: Any, run: Run) -> Any:
        assert run.instance is not None
        args, kwargs = self._decoder.load_arguments(self._content(run.instance["constructor"]))
        return kind(*args, **kwargs)

    def _load_arguments(self, run: Run) -> Any:
        source, buffers = run.arguments, run.buffers
        run.buffers = None  # gigabytes of arguments must not outlive the body's own use
        if isinstance(source, bytes):
            return plain.loads(source) if run.is_plain else self._decoder.load_arguments(source, buffers)
        with open(source, "rb") as file:
            file.seek(0)  # the offset is the sender's
            return self._decoder.load_arguments(file, buffers)

    def _survives(self, value: Any) -> bool:
        """Can the value be sent home and rebuilt there?"""
        import io

        try:
            buffer = io.BytesIO()
            self._decoder.encode_result(value, buffer)
            rebuilt = self._decoder.load_result(buffer.getvalue())
        except Exception:
            return False
        return type(rebuilt) is type(value)

    # -- running -------------------------------------------------------------------------------------------

    def _run_sync(self, run: Run, call: _Bound) -> None:
        self._finish(run, self._execute_sync(run, call))

    def _execute_sync(self, run: Run, call: _Bound) -> Outcome:
        token = self._enter(run)
        try:
            self._sync_attempt = run.attempt
            try:
                if run.attempt in self._cancelled:
                    raise KeyboardInterrupt
                value = call()
                return self._stream_sync(run, value) if run.stream else returned(value)
            finally:
                self._sync_attempt = ""
        except BaseException as error:
            return raised(error, self._survives, run.attempt in self._cancelled)
        finally:
            self._leave(run, token)

    def _start_task(self, run: Run, call: _Bound) -> None:
        self._loop_was_used = True
        task = self._loop.create_task(self._run_async(run, call))
        self._tasks[run.attempt] = task
        task.add_done_callback(lambda _: self._tasks.pop(run.attempt, None))

    async def _run_async(self, run: Run, call: _Bound) -> None:
        self._finish(run, await self._execute_async(run, call))

    async def _execute_async(self, run: Run, call: _Bound) -> Outcome:
        token = self._enter(run)
        try:
            value = call()
            return await self._stream_async(run, value) if run.stream else returned(await value)
        except BaseException as error:
            return raised(error, self._survives, run.attempt in self._cancelled)
        finally:
            self._leave(run, token)

    def _run_inline(self, run: Run) -> None:
        """In a thread of its own, beside the body that waits for it."""
        prepared = self._prepare(run)
        if isinstance(prepared, Outcome):
            self._finish(run, prepared)
        elif not prepared.is_async:
            self._finish(run, contextvars.copy_context().run(self._execute_beside, run, prepared))
        elif self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._run_async(run, prepared), self._loop)
        else:
            asyncio.run(self._run_async(run, prepared))

    def _execute_beside(self, run: Run, call: _Bound) -> Outcome:
        """A sync body that is no main-thread body: its surroundings are its parent's already."""
        token = client_context.current.set(run.running)
        try:
            value = call()
            return self._stream_sync(run, value) if run.stream else returned(value)
        except BaseException as error:
            return raised(error, self._survives, run.attempt in self._cancelled)
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
                    break
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()  # GeneratorExit at the yield where the caller left
        return returned(None)

    async def _stream_async(self, run: Run, value: Any) -> Outcome:
        items = as_iterator(value)
        number = 0
        try:
            async for item in items:  # type: ignore[union-attr]
                sent = await asyncio.to_thread(self._send_item, run, number, item)
                number += 1
                if not sent:
                    break
        finally:
            aclose = getattr(items, "aclose", None)
            if aclose is not None:
                await aclose()
        return returned(None)

    def _send_item(self, run: Run, number: int, item: Any) -> bool:
        """Waits until the caller has read enough of what was sent. False when it wants no more."""
        payload = self._encode(item)
        size = len(payload) if isinstance(payload, bytes) else os.fstat(payload).st_size
        if not self._windows[run.attempt].take(size):
            _close_payload(payload)
            return False
        return self._link.send_payload({"op": "item", "attempt": run.attempt, "number": number}, payload)

    # -- outcomes ------------------------------------------------------------------------------------------

    def _encode(self, value: Any, buffers: Collector | None = None) -> bytes | int:
        """The value, pickled: bytes while small, else a memfd (it may be larger than half of the memory)."""
        writer = PayloadWriter()
        try:
            self._decoder.encode_result(value, cast("BinaryIO", writer), buffer_callback=buffers)
        except BaseException:
            writer.abandon()
            raise
        return writer.take()

    def _finish(self, run: Run, outcome: Outcome) -> None:
        """Flush, encode, tell; what cannot be encoded becomes an error that names it."""
        self._streams.flush()
        if run.lease is not None and outcome.kind == "returned" and (data := plain.dumps(outcome.value)) is not None:
            self._answer(run.lease, run, {"plain": True}, data)
            return
        if run.lease is None:
            self._streams.restore()
            self._windows.pop(run.attempt, None)
        collector = Collector() if run.lease is not None else None
        try:
            payload = self._encode(outcome.value, collector)
            segment = self._segments.pack(collector.buffers) if collector is not None and collector.buffers else None
        except BaseException as error:
            outcome = raised(error, self._survives, run.attempt in self._cancelled)
            outcome.kind = "unsendable"
            payload, segment = self._encode(outcome.value), None
        outcome.value = None
        if run.lease is None:
            self._cancelled.pop(run.attempt, None)
            self._tell_daemon(run, outcome, payload)
            return
        header = {} if outcome.kind == "returned" else {"why": self._cancelled.get(run.attempt, ""), **_described(outcome)}
        if segment is not None and collector is not None:
            header["segment"], header["buffers"] = segment.number, len(collector.buffers)
        collector = None  # what it holds is gone before the caller hears what is
        if outcome.kind == "stale":
            run.lease.is_stale = True
            run.lease.revoke()
        self._answer(run.lease, run, header, payload, segment)

    def _answer(self, lease: Lease, run: Run, header: dict[str, Any], payload: bytes | int, segment: Segment | None = None) -> None:
        """To the client; by the daemon goes only that all of the output is out."""
        self._cancelled.pop(run.attempt, None)
        if self._streams.take_printed():
            self._link.send({"op": "mark", "attempt": lease.token, "number": run.number})
            header["printed"] = True
        lease.answer(run.number, header, payload, segment)
        self._streams.restore_soon()  # while the caller reads the answer
        if run.answered is not None:
            run.answered.set()

    def _tell_daemon(self, run: Run, outcome: Outcome, payload: bytes | int) -> None:
        constructed = bool(run.instance and run.instance.get("constructed"))
        header = {"op": "done", "attempt": run.attempt, "exit_code": outcome.exit_code, "constructed": constructed, **_described(outcome)}
        # Kept until the daemon has committed it: what lies unread in a dead daemon's socket is lost.
        self._unacknowledged[run.attempt] = (run, header, payload if isinstance(payload, bytes) else os.dup(payload))
        self._link.send_payload(header, payload)

    def _leave_outcome(self, run: Run, header: dict[str, Any], payload: bytes | int) -> None:
        """No daemon: the next one finds the outcome as a file, whole or not at all."""
        part = f"{run.outcome_path}.part"
        head = json.dumps(header).encode()
        source: BinaryIO = io.BytesIO(payload) if isinstance(payload, bytes) else open(payload, "rb")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as target, source:
            source.seek(0)
            target.write(len(head).to_bytes(4, "big") + head)
            while chunk := source.read(1 << 20):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        os.rename(part, run.outcome_path)


def _described(outcome: Outcome) -> dict[str, Any]:
    return {
        "kind": outcome.kind,
        "error_type": outcome.error_type[:1000],
        "message": shorten(outcome.message, 16 * 1024),
        "traceback": shorten(outcome.traceback, 24 * 1024, keep_end=True),
    }


def _close_payload(payload: bytes | int) -> None:
    if isinstance(payload, int):
        os.close(payload)


class _Bound:
    """A call with its arguments, ready to be made once."""

    def __init__(self, function: Any, is_async: bool, args: Any, kwargs: Any) -> None:
        self._function = function
        self.is_async = is_async
        self._args, self._kwargs = args, kwargs

    def __call__(self) -> Any:
        args, kwargs = self._args, self._kwargs
        self._args, self._kwargs = (), {}  # gigabytes of arguments must not outlive the body's own use
        return self._function(*args, **kwargs)


def _keep_orphans() -> None:
    """What a body leaves behind stays below this process, where the daemon finds it whatever it does (MECHANISMS 5).

    Dead orphans stay zombies until the worker ends: nobody here can tell them from children a body will wait for.
    """
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main(fd: int) -> None:
    """Entry of ``worker.pyz``: ``fd`` is the channel."""
    runtime = Runtime(fd)
    runtime.serve()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    # Threads that a body left behind must not keep a worker that was told to end.
    os._exit(0)


