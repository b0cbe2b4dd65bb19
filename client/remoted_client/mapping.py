"""Many calls at once: ``map``, ``starmap`` and ``as_completed``."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from remoted_client.outbox import together
from remoted_client.printed import echo
from remoted_client.suggest import check_amount

T = TypeVar("T")
#: Calls on their way at once. The daemon queues them; this bounds what an endless iterable costs.
IN_FLIGHT = 1000
#: So many results are taken before as many calls are made: they share frames.
_REFILL = 200


class MapResult(Generic[T]):
    """The results of a map in input order, for ``for``, ``next`` and ``async for``: an iterator, so consumed once, lazily."""

    def __init__(
        self, call: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], name: str, total: int | None, *, return_exceptions: bool, progress: bool
    ) -> None:
        self._call = call
        self._name = name
        self._arguments: Iterator[tuple[Any, ...]] = iter(arguments)
        self._total = total
        self._return_exceptions = return_exceptions
        self._flying: deque[Any] = deque()
        #: What iterating over the arguments raised: told behind the results of those that came before.
        self._broken: Exception | None = None
        self._shows_progress = progress
        self._progress: _Progress | None = None

    def __repr__(self) -> str:
        of = "" if self._total is None else f" of {self._total} calls"
        return f"<map{of} of {self._name}: iterate over it for the results; nothing is called before>"

    def __iter__(self) -> MapResult[T]:
        return self

    def __next__(self) -> T:
        """One result, as from the builtin ``map``. The first one makes the first calls."""
        with self._to_its_end():
            if not self._begin():
                raise StopIteration
            value: T = self._settle(self._flying[0].result)
            self._advance()
        return value

    def __aiter__(self) -> MapResult[T]:
        return self

    async def __anext__(self) -> T:
        with self._to_its_end():
            if not self._begin():
                raise StopAsyncIteration
            try:
                value: T = await self._flying[0]
            except Exception as error:
                value = self._keep(error)
            self._advance()
        return value

    def __del__(self) -> None:
        """Whoever leaves the loop early does not want the rest."""
        with contextlib.suppress(Exception):  # at the end of the interpreter
            self._stop()

    @contextlib.contextmanager
    def _to_its_end(self) -> Iterator[None]:
        """Nothing follows an exception, the end among them."""
        try:
            yield
        except BaseException:
            self._stop()
            raise

    def _begin(self) -> bool:
        """Make the first calls, if they are not made; is there a result to wait for?"""
        if self._shows_progress and self._progress is None:
            self._progress = _Progress(self._name, self._total)
        if not self._flying:
            self._fill()
        if not self._flying and self._broken is not None:
            raise self._broken
        return bool(self._flying)

    def _fill(self) -> None:
        with together():
            while len(self._flying) < IN_FLIGHT:
                try:
                    arguments = next(self._arguments)
                except StopIteration:
                    return
                except Exception as error:
                    self._arguments, self._broken = iter(()), error
                    return
                self._flying.append(self._call(*arguments))

    def _settle(self, wait: Callable[[], Any]) -> Any:
        try:
            return wait()
        except Exception as error:
            return self._keep(error)

    def _keep(self, error: Exception) -> Any:
        if not self._return_exceptions:
            raise error
        return error

    def _advance(self) -> None:
        handle = self._flying.popleft()
        if len(self._flying) <= IN_FLIGHT - _REFILL:
            self._fill()
        if self._progress is not None:
            self._progress.step(getattr(getattr(handle, "_state", None), "status", ""))

    def _stop(self) -> None:
        self._arguments, self._broken = iter(()), None
        for handle in self._flying:
            handle.cancel()
        self._flying.clear()
        if self._progress is not None:
            self._progress.finish()


class _Progress:
    """One line on stderr: how many are done, how fast, how long still."""

    def __init__(self, name: str, total: int | None) -> None:
        self._name, self._total = name, total
        self._done = self._failed = 0
        self._began = time.monotonic()
        self._shown = 0.0
        self._live = sys.stderr.isatty()
        self._over = False

    def step(self, status: str) -> None:
        self._done += 1
        self._failed += str(status) not in ("COMPLETED", "")
        if self._live and time.monotonic() - self._shown > 0.1:
            self._show()

    def finish(self) -> None:
        """The last line, once."""
        if not self._over:
            self._over = True
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._began
        of = f"/{self._total}" if self._total is not None else ""
        rate = f", {self._done / seconds:.3g}/s" if self._done and seconds > 0 else ""
        failed = f", {self._failed} failed" if self._failed else ""
        left = ""
        if self._total and 0 < self._done < self._total and not self._over:
            left = f", {seconds / self._done * (self._total - self._done):.0f} s left"
        line = f"{self._name}: {self._done}{of} in {seconds:.1f} s{rate}{failed}{left}"
        if self._live:
            echo.draw(line, is_last=self._over)
        else:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def shortest(iterables: Iterable[Any]) -> int | None:
    """How long ``zip`` of these is, if all can tell."""
    try:
        return min(len(each) for each in iterables)
    except (TypeError, ValueError):
        return None


class as_completed(Generic[T]):
    """The handles in the order in which they end, for ``for`` and ``async for``.

    Example:
        >>> for handle in as_completed([f(1), f(2)]): print(handle.result())
    """

    def __init__(self, handles: Iterable[T], timeout: float | None = None) -> None:
        self._handles: list[Any] = list(handles)
        for handle in self._handles:
            if not (callable(getattr(handle, "result", None)) and callable(getattr(handle, "done", None))):
                raise TypeError(f"cannot wait for a {type(handle).__name__}: as_completed takes the handles that calls give")
        self._timeout = None if timeout is None else check_amount("timeout", timeout, zero=True)

    def __iter__(self) -> Iterator[T]:
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        for handle in self._handles:
            _watch(handle, ended.put)
        for number in range(len(self._handles)):
            try:
                yield ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{len(self._handles) - number} of {len(self._handles)} calls are not over after {self._timeout:g} s; they go on") from None

    async def __aiter__(self) -> AsyncIterator[T]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Queue[Any] = asyncio.Queue()


        def put(found: Any) -> None:
            loop.call_soon_threadsafe(ended.put_nowait, found)

        for handle in self._handles:
            _watch(handle, put)
        for _ in self._handles:
            yield await asyncio.wait_for(ended.get(), self._timeout)


def _watch(handle: Any, ended: Callable[[Any], None]) -> None:
    add = getattr(handle, "add_done_callback", None)
    if add is None:
        ended(handle)  # a local call has run already, or runs when it is awaited
    else:
        add(ended)
