"""Running a call here: ``local=True``, ``f.local(...)``, ``REMOTED_LOCAL=1``. Same types, no daemon.

Retries and timeouts are those of the worker, as far as one process can: an async body is stopped at its timeout, a sync
one in the main thread is interrupted, and one in another thread cannot be stopped and is left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from remoted_client.errors import JobTimedOut
from remoted_client.output import JobOutput, in_one_line
from remoted_client.settings import Settings
from remoted_client.suggest import check_amount
from remoted_client.wire import Status

T_co = TypeVar("T_co", covariant=True)
_END = object()


class Limits(NamedTuple):
    """Of a call that runs here."""

    durable: bool
    max_retries: int
    timeout: float | None


def limits_of(settings: Settings, options: dict[str, Any]) -> Limits:
    """As the daemon would apply them."""
    durable = not settings.config.is_load_balanced
    timeouts = (options.get("timeout_seconds") or settings.timeout, settings.config.executionTimeoutMs / 1000 or None)
    timeout = min((each for each in timeouts if each is not None), default=None)
    return Limits(durable, options.get("max_retries", settings.max_retries) if durable else 0, timeout)


class LocalHandle(Coroutine[Any, Any, T_co], Generic[T_co]):
    """Looks like a ``Handle``. A sync body has run when the handle exists; an async one runs when it is awaited."""

    def __init__(self, name: str, body: Callable[[], Any], limits: Limits) -> None:
        self.id = f"local-{uuid.uuid4().hex}"
        self._name = name
        self._body = body
        self._limits = limits
        self._started = time.time()
        self._ended = 0.0
        self._attempts = 0
        self._coroutine: Any = None
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._steps: Generator[Any, Any, T_co] | None = None
        self._run()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} {self.id} {self.status()}>"

    def __del__(self) -> None:
        if getattr(self, "_coroutine", None) is not None:
            self.close()
            with contextlib.suppress(Exception):  # at the end of the interpreter
                sys.stderr.write(f"remoted: a local call of {self._name} was never awaited, and so never ran\n")

    def _run(self) -> None:
        """A sync body, to its end; of an async one the first coroutine."""
        while self._outcome is None:
            self._attempts += 1
            try:
                with _interrupted_after(self._limits.timeout):
                    value = self._body()
            except (Exception, _Interrupted) as error:
                self._fail(error)
                continue
            if inspect.isawaitable(value):
                self._coroutine = value
                return
            self._end(value, None)

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._ended = time.time()
        self._outcome = (value, error)

    def _fail(self, error: Exception | _Interrupted) -> None:
        """The end, unless there is another attempt; a timeout, as in a worker, is final."""
        if isinstance(error, _Interrupted):
            self._end(None, JobTimedOut(f"the call ran longer than its timeout of {self._limits.timeout:g} s and was stopped"))
        elif self._attempts > self._limits.max_retries:
            self._end(None, error)

    def __await__(self) -> Generator[Any, Any, T_co]:
        return self._wait().__await__()

    async def _wait(self) -> T_co:
        while self._coroutine is not None:
            coroutine, self._coroutine = self._coroutine, None
            try:
                self._end(await _within(self._limits.timeout, _collect(coroutine)), None)
            except (Exception, _Interrupted) as error:
                self._fail(error)
                if self._outcome is None:
                    self._run()
        return self._give()

    def send(self, value: Any) -> Any:
        if self._steps is None:
            self._steps = self.__await__()
        return self._steps.send(value)

    def throw(self, *args: Any) -> Any:
        if self._steps is None:
            self._steps = self.__await__()
        return self._steps.throw(*args)

    def close(self) -> None:
        if self._coroutine is not None:
            close = getattr(self._coroutine, "close", None)
            if close is not None:
                close()
            self._coroutine = None

    def result(self, timeout: float | None = None) -> T_co:
        """Run an async body to its end (in a thread when a loop runs here already)."""
        if timeout is not None:
            check_amount("timeout", timeout, zero=True)
        if self._coroutine is None:
            return self._give()
        thread = threading.Thread(target=lambda: asyncio.run(self._settled()), name=f"local-{self._name}", daemon=True)
        thread.start()
        thread.join(timeout)
        if thread.is_alive():
            raise TimeoutError(f"{self._name} is not over after {timeout:g} s; it goes on")
        return self._give()

    async def _settled(self) -> None:
        try:
            await self._wait()
        except Exception:
            return  # kept in the outcome

    def done(self) -> bool:
        return self._outcome is not None

    def status(self) -> Status:
        if self._outcome is None:
            return Status.IN_PROGRESS
        error = self._outcome[1]
        return Status.COMPLETED if error is None else Status.TIMED_OUT if isinstance(error, JobTimedOut) else Status.FAILED

    def state_reason(self) -> str:
        return {Status.TIMED_OUT: "TIMEOUT", Status.FAILED: "EXCEPTION"}.get(self.status(), "")

    def reconstructed(self) -> bool:
        return False

    def cancel(self) -> bool:
        return False

    def logs(self) -> str:
        return ""

    def _give(self) -> T_co:
        assert self._outcome is not None
        value, error = self._outcome
        if not self._limits.durable:
            if error is not None:
                raise error
            found: T_co = value
            return found
        return JobOutput(  # type: ignore[return-value]
            id=self.id,
            status=self.status(),
            output=value,
            error=None if error is None else str(error) if isinstance(error, JobTimedOut) else in_one_line(error),
            started_at=int(self._started),
            ended_at=int(self._ended),
            attempts=self._attempts,
            worker_id="local",
            exception=error,
            run_seconds=self._ended - self._started,
            state_reason=self.state_reason(),
        )


class LocalStream(LocalHandle[T_co], Generic[T_co]):
    """A generator function, here: its items, or all of them at once."""

    def __init__(self, name: str, make: Callable[[], Any], limits: Limits) -> None:
        self._make = make
        self._items: Any = None
        self._iterator: Iterator[Any] | None = None
        # A stream has no second attempt: its first items may have been used.
        super().__init__(name, lambda: _collect(self._open()), limits._replace(max_retries=0))

    def _open(self) -> Any:
        if self._items is None:
            self._items = self._make()
        return self._items

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self)
        return next(self._iterator)

    def __iter__(self) -> Iterator[Any]:
        self.close()
        items = self._open()
        return _in_thread(items) if inspect.isasyncgen(items) else iter(items)

    def __aiter__(self) -> AsyncIterator[Any]:
        self.close()
        return self._iterate(self._open())

    async def _iterate(self, items: Any) -> AsyncIterator[Any]:
        if inspect.isasyncgen(items):
            async for item in items:
                yield item
        else:
            for item in items:
                yield item


def _in_thread(items: Any) -> Iterator[Any]:
    """The items of an async generator, for ``for``: its loop runs in a thread, one item ahead."""
    found: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(1)
    left = threading.Event()

    async def read() -> None:
        try:
            async for item in items:
                found.put((item, None))
                if left.is_set():
                    return
        finally:
            await items.aclose()

    def run() -> None:
        try:
            asyncio.run(read())
            last: BaseException | None = None
        except Exception as error:
            last = error
        if not left.is_set():
            found.put((_END, last))

    threading.Thread(target=run, name="local-stream", daemon=True).start()
    try:
        while True:
            item, error = found.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        left.set()
        with contextlib.suppress(queue.Empty):
            found.get_nowait()


async def _collect(value: Any) -> Any:
    """An awaitable's value; the list of a generator's items."""
    if inspect.isasyncgen(value):
        return [item async for item in value]
    if inspect.isgenerator(value):
        return list(value)
    return await value


class _Interrupted(BaseException):
    """The body's time is up, whatever it catches."""


async def _within(seconds: float | None, body: Coroutine[Any, Any, Any]) -> Any:
    if seconds is None:
        return await body
    task = asyncio.ensure_future(body)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise _Interrupted
        return task.result()
    finally:
        task.cancel()


@contextlib.contextmanager
def _interrupted_after(seconds: float | None) -> Iterator[None]:
    """Only the main thread can be interrupted, and only by one timer: somebody else's (a test runner's) is left alone."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def interrupt(*_: Any) -> None:
        raise _Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGALRM) is interrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
