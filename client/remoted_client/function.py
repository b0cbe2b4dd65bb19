"""What ``@remote`` makes of a function: called, it starts a call and gives its handle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, TypeVar

from remoted_client.call_options import checked, refuse_unknown
from remoted_client.settings import Settings, name_of, streams

if TYPE_CHECKING:
    import inspect

    from remoted_client.handle import Handle
    from remoted_client.mapping import MapResult

P = ParamSpec("P")
H_co = TypeVar("H_co", covariant=True)
T = TypeVar("T")
MAP_KEYWORDS = ["return_exceptions", "progress"]
#: ``submission.start``, from the first call on: until then nothing that pickles or connects is imported.
_start: Callable[..., Any] | None = None


def _load_start() -> Callable[..., Any]:
    global _start
    from remoted_client.submission import start

    _start = start
    return start


class RemoteFunction(Generic[P, H_co]):
    """A function that runs in a worker. Calling it starts a call; ``H_co`` is the handle it gives.

    Example:
        >>> @remote(resource_config=CpuLiveServerless(name="demo"))
        ... def square(x: int) -> int: return x * x
        >>> square(3).result().output
        9
    """

    def __init__(self, function: Callable[P, Any], settings: Settings, options: dict[str, Any] | None = None) -> None:
        self._function = function
        self._settings = settings
        self._options = dict(options or {})
        self._stream = streams(function)
        self._signature: inspect.Signature | None = None
        self._positional = positional(function)
        functools.update_wrapper(self, function)

    @property
    def __remote_config__(self) -> dict[str, Any]:
        """What the decorator was told, under the SDK's names."""
        settings = self._settings
        return {
            "resource_config": settings.config,
            "method": settings.method,
            "path": settings.path,
            "dependencies": list(settings.dependencies) or None,
            "system_dependencies": list(settings.system_dependencies) or None,
        }

    def __repr__(self) -> str:
        return f"<remote function {name_of(self._function)} on {self._settings.config.name}>"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """A decorated method: the instance is sent along as the first argument."""
        call: Any = self
        return self if instance is None else functools.partial(call, instance)

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self._function, self._settings.without_values, self._options)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> H_co:
        """Start a call. Raises TypeError for arguments that do not fit, SerializationError for what cannot be sent."""
        if kwargs or self._positional is None or len(args) not in self._positional:
            self._check_arguments(args, kwargs)
        if self._settings.runs_here:
            return self.local(*args, **kwargs)
        result: H_co = (_start or _load_start())(self._function, self._settings, self._options, args, kwargs, self._stream)
        return result

    def local(self, *args: P.args, **kwargs: P.kwargs) -> H_co:
        """Run it here, without a daemon; gives the same types."""
        from remoted_client.local import LocalHandle, LocalStream, limits_of

        self._check_arguments(args, kwargs)
        kind = LocalStream if self._stream else LocalHandle
        handle: Any = kind(name_of(self._function), lambda: self._function(*args, **kwargs), limits_of(self._settings, self._options))
        result: H_co = handle
        return result

    def options(
        self,
        *,
        timeout: float | None = None,
        max_retries: int | None = None,
        detach: bool | None = None,
        name: str | None = None,
        priority: int | None = None,
        copy: bool | None = None,
        **unknown: NoReturn,
    ) -> RemoteFunction[P, H_co]:
        """The same function, with other settings for the calls made through what this returns.

        ``timeout`` in seconds per attempt; ``priority`` -100..100, among your own calls; ``detach=True`` lets the
        call outlive this process; ``copy=True`` gives arrays memory of their own at either end, instead of pages
        that are mapped and count as shared until the array is gone.
        """
        changed = checked(dict(timeout=timeout, max_retries=max_retries, detach=detach, name=name, priority=priority, copy=copy, **unknown))
        return RemoteFunction(self._function, self._settings, {**self._options, **changed})

    def map(
        self: RemoteFunction[Any, Handle[T]], *iterables: Iterable[Any], return_exceptions: bool = False, progress: bool = False, **unknown: NoReturn
    ) -> MapResult[T]:
        """Call it for every element (of several iterables in step); results come in input order.

        Yields what awaiting each handle gives; the first call is made when the first result is asked for. At most
        1,000 calls are on their way, so an endless iterable is fine. ``progress=True`` shows a line on stderr.
        """
        refuse_unknown("map", list(unknown), MAP_KEYWORDS)
        return self._mapped(zip(*iterables, strict=False), iterables, return_exceptions, progress)

    def starmap(
        self: RemoteFunction[Any, Handle[T]], arguments: Iterable[tuple[Any, ...]], *, return_exceptions: bool = False, progress: bool = False, **unknown: NoReturn
    ) -> MapResult[T]:
        """As ``map``, each element being the arguments of one call."""
        refuse_unknown("starmap", list(unknown), MAP_KEYWORDS)
        return self._mapped(arguments, (arguments,), return_exceptions, progress)

    def _mapped(self, arguments: Iterable[tuple[Any, ...]], measured: Iterable[Any], return_exceptions: bool, progress: bool) -> MapResult[Any]:
        from remoted_client.mapping import MapResult, shortest

        call: Any = self
        return MapResult(call, arguments, name_of(self._function), shortest(measured), return_exceptions=return_exceptions, progress=progress)

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not kwargs and self._positional is not None and len(args) in self._positional:
            return
        if self._signature is None:
            import inspect

            try:
                self._signature = inspect.signature(self._function)
            except ValueError:  # a builtin may have none: the call itself will tell
                return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name_of(self._function)}() {error}") from None


def positional(function: Callable[..., Any]) -> range | None:
    """How many positional arguments alone are right; None where only ``inspect`` can tell."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_kwonlyargcount or getattr(function, "__wrapped__", None) is not None:
        return None
    return range(code.co_argcount - len(function.__defaults__ or ()), code.co_argcount + 1)


def rebuild(function: Callable[..., Any], settings: Settings, options: dict[str, Any]) -> RemoteFunction[Any, Any]:
    """What a ``RemoteFunction`` is pickled as."""
    return RemoteFunction(function, settings, options)
