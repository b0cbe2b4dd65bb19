"""``@remote`` on a class: each instance lives in one worker and keeps its state between calls (MECHANISMS 14)."""

from __future__ import annotations

import functools
import hashlib
import inspect
import secrets
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from remoted_client import connection
from remoted_client.call_options import checked, refuse_unknown
from remoted_client.codec import function_identity
from remoted_client.errors import SerializationError
from remoted_client.function import MAP_KEYWORDS, positional
from remoted_client.handle import Handle, StreamHandle
from remoted_client.home import Home
from remoted_client.local import LocalHandle, LocalStream, limits_of
from remoted_client.mapping import MapResult, shortest
from remoted_client.settings import Settings, streams
from remoted_client.submission import constructor_upload, encode_arguments, submit
from remoted_client.suggest import did_you_mean

if TYPE_CHECKING:
    from remoted_client.connection import Upload

C = TypeVar("C")


class RemoteClass(Generic[C]):
    """Constructing it gives a ``RemoteInstance``; nothing runs remotely before the first method call.

    Example:
        >>> @remote(LiveServerless(name="llm"))
        ... class Model:
        ...     def __init__(self, path): self.weights = load(path)
        ...     def predict(self, x): ...
        >>> model = Model("weights.bin")
        >>> job = await model.predict(3)
    """

    def __init__(self, cls: type[C], settings: Settings, options: dict[str, Any] | None = None) -> None:
        self._class = cls
        self._settings = settings
        self._options = dict(options or {})
        functools.update_wrapper(self, cls, updated=())

    def __repr__(self) -> str:
        return f"<remote class {self._class.__qualname__} on {self._settings.config.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteClass, (self._class, self._settings.without_values, self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An instance. Raises TypeError when the arguments do not fit ``__init__``, SerializationError when they cannot be sent."""
        if self._settings.runs_here:
            return self.local(*args, **kwargs)
        self._check_arguments(args, kwargs)
        return RemoteInstance(self._class, self._settings, self._options, args, kwargs)

    def local(self, *args: Any, **kwargs: Any) -> Any:
        """An instance here, without a daemon; its methods give the same types."""
        self._check_arguments(args, kwargs)
        return _LocalInstance(self._class(*args, **kwargs), self._settings, self._options)

    def options(
        self,
        *,
        name: str | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        detach: bool | None = None,
        priority: int | None = None,
        **unknown: NoReturn,
    ) -> RemoteClass[C]:
        """The same class, with other settings for the calls of its instances' methods.

        With a ``name`` an instance outlives its handle and this process: whoever constructs it again, by this name, from
        the same source and equal plain arguments, has the same one, until ``close()`` or the worker's idleTimeout.
        """
        changed = checked(dict(name=name, timeout=timeout, max_retries=max_retries, detach=detach, priority=priority, **unknown))
        return RemoteClass(self._class, self._settings, {**self._options, **changed})

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            inspect.signature(self._class).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._class.__qualname__}() {error}") from None


class _Method:
    """What stands behind a method, and what may be given to it."""

    def __init__(self, cls: type, name: str, static: Any) -> None:
        self.found = getattr(cls, name)
        self.function = getattr(static, "__func__", static)
        self.streams = streams(self.function)
        self._name = f"{cls.__qualname__}.{name}"
        self._signature = inspect.signature(self.found)
        #: What ``inspect`` needs beside the arguments, and the code.
        self._before = () if isinstance(static, (staticmethod, classmethod)) else (None,)
        self._bound = () if isinstance(static, staticmethod) else (None,)
        self._positional = positional(self.function)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises TypeError for arguments that do not fit."""
        if not kwargs and self._positional is not None and len(args) + len(self._bound) in self._positional:
            return
        try:
            self._signature.bind(*self._before, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._name}() {error}") from None


class _Methods:
    """Public methods of the class as calls; anything else says what there is."""

    _class: type
    _options: dict[str, Any]
    _known: dict[str, _Method]

    def __getattr__(self, name: str) -> Any:
        if "_known" not in self.__dict__:  # a copy that is being made asks before it has anything
            raise AttributeError(name)
        self._look_up(name)
        return RemoteMethod(self, name, {word: value for word, value in self._options.items() if word != "name"} if self._options else {})

    def _look_up(self, name: str) -> _Method:
        """Looked at once, as long as the class has the same function. Raises AttributeError, naming what there is."""
        known = self._known.get(name)
        if known is not None and known.found is getattr(self._class, name, None):
            return known
        static = inspect.getattr_static(self._class, name, None)
        if name.startswith("_") or not (inspect.isfunction(static) or isinstance(static, (staticmethod, classmethod))):
            public = [word for word, value in vars(self._class).items() if inspect.isfunction(value) and not word.startswith("_")]
            hint = "it is a property: give it a method" if isinstance(static, property) else f"it has {', '.join(public) or 'no methods'}"
            raise AttributeError(f"cannot call {self._class.__qualname__}.{name} remotely: {hint}{did_you_mean(name, public)}")
        found = self._known[name] = _Method(self._class, name, static)
        return found

    def _call(self, method: str, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class RemoteMethod:
    """A method of one instance: called, it starts a call; ``options``, ``map`` and ``starmap`` are those of functions."""

    def __init__(self, instance: _Methods, name: str, options: dict[str, Any]) -> None:
        self._instance = instance
        self._name = name
        self._options = options

    def __repr__(self) -> str:
        return f"<remote method {self._qualname} of {self._instance!r}>"

    @property
    def _qualname(self) -> str:
        return f"{self._instance._class.__qualname__}.{self._name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instance._call(self._name, self._options, args, kwargs)

    def options(self, **options: Any) -> RemoteMethod:
        """The same method, with other settings for the calls made through what this returns: those of a function."""
        return RemoteMethod(self._instance, self._name, {**self._options, **checked(options)})

    def map(self, *iterables: Iterable[Any], return_exceptions: bool = False, progress: bool = False, **unknown: NoReturn) -> MapResult[Any]:
        """Call it for every element (of several iterables in step); results come in input order."""
        refuse_unknown("map", list(unknown), MAP_KEYWORDS)
        return MapResult(self, zip(*iterables, strict=False), self._qualname, shortest(iterables), return_exceptions=return_exceptions, progress=progress)

    def starmap(self, arguments: Iterable[tuple[Any, ...]], *, return_exceptions: bool = False, progress: bool = False, **unknown: NoReturn) -> MapResult[Any]:
        """As ``map``, each element being the arguments of one call."""
        refuse_unknown("starmap", list(unknown), MAP_KEYWORDS)
        return MapResult(self, arguments, self._qualname, shortest((arguments,)), return_exceptions=return_exceptions, progress=progress)


class RemoteInstance(_Methods):
    """One instance. ``await obj.method(x)`` runs in its worker; leaving the scope or ``close()`` drops it there.

    One with a name is not dropped with its handle.
    """

    def __init__(self, cls: type, settings: Settings, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._class, self._known = cls, {}
        self._settings = settings
        self._options = options
        line = connection.current()
        name = options.get("name")
        self._is_named = name is not None
        instance = secrets.token_hex(16) if name is None else _id_of(line, cls, settings, name, args, kwargs)
        # Complete in itself: it may be replayed in another worker, beside newer code.
        self._home = self._make_home(instance, constructor_upload(encode_arguments(line, args, kwargs, None)))

    def _make_home(self, instance: str, constructor: Upload) -> Home:
        """Without a name it goes behind this object and the last of its calls."""
        home = Home(instance, constructor)
        if not self._is_named:
            weakref.finalize(home, _drop, instance)
        return home

    if not TYPE_CHECKING:

        def __setattr__(self, name, value):
            if name.startswith("_") and "_home" not in self.__dict__:
                self.__dict__[name] = value
                return
            raise AttributeError(f"cannot set {name}: the instance of {self._class.__qualname__} lives in a worker; give the class a method that sets it")

    def __reduce__(self) -> str | tuple[Any, ...]:
        name = self._class.__qualname__
        raise TypeError(f"an instance of a remote class belongs to its process; call its methods here, or give it a name, {name}.options(name=...)(...), and construct it by that name there")

    def __repr__(self) -> str:
        return f"<remote instance {self._home.id[:8]} of {self._class.__qualname__}>"

    def _call(self, method: str, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = self._look_up(method)
        called.check(args, kwargs)
        state = submit(
            connection.current(),
            self._class,
            self._settings,
            options,
            args,
            kwargs,
            stream=called.streams,
            method=(self._home, method),
            name=f"{self._class.__qualname__}.{method}",
        )
        return StreamHandle(state) if called.streams else Handle(state)

    def close(self) -> None:
        """Drop the instance in its worker (its own ``close`` is called there), behind the calls that were made before."""
        old = self._home
        if self._is_named:
            weakref.finalize(old, _drop, old.id)
        self.__dict__["_home"] = self._make_home(old.id if self._is_named else secrets.token_hex(16), old.constructor)


def _id_of(line: connection.Connection, cls: type, settings: Settings, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Equal in every process of the user that means the same instance. Raises SerializationError for arguments that have no content to compare."""
    pool = (type(settings.config).__name__, settings.config.name, settings.dependencies)
    content = [line.encoder.content_digest(value) for value in (*args, *sorted(kwargs.items()))]
    if None in content:
        raise SerializationError(f"cannot name this instance of {cls.__qualname__}: its arguments cannot be compared with those of another process; pass plain data")
    parts = (function_identity(cls), pool, name, len(args), content)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _drop(instance: str) -> None:
    connection.current().send({"op": "drop_instance", "instance": instance})


class _LocalInstance(_Methods):
    """The same, here."""

    def __init__(self, instance: Any, settings: Settings, options: dict[str, Any]) -> None:
        self._class, self._known = type(instance), {}
        self._instance = instance
        self._options = options
        self._settings = settings

    def _call(self, method: str, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = self._look_up(method)
        called.check(args, kwargs)
        bound = getattr(self._instance, method)
        kind = LocalStream if called.streams else LocalHandle
        return kind(f"{self._class.__qualname__}.{method}", lambda: bound(*args, **kwargs), limits_of(self._settings, options))

    def close(self) -> None:
        close = getattr(self._instance, "close", None)
        if callable(close):
            close()
