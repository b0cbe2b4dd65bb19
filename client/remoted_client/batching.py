"""``@batched``: a function of a list, called with one item at a time; calls that come together share a batch.

The batch is made where the calls meet: in a worker whose config has ``max_concurrency``, whoever sent them (handles, ``map``,
HTTP requests), or on the event loop of a local call. One batch of a function runs at a time, and the next one fills meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from remoted_client.settings import name_of, streams
from remoted_client.suggest import bad_value, check_amount, check_int

if TYPE_CHECKING:
    import asyncio
    import inspect

T = TypeVar("T")
R = TypeVar("R")
_MOST = 10_000
_MOST_MILLISECONDS = 600_000


def batched(*, max_batch_size: int, wait_ms: float = 10.0) -> Callable[[Callable[[list[T]], Awaitable[list[R]] | list[R]]], Batched[T, R]]:
    """Make a function of a list one of a single item, whose calls share batches. ``@remote`` stands above it.

    Args:
        max_batch_size: items of one batch at most; give the config ``max_concurrency=`` of at least that.
        wait_ms: how long the first item of a batch waits for others.

    The function returns one result for each item, in their order. An exception goes to every call of its batch; one that
    stands in the list of results to its own call. A call that is cancelled does not disturb the others. A plain function
    runs in a thread.

    Example:
        >>> @remote(LiveLoadBalancer(name="embed", gpus=[GpuGroup.ANY], max_concurrency=32))
        ... @batched(max_batch_size=32, wait_ms=5)
        ... def embed(texts: list[str]) -> list[list[float]]: return model.encode(texts).tolist()
        >>> vector = await embed("one text")
    """
    size = check_int("max_batch_size", max_batch_size, 1, _MOST)
    wait = check_amount("wait_ms", wait_ms, zero=True)
    if wait > _MOST_MILLISECONDS:
        raise bad_value("wait_ms", wait_ms, f"at most {_MOST_MILLISECONDS}")

    def decorate(function: Callable[[list[T]], Awaitable[list[R]] | list[R]]) -> Batched[T, R]:
        return Batched(function, _only_parameter(function), size, wait / 1000)

    return decorate


def _only_parameter(function: Any) -> str:
    """Raises TypeError for what cannot be batched."""
    name = name_of(function)
    if type(function).__name__ == "RemoteFunction":
        raise TypeError(f"cannot batch {function!r}: write @remote above @batched")
    code = getattr(function, "__code__", None)
    if code is None:
        raise TypeError(f"cannot batch {name}: @batched takes a function with def or async def")
    if streams(function):
        raise TypeError(f"cannot batch {name}: a generator has no list of results")
    variadic = code.co_flags & 0x0C  # CO_VARARGS, CO_VARKEYWORDS
    if code.co_argcount != 1 or code.co_kwonlyargcount or variadic:
        raise TypeError(f"cannot batch {name}: it must have one parameter, the list of items")
    return str(code.co_varnames[0])


class Batched(Generic[T, R]):
    """What ``batched`` makes of a function. The queue is not part of it, so that every copy in a worker shares one."""

    def __init__(self, function: Callable[[list[T]], Awaitable[list[R]] | list[R]], parameter: str, max_batch_size: int, wait_seconds: float) -> None:
        self.batch_function = function
        self.parameter = parameter
        self.max_batch_size = max_batch_size
        self.wait_seconds = wait_seconds
        for word in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, word, getattr(function, word))

    def __repr__(self) -> str:
        return f"<batched function {name_of(self)}, at most {self.max_batch_size} items>"

    @property
    def __signature__(self) -> inspect.Signature:
        """One item, under the name of the list."""
        import inspect

        kind = inspect.signature(self.batch_function).parameters[self.parameter].kind
        return inspect.Signature([inspect.Parameter(self.parameter, kind)])

    if TYPE_CHECKING:

        async def __call__(self, item: T) -> R: ...

    else:

        async def __call__(self, *args, **kwargs):
            bound = self.__signature__.bind(*args, **kwargs)
            entry = _queue_of(self).add(bound.arguments[self.parameter])
            return await entry.wait()


class _Entry:
    """One item, and the call that waits for its result."""

    def __init__(self, queue: _Queue, item: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.item = item
        self.arrived = loop.time()
        self.future: asyncio.Future[Any] = loop.create_future()
        self.batch: _Batch | None = None
        self._queue = queue

    async def wait(self) -> Any:
        try:
            return await self.future
        finally:
            if self.batch is None:
                self._queue.remove(self)
            elif self.future.cancelled():
                await self.batch.left()


class _Batch:
    """Items that are with the function now."""

    def __init__(self, entries: list[_Entry], is_thread: bool) -> None:
        self.entries = entries
        self.task: asyncio.Task[None] | None = None
        self._is_thread = is_thread
        for entry in entries:
            entry.batch = self

    async def left(self) -> None:
        """A call was cancelled. With the last one the batch ends; a thread cannot be ended, so that call stays until it has.

        The daemon then ends the worker, as it does with any body that does not listen.
        """
        import asyncio

        if self.task is None or not all(entry.future.cancelled() for entry in self.entries):
            return
        if self._is_thread:
            await asyncio.wait([self.task])
        else:
            self.task.cancel()

    def settle(self, results: list[Any]) -> None:
        for entry, result in zip(self.entries, results, strict=True):
            if not entry.future.done():
                entry.future.set_exception(result) if isinstance(result, Exception) else entry.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        import asyncio

        for entry in self.entries:
            if not entry.future.done():
                entry.future.cancel() if isinstance(error, asyncio.CancelledError) else entry.future.set_exception(error)


class _Queue:
    """The items of one function on one event loop."""

    def __init__(self, key: Any, batched: Batched[Any, Any]) -> None:
        import asyncio

        self._key = key
        self._batched = batched
        self._is_async = asyncio.iscoroutinefunction(batched.batch_function)
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Entry] = deque()
        self._running: _Batch | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(self, item: Any) -> _Entry:
        entry = _Entry(self, item, self._loop)
        self._waiting.append(entry)
        self._look()
        return entry

    def remove(self, entry: _Entry) -> None:
        """It was cancelled before its turn came."""
        self._waiting.remove(entry)
        self._look()

    def _look(self) -> None:
        """Start a batch if it is full, or its first item has waited for long enough; or look again then."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running is not None:
            return
        if not self._waiting:
            _queues.pop(self._key, None)
            return
        due = self._waiting[0].arrived + self._batched.wait_seconds
        if len(self._waiting) >= self._batched.max_batch_size or due <= self._loop.time():
            self._start()
        else:
            self._timer = self._loop.call_at(due, self._look)

    def _start(self) -> None:
        count = min(len(self._waiting), self._batched.max_batch_size)
        batch = self._running = _Batch([self._waiting.popleft() for _ in range(count)], not self._is_async)
        batch.task = self._loop.create_task(self._run(batch))

    async def _run(self, batch: _Batch) -> None:
        try:
            batch.settle(_checked(self._batched, len(batch.entries), await self._call([entry.item for entry in batch.entries])))
        except BaseException as error:  # whatever it is, the calls of this batch must hear of it
            batch.fail(error)
        finally:
            self._running = None
            self._look()

    async def _call(self, items: list[Any]) -> Any:
        """A plain function runs in a thread: meanwhile items arrive, and calls are cancelled."""
        import asyncio

        function: Any = self._batched.batch_function
        return await function(items) if self._is_async else await asyncio.to_thread(function, items)


def _checked(batched: Batched[Any, Any], count: int, results: Any) -> list[Any]:
    """Raises TypeError and ValueError for what is not one result for each item."""
    name = name_of(batched)
    if isinstance(results, (str, bytes, dict)) or not (hasattr(results, "__len__") and hasattr(results, "__getitem__")):
        raise TypeError(f"cannot take apart what {name}() returned for a batch of {count}: it is a {type(results).__qualname__}, and must be a list with a result for each item")
    if len(results) != count:
        raise ValueError(f"cannot take apart what {name}() returned for a batch of {count}: it has {len(results)} results, and must have one for each item, in their order")
    return list(results)


#: Those in use. Two copies of a function are one function if code and globals are the same; what closes over values is not.
_queues: dict[Any, _Queue] = {}


def _queue_of(batched: Batched[Any, Any]) -> _Queue:
    import asyncio

    function: Any = batched.batch_function
    identity = function if function.__closure__ else (id(function.__globals__), function.__qualname__, function.__code__)
    key = (id(asyncio.get_running_loop()), identity, batched.max_batch_size, batched.wait_seconds)
    if key not in _queues:
        _queues[key] = _Queue(key, batched)
    return _queues[key]
