"""Running a call here: ``local=True``, ``f.local(...)``, ``REMOTED_LOCAL=1``. Same types, no daemon."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import Any, Generic, TypeVar

from remoted_client.output import JobOutput
from remoted_client.wire import Status

T_co = TypeVar("T_co", covariant=True)


class LocalHandle(Coroutine[Any, Any, T_co], Generic[T_co]):
    """Looks like a ``Handle``. A sync body has run when the handle exists; an async one runs when it is awaited."""

    def __init__(self, name: str, body: Callable[[], Any], *, durable: bool) -> None:
        self.id = f"local-{uuid.uuid4().hex}"
        self._name = name
        self._durable = durable
        self._started = time.time()
        self._coroutine: Any = None
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._steps: Generator[Any, Any, T_co] | None = None
        self._run(body)

    def _run(self, body: Callable[[], Any]) -> None:
        try:
            value = body()
        except Exception as error:
            self._outcome = (None, error)
            return
        if inspect.isawaitable(value):
            self._coroutine = value
        else:
            self._outcome = (value, None)

    def __await__(self) -> Generator[Any, Any, T_co]:
        return self._wait().__await__()

    async def _wait(self) -> T_co:
        if self._coroutine is not None:
            coroutine, self._coroutine = self._coroutine, None
            try:
                self._outcome = (await _collect(coroutine), None)
            except Exception as error:
                self._outcome = (None, error)
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
            self._coroutine.close()
            self._coroutine = None

    def result(self, timeout: float | None = None) -> T_co:
        """Run an async body to its end (in a thread when a loop runs here already)."""
        if self._coroutine is None:
            return self._give()
        box: list[Any] = []
        thread = threading.Thread(target=lambda: box.append(asyncio.run(self._settled())), name=f"local-{self._name}", daemon=True)
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
        return Status.COMPLETED if self._outcome[1] is None else Status.FAILED

    def cancel(self) -> bool:
        return False

    def logs(self) -> str:
        return ""

    def _give(self) -> T_co:
        assert self._outcome is not None
        value, error = self._outcome
        if not self._durable:
            if error is not None:
                raise error
            found: T_co = value
            return found
        ended = time.time()
        return JobOutput(  # type: ignore[return-value]
            id=self.id,
            status=self.status(),
            output=value,
            error=None if error is None else f"{type(error).__name__}: {error}",
            started_at=int(self._started),
            ended_at=int(ended),
            worker_id="local",
            exception=error,
            run_seconds=ended - self._started,
            state_reason="" if error is None else "EXCEPTION",
        )


class LocalStream(LocalHandle[T_co], Generic[T_co]):
    """A generator function, here."""

    def __init__(self, name: str, items: Any, *, durable: bool) -> None:
        self._items = items
        super().__init__(name, lambda: _collect(items), durable=durable)

    def __iter__(self) -> Iterator[Any]:
        self.close()
        if inspect.isasyncgen(self._items):
            raise TypeError(f"{self._name} is an async generator function: use `async for`")
        return iter(self._items)

    def __aiter__(self) -> AsyncIterator[Any]:
        self.close()
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        if inspect.isasyncgen(self._items):
            async for item in self._items:
                yield item
        else:
            for item in self._items:
                yield item


async def _collect(value: Any) -> Any:
    """An awaitable's value; the list of a generator's items."""
    if inspect.isasyncgen(value):
        return [item async for item in value]
    if inspect.isgenerator(value):
        return list(value)
    return await value
