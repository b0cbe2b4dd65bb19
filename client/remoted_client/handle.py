"""The object that a call gives: awaitable, and just as usable without asyncio.

It is a ``collections.abc.Coroutine``, so ``asyncio.run``, ``create_task`` and ``TaskGroup`` take it. Awaiting it
twice gives the same result; never awaiting it gives no warning. The call has begun when the handle exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from remoted_client import connection, context, failure, parcel, plain, segments
from remoted_client.call_state import CallState, payload_of
from remoted_client.errors import RemoteExecutionError, for_code, for_outcome
from remoted_client.output import JobOutput, from_done
from remoted_client.suggest import bad_value, check_amount, check_type
from remoted_client.unread import drop
from remoted_client.wire import Frame, Status

T_co = TypeVar("T_co", covariant=True)
Item = TypeVar("Item")
_ID_DIGITS = 32
_NOTHING = contextlib.nullcontext()


class Handle(Coroutine[Any, Any, T_co], Generic[T_co]):
    """One call that was started.

    Example:
        >>> h = train(data)            # started
        >>> h.id, h.status(), h.done()
        >>> result = h.result()        # or: await h
    """

    _value: Any = None
    _steps: dict[Any, Generator[Any, Any, T_co]] | None = None

    def __init__(self, state: CallState) -> None:
        self._state = state
        if state.is_durable:
            state.handle = weakref.ref(self)
        self._lock = threading.Lock()
        self._read = False
        self._failure: BaseException | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state.name} {self._state.id or '(not sent yet)'} {self._state.status}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a handle belongs to its process; send handle.id, and use Job.from_id(id) there")

    if not TYPE_CHECKING:  # a type checker knows what a handle has

        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise AttributeError(f"a {type(self).__name__} has no {name!r}: {_not_yet(self)}.{name}", name=name, obj=self)

        def __getitem__(self, key):
            raise TypeError(f"cannot look into a {type(self).__name__}: {_not_yet(self)}[...]")

        def __len__(self):
            raise TypeError(f"a {type(self).__name__} has no length: {_not_yet(self)}")

        def __bool__(self):
            return True

    # -- without asyncio -----------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The job's id; waits until the daemon has acknowledged the call. Raises what refused it."""
        self._state.wait(lambda: self._state.accepted or self._state.is_over, None)
        if not self._state.id and self._state.error is not None:
            self._state.was_awaited = True
            raise self._state.error
        return self._state.id

    def result(self, timeout: float | None = None) -> T_co:
        """Wait for the end: a ``JobOutput`` on queue classes, the value (or its exception) on load-balanced ones.

        Raises TimeoutError after ``timeout`` seconds; the call goes on. Ctrl-C cancels the call, unless it is detached.
        """
        if timeout is not None:
            check_amount("timeout", timeout, zero=True)
        state = self._state
        state.was_awaited = True
        try:
            if context.in_worker:
                with _waiting_in_body(state):
                    is_over = state.wait_and_tell(self._is_over, timeout, state.is_stream)
            else:
                is_over = state.wait_and_tell(self._is_over, timeout, state.is_stream)
            if not is_over:
                raise TimeoutError(f"{state.name} is not over after {timeout:g} s; it goes on")
        except KeyboardInterrupt:
            self._abandon()
            raise
        return self._outcome()

    def done(self) -> bool:
        """Is it over?"""
        self._state.look()
        return self._state.is_over

    def status(self) -> Status:
        """The newest known status. Raises what refused the call."""
        self._state.look()
        if self._state.outgoing is None and not self._state.known:
            self._state.wait(lambda: self._state.known or self._state.is_over, None)
        if self._state.error is not None:
            self._state.was_awaited = True
            raise self._state.error
        return self._state.status

    def state_reason(self) -> str:
        """Why it waits, e.g. ``WAITING_GPU``; "" while it runs."""
        return self._state.reason

    def reconstructed(self) -> bool:
        """Was the instance whose method this called constructed again for it? Then its state was lost with its worker."""
        done = self._state.done_frame
        return done is not None and bool(done.header.get("reconstructed"))

    def cancel(self) -> bool:
        """Ask for the end of it (interrupt, then TERM, then KILL within 10 s). False if it is over already."""
        if self._state.is_over:
            return False
        self._state.request_cancel(connection.current().send)
        return True

    def _abandon(self) -> None:
        """Nobody waits for it any more, which is the end of it unless it was detached, or is somebody's that was only looked at."""
        if not self._state.is_detached:
            self.cancel()

    def logs(self) -> str:
        """What it has printed so far, stdout before stderr."""
        if self._state.outgoing is None:
            self._state.wait(lambda: self._state.known or self._state.is_over, None)
        return self._state.text(1) + self._state.text(2)

    def add_done_callback(self, callback: Callable[[Handle[T_co]], object]) -> None:
        """Call ``callback(handle)`` when it is over, from another thread; at once if it is over."""

        def tell() -> None:
            callback(self)

        self._state.add_done_callback(tell)
        self._state.look()

    # -- with asyncio --------------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, Any, T_co]:
        return self._wait().__await__()

    async def _wait(self) -> T_co:
        self._state.was_awaited = True
        try:
            with _waiting_in_body(self._state) if context.in_worker else _NOTHING:
                await self._state.wait_and_tell_async(self._is_over, news=self._state.is_stream)
        except asyncio.CancelledError:
            self._abandon()
            raise
        return self._outcome()

    def send(self, value: Any) -> Any:
        """One step, as the event loop asks for it; every task that runs this handle has its own steps."""
        return self._step().send(value)

    def throw(self, *args: Any) -> Any:
        return self._step().throw(*args)

    def close(self) -> None:
        steps = self._steps.pop(_current_task(), None) if self._steps is not None else None
        if steps is not None:
            steps.close()

    def _step(self) -> Generator[Any, Any, T_co]:
        task = _current_task()
        if self._steps is None:
            self._steps = {}
        if task not in self._steps:
            self._steps[task] = self.__await__()
        return self._steps[task]

    # -- the end -------------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return self._state.is_over

    def _outcome(self) -> T_co:
        """Read once, in the thread that asks; afterwards the same object again."""
        with self._lock:
            if not self._read:
                self._value, self._failure = self._read_outcome()
                self._read = True
        if self._failure is not None:
            raise self._failure
        value: T_co = self._value
        return value

    def _read_outcome(self) -> tuple[Any, BaseException | None]:
        state = self._state
        if state.error is not None:
            return None, state.error
        if state.returned is not None:
            return plain.loads(state.returned), None
        assert state.done_frame is not None
        done = state.take_outcome()
        output, exception = _decode_done(done)
        if self._state.is_stream and exception is None:
            output = [_decode(frame) for frame in iter(state.take_item, None)]
        if state.is_durable:
            return from_done(done.header, output, exception, state.text(1), state.text(2)), None
        return _direct_outcome(done.header, output, exception)


def _not_yet(handle: Handle[Any]) -> str:
    function = handle._state.name
    return f"it is a call that was started, not its result; write (await {function}(...)) or {function}(...).result()"


class StreamHandle(Handle[T_co], Generic[T_co]):
    """A call of a generator function: iterate over it for its items, or await it for all of them.

    At most 64 items are on their way; leaving the loop stops the remote side at its next ``yield``.
    """

    def __init__(self, state: CallState) -> None:
        super().__init__(state)
        self._credited: int = 0
        self._items: Iterator[Any] | None = None
        self._line = connection.current()

    def __del__(self) -> None:
        """Nobody can read any more of it here. What follows is done in the connection's thread, for this one may hold any lock."""
        with contextlib.suppress(Exception):  # at the end of the interpreter
            state, credited, line = self._state, self._credited, self._line
            if not (state.is_over or state.is_detached) and line.pid == os.getpid():
                line.attendant.post(lambda: _abandon(state, credited, line.send))

    @overload
    def __next__(self: StreamHandle[JobOutput[list[Item]]]) -> Item: ...
    @overload
    def __next__(self: StreamHandle[list[Item]]) -> Item: ...
    def __next__(self) -> Any:
        """One item: ``next(handle)``. The handle keeps the place."""
        if self._items is None:
            self._items = self._each()
        return next(self._items)

    @overload
    def __iter__(self: StreamHandle[JobOutput[list[Item]]]) -> Iterator[Item]: ...
    @overload
    def __iter__(self: StreamHandle[list[Item]]) -> Iterator[Item]: ...
    def __iter__(self) -> Iterator[Any]:
        return self._each()

    def _each(self) -> Iterator[Any]:
        self._state.was_awaited = True
        try:
            while True:
                with _waiting_in_body(self._state):
                    self._state.wait_and_tell(self._has_news, None)
                frame = self._state.take_item()
                if frame is None:
                    self._raise_failure()
                    return
                yield self._accept(frame)
        finally:
            self._leave()

    @overload
    def __aiter__(self: StreamHandle[JobOutput[list[Item]]]) -> AsyncIterator[Item]: ...
    @overload
    def __aiter__(self: StreamHandle[list[Item]]) -> AsyncIterator[Item]: ...
    async def __aiter__(self) -> AsyncIterator[Any]:
        self._state.was_awaited = True
        try:
            while True:
                with _waiting_in_body(self._state):
                    await self._state.wait_and_tell_async(self._has_news)
                frame = self._state.take_item()
                if frame is None:
                    self._raise_failure()
                    return
                yield self._accept(frame)
        finally:
            self._leave()

    def _is_over(self) -> bool:
        """Waiting for all of it means reading along: items are taken as read when they arrive."""
        arrived = self._state.items_received
        if arrived > self._credited:
            self._state.credit(arrived - self._credited, connection.current().send)
            self._credited = arrived
        return self._state.is_over

    def _has_news(self) -> bool:
        return bool(self._state.items) or self._state.is_over

    def _accept(self, frame: Frame) -> Any:
        self._credited += 1
        self._state.credit(1, connection.current().send)
        return _decode(frame)

    def _leave(self) -> None:
        if not self._state.is_over:
            self._state.leave(connection.current().send)

    def _raise_failure(self) -> None:
        state = self._state
        if state.error is not None:
            raise state.error
        assert state.done_frame is not None
        header = state.done_frame.header
        if header["status"] != Status.COMPLETED:
            _, exception = _decode_done(state.take_outcome())
            raise _failure_of(header, exception)


def _abandon(state: CallState, credited: int, send: Callable[[dict[str, Any]], None]) -> None:
    """The items of a job are stored, so it goes on as any job; those of a direct call are lost, as if its loop had been left."""
    if state.is_over:
        return
    if state.is_durable:
        state.read_along(credited, send)
    else:
        state.leave(send)


class Job(Handle[Any]):
    """A job that another process may have submitted."""

    @classmethod
    def from_id(cls, job_id: str) -> Handle[Any]:
        """The handle of one of your jobs, live or over, until it expires (7 days, or 10 GiB of results).

        The beginning of an id will do. ``.result()`` gives its ``JobOutput``. Unknown ids raise SubmissionRefused there, with code NOT_FOUND.
        """
        wanted = _check_id(job_id)
        known = _known_here(wanted)
        if known is not None:
            return known
        state = CallState(f"job {wanted[:8]}", None, durable=True, detached=True, stream=False, echo=False, call_id=wanted)
        state.key = wanted  # the answer to a shortened id names both
        connection.current().attach(state)
        return _FoundJob(state)


def _known_here(wanted: str) -> Handle[Any] | None:
    """The handle of a job that this process follows already: the daemon tells each connection once."""
    line = connection.current()
    with line._lock:
        states = [state for state in line._states.values() if state.is_durable and (state.id.startswith(wanted) or state.key == wanted)]
    if not states:
        return None
    return (states[0].handle() if states[0].handle is not None else None) or _FoundJob(states[0])


def _check_id(value: object) -> str:
    """A job's id as it is stored, whole or its beginning."""
    allowed = "the id of a job: 32 hexadecimal digits, or the first of them as `remotectl ps` shows them"
    text = check_type("job_id", value, str, allowed).strip().lower()
    if text.startswith("local-"):
        raise ValueError(f"cannot find {text[:20]!r}: that call ran in its own process, without the daemon")
    if not 0 < len(text) <= _ID_DIGITS or set(text) - set("0123456789abcdef"):
        raise bad_value("job_id", value, allowed)
    return text


class _FoundJob(Job):
    """``Job.from_id``: whether it streams is known only from its items, and a shortened id is completed by the daemon."""

    @property
    def id(self) -> str:
        state = self._state
        state.wait(lambda: state.known or state.is_over or len(state.id) == _ID_DIGITS, None)
        if state.error is not None and len(state.id) < _ID_DIGITS:
            raise state.error
        return state.id

    def _read_outcome(self) -> tuple[Any, BaseException | None]:
        done = self._state.done_frame
        if done is not None and done.header["items"]:
            self._state.is_stream = True
        return super()._read_outcome()


def _decode(frame: Frame) -> Any:
    """The frame's payload as an object; its descriptors are closed."""
    header = frame.header
    if header.get("plain"):
        return plain.loads(frame.body)
    buffers = None
    if "segment" in header:
        buffers = segments.unpack(frame.fds[0], header["segment"], header["buffers"], header["releases"])
        frame = frame._replace(fds=frame.fds[1:])
    try:
        found = parcel.unpack(frame.fds[0]) if frame.fds else None
        source, buffers = found if found is not None else (payload_of(frame), buffers)
        return connection.current().encoder.decode_result(source, buffers)
    finally:
        frame.close()


def _decode_done(frame: Frame) -> tuple[Any, BaseException | None]:
    """(return value, exception) of a finished call; an undecodable payload is an exception that says so."""
    kind = frame.header["kind"]
    if "lost" in frame.header:
        return None, RemoteExecutionError(frame.header["lost"])
    # A stopped body's last exception (KeyboardInterrupt, CancelledError) is ours, not the caller's.
    if kind not in ("returned", "raised", "exited", "unsendable") or not (frame.body or frame.fds):
        drop(frame)
        return None, None
    try:
        value = _decode(frame)
        if kind == "returned":
            return value, None
        return None, failure.restore(value)
    except Exception as error:
        what = "result" if kind == "returned" else f"{frame.header['error_type'] or 'exception'}"
        problem = RemoteExecutionError(f"the {what} of the call cannot be read here: {type(error).__name__}: {error}{_advice(error)}", exception_type=frame.header["error_type"])
        problem.__cause__ = error
        frame.header["error"] = frame.header["error"] or str(problem)
        frame.header["status"] = Status.FAILED.value if kind == "returned" else frame.header["status"]
        frame.header["reason"] = frame.header["reason"] or "RESULT_LOST"
        return None, problem


def _advice(error: Exception) -> str:
    """For what the worker has and this process has not."""
    if isinstance(error, ImportError):
        name = (error.name or "the module").partition(".")[0]
        return f"; this process lacks a module of the worker's: install {name} here too, or return plain data (numbers, text, lists, dicts) instead"
    if isinstance(error, AttributeError) and str(error).startswith("Can't get attribute"):  # pickle's words for a name that its module lacks
        return "; its class is not in this process's version of the module: install the same version here, or return plain data instead"
    return ""


def _direct_outcome(header: dict[str, Any], output: Any, exception: BaseException | None) -> tuple[Any, BaseException | None]:
    """Load-balanced: the value, or the exception itself."""
    if header["status"] == Status.COMPLETED:
        return output, None
    if header["error_type"] == "POOL_BUSY":
        return None, for_code("POOL_BUSY", header["error"])
    return None, _failure_of(header, exception)


def _failure_of(header: dict[str, Any], exception: BaseException | None) -> BaseException:
    """The exception itself; a SystemExit would end the caller, and so is only the cause of another one."""
    if exception is not None and header["status"] == Status.FAILED and not isinstance(exception, SystemExit):
        return exception
    error = for_outcome(header["status"], header["reason"], header["error"])
    error.__cause__ = exception
    return error


@contextlib.contextmanager
def _waiting_in_body(state: CallState) -> Iterator[None]:
    """Inside a worker: tell the daemon that this body only waits, so that its place can be used."""
    parent = context.running_call()
    if parent is None or state.is_over:
        yield
        return
    line = connection.current()
    line.waiting(parent.id, 1)
    try:
        yield
    finally:
        line.waiting(parent.id, -1)


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
