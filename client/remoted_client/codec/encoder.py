"""The caller's side: a function, its arguments, and what comes back.

Called by the client for every call, so the common case, the same function with nothing changed, costs a look at
each global that its code refers to. It never asks what a worker has: ``Code`` is complete, equal code has an
equal digest, and whoever carries it may leave out what is there already.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from .code import Code
from .modules import collect_modules

if TYPE_CHECKING:
    import pickle

    from .engine import Engine, Target


#: How many forks this process is away from the one that imported this.
_generation = 0


def _count_fork() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_count_fork)


class Encoder:
    """Sends the code and values of this process. One per process; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._generation = 0
        self._made: Engine | None = None
        #: By id; a weakref.WeakKeyDictionary costs three times as much to ask.
        self._targets: dict[int, tuple[weakref.ref[Any], Target]] = {}

    @property
    def run_id(self) -> str:
        """The name of this run of the script."""
        return self._engine().origin.run

    def encode_call_target(self, function: Callable[..., Any]) -> Code:
        """The code of a function or class, with the globals that it refers to.

        The same ``Code`` object is returned for as long as nothing has changed.
        """
        with self._lock:
            engine, modules = self._engine(), collect_modules()
            known = self._targets.get(id(function))
            if known is not None and known[0]() is function and known[1].is_current():
                target = known[1]
            else:
                target = engine.target(function, modules)
                self._keep_target(function, target)
            return target.code if target.code.modules is modules else target.with_modules(modules)

    def encode_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any], code: Code | None = None) -> bytes:
        """The arguments as bytes. With ``code``, what its payload brings is not sent again."""
        file = io.BytesIO()
        self.encode_arguments_into(file, args, kwargs, code)
        return file.getvalue()

    def encode_arguments_into(
        self,
        file: BinaryIO,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        code: Code | None = None,
        buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
    ) -> None:
        """The arguments, written to ``file``; large bytes are written from where they are."""
        with self._lock:
            self._engine().write(
                file,
                (args, kwargs),
                lambda: _parts(args, kwargs, code),
                None if code is None else code.known,
                buffer_callback=buffer_callback,
            )

    def decode_result(self, payload: Any, buffers: Iterable[Any] | None = None) -> Any:
        """A result, from bytes or a file. Classes and functions of this process are the ones it has."""
        with self._lock:
            return self._engine().read(payload, buffers=buffers)

    def content_digest(self, value: object) -> str | None:
        """Equal for equal plain values, in every process; None if it cannot be pickled."""
        from .marks import digest

        with self._lock:
            found = digest(value, self._engine().origin)
        return None if found is None else found.hex()

    def _engine(self) -> Engine:
        """A forked child goes its own way, so it is a run of its own."""
        if self._made is None or self._generation != _generation:
            from .engine import Engine

            self._made, self._generation = Engine(), _generation
            self._targets.clear()
        return self._made

    def _keep_target(self, function: object, target: Target) -> None:
        key, targets = id(function), self._targets

        def forget(gone: weakref.ref[Any]) -> None:
            if key in targets and targets[key][0] is gone:
                del targets[key]

        with contextlib.suppress(TypeError):  # not weakly referable: built anew each time
            targets[key] = weakref.ref(function, forget), target


def _parts(args: tuple[Any, ...], kwargs: dict[str, Any], code: Code | None) -> Iterator[tuple[str, Any]]:
    names = () if code is None else code.parameters
    for index, value in enumerate(args):
        yield f"argument {names[index]!r}" if index < len(names) else f"argument {index}", value
    for name, value in kwargs.items():
        yield f"argument {name!r}", value
