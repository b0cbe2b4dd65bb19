"""One piece of work for all who want the same: the first starts it, the rest join, the last to leave stops it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from remoted.environments.installer import LOG_BYTES

_Result = TypeVar("_Result")
_Listener = Callable[[bytes], None]
log = logging.getLogger(__name__)


class _Flight(Generic[_Result]):
    """Running work and who listens to it; who joins late gets the end of what was said so far."""

    def __init__(self) -> None:
        self.listeners: list[_Listener] = []
        self.task: asyncio.Task[_Result] | None = None
        self._said = bytearray()

    def tell(self, data: bytes) -> None:
        self._said += data
        del self._said[:-LOG_BYTES]
        for listener in list(self.listeners):
            _pass_on(listener, data)

    def join(self, listener: _Listener) -> None:
        if self._said:
            _pass_on(listener, bytes(self._said))
        self.listeners.append(listener)


class Shared(Generic[_Result]):
    """Work by name, at most one of each name at a time."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[_Result]] = {}

    async def run(self, name: str, work: Callable[[_Listener], Awaitable[_Result]], listener: _Listener) -> _Result:
        """The result of the work called ``name``; an exception of it goes to everybody who waits.

        A cancelled caller leaves; with the last one the work is cancelled, and over when this returns.
        """
        flight = self._flights.get(name) or self._begin(name, work)
        assert flight.task is not None
        flight.join(listener)
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.listeners.remove(listener)
            if not flight.listeners and not flight.task.done():
                self._forget(name, flight)
                flight.task.cancel()
                await asyncio.wait([flight.task])

    def _begin(self, name: str, work: Callable[[_Listener], Awaitable[_Result]]) -> _Flight[_Result]:
        async def worked() -> _Result:
            return await work(flight.tell)

        flight: _Flight[_Result] = _Flight()
        flight.task = asyncio.get_running_loop().create_task(worked(), name=f"shared {name}")
        flight.task.add_done_callback(lambda task: self._finish(name, flight, task))
        self._flights[name] = flight
        return flight

    def _finish(self, name: str, flight: _Flight[_Result], task: asyncio.Task[_Result]) -> None:
        self._forget(name, flight)
        if not task.cancelled():
            task.exception()  # retrieved here: those who waited may all have been cancelled meanwhile

    def _forget(self, name: str, flight: _Flight[_Result]) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]


def _pass_on(listener: _Listener, data: bytes) -> None:
    try:
        listener(data)
    except Exception:
        log.exception("a listener to a build failed; the build goes on")
