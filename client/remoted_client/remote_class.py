"""``@remote`` on a class: each instance lives in one worker and keeps its state between calls (MECHANISMS 14)."""

from __future__ import annotations

import functools
import inspect
import secrets
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from remoted_client import connection
from remoted_client.handle import Handle, StreamHandle
from remoted_client.local import LocalHandle, LocalStream, limits_of
from remoted_client.settings import Settings, streams
from remoted_client.submission import encode_arguments, submit
from remoted_client.suggest import did_you_mean

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

    def __init__(self, cls: type[C], settings: Settings) -> None:
        self._class = cls
        self._settings = settings
        functools.update_wrapper(self, cls, updated=())

    def __repr__(self) -> str:
        return f"<remote class {self._class.__qualname__} on {self._settings.config.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteClass, (self._class, self._settings.without_values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An instance. Raises TypeError when the arguments do not fit ``__init__``, SerializationError when they cannot be sent."""
        if self._settings.runs_here:
            return self.local(*args, **kwargs)
        self._check_arguments(args, kwargs)
        return RemoteInstance(self._class, self._settings, args, kwargs)

    def local(self, *args: Any, **kwargs: Any) -> Any:
        """An instance here, without a daemon; its methods give the same types."""
        self._check_arguments(args, kwargs)
        return _LocalInstance(self._class(*args, **kwargs), self._settings)

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            inspect.signature(self._class).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._class.__qualname__}() {error}") from None


class _Methods:
    """Public methods of the class as calls; anything else says what there is."""

    _class: type

    def __getattr__(self, name: str) -> Any:
        found = inspect.getattr_static(self._class, name, None)
        if name.startswith("_") or not (inspect.isfunction(found) or isinstance(found, (staticmethod, classmethod))):
            public = [word for word, value in vars(self._class).items() if inspect.isfunction(value) and not word.startswith("_")]
            hint = "it is a property: give it a method" if isinstance(found, property) else f"it has {', '.join(public) or 'no methods'}"
            raise AttributeError(f"cannot call {self._class.__qualname__}.{name} remotely: {hint}{did_you_mean(name, public)}")
        return functools.partial(self._call, name)

    def _call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _check(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function behind the method, its arguments checked."""
        found = inspect.getattr_static(self._class, method)
        bound = inspect.signature(getattr(self._class, method))
        try:
            bound.bind(*(args if isinstance(found, (staticmethod, classmethod)) else (None, *args)), **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._class.__qualname__}.{method}() {error}") from None
        return getattr(found, "__func__", found)


class RemoteInstance(_Methods):
    """One instance. ``await obj.method(x)`` runs in its worker; leaving the scope or ``close()`` drops it there."""

    def __init__(self, cls: type, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._class = cls
        self._settings = settings
        self._id = secrets.token_hex(16)
        line = connection.current()
        # Complete in itself: it may be replayed in another worker, beside newer code.
        self._constructor = encode_arguments(line, args, kwargs, None)
        self._finalizer = weakref.finalize(self, _drop, self._id)

    if not TYPE_CHECKING:

        def __setattr__(self, name, value):
            if name.startswith("_") and "_finalizer" not in self.__dict__:
                self.__dict__[name] = value
                return
            raise AttributeError(f"cannot set {name}: the instance of {self._class.__qualname__} lives in a worker; give the class a method that sets it")

    def __repr__(self) -> str:
        return f"<remote instance {self._id[:8]} of {self._class.__qualname__}>"

    def _call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        function = self._check(method, args, kwargs)
        stream = streams(function)
        state = submit(
            connection.current(),
            self._class,
            self._settings,
            {},
            args,
            kwargs,
            stream=stream,
            instance=(self._id, method, self._constructor),
            name=f"{self._class.__qualname__}.{method}",
        )
        return StreamHandle(state) if stream else Handle(state)

    def close(self) -> None:
        """Drop the instance in its worker (its own ``close`` is called there)."""
        self._finalizer()


def _drop(instance: str) -> None:
    connection.current().send({"op": "drop_instance", "instance": instance})


class _LocalInstance(_Methods):
    """The same, here."""

    def __init__(self, instance: Any, settings: Settings) -> None:
        self._class = type(instance)
        self._instance = instance
        self._settings = settings

    def _call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        function = self._check(method, args, kwargs)
        bound = getattr(self._instance, method)
        kind = LocalStream if streams(function) else LocalHandle
        return kind(f"{self._class.__qualname__}.{method}", lambda: bound(*args, **kwargs), limits_of(self._settings, {}))

    def close(self) -> None:
        close = getattr(self._instance, "close", None)
        if callable(close):
            close()
