"""The worker's side: targets and arguments come in, results go out.

One per worker. Namespaces, classes and functions that were read stay as they are until the process ends or
``forget`` is called; ``sys.modules["__main__"]`` is the namespace of the script whose target was loaded last.
"""

from __future__ import annotations

import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, BinaryIO

from .code import split

if TYPE_CHECKING:
    import pickle

    from .engine import Engine
    from .origin import Ref

_MAX_TARGETS = 4096


class _Target:
    """A loaded target. It holds every class and function of its payload: arguments refer to them by name."""

    __slots__ = ("kept", "main", "value")

    def __init__(self, main: Ref, value: Any, kept: list[object]) -> None:
        self.main, self.value, self.kept = main, value, kept


class Decoder:
    """Reads what ``Encoder`` wrote. One per process; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._made: Engine | None = None
        self._targets: OrderedDict[str, _Target] = OrderedDict()
        self._newest: _Target | None = None
        self._mains: dict[str, Ref] = {}
        self._run = ""
        self._first_main = sys.modules.get("__main__")
        #: Whose script is ``__main__`` now, and that module.
        self._entered: tuple[Ref, types.ModuleType] | None = None

    def load_target(self, payload: bytes | bytearray | memoryview, digest: str = "") -> Any:
        """The function or class of a ``Code.payload``; read once per digest."""
        with self._lock:
            digest = digest or split(payload)[0]
            target = self._targets.get(digest)
            if target is None:
                target = self._targets[digest] = self._read_target(payload)
                if len(self._targets) > _MAX_TARGETS:
                    self._targets.popitem(last=False)
            if target is not self._newest:
                self._targets.move_to_end(digest)
                self._newest = target
            self._enter(target.main)
            return target.value

    def load_arguments(
        self, payload: Any, buffers: Iterable[Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)``, from bytes or a file; after the target they were made for."""
        with self._lock:
            args, kwargs = self._engine().read(payload, self._run, buffers)
            return args, kwargs

    def load_result(self, payload: Any, buffers: Iterable[Any] | None = None) -> Any:
        """What ``encode_result`` wrote."""
        with self._lock:
            return self._engine().read(payload, self._run, buffers)

    def encode_result(
        self,
        value: Any,
        file: BinaryIO,
        *,
        standalone: bool = True,
        buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
    ) -> None:
        """Write a result.

        ``standalone=False`` is for the caller that is waiting: its classes are named and its globals left out.
        Otherwise any process can read it.
        """
        with self._lock:
            engine = self._engine()
            known, wants = (None, None) if standalone else (engine.home.known_to(self._run), engine.home.is_news)
            engine.write(file, value, lambda: [("the result", value)], known, wants, False, buffer_callback)

    def activate(self, run_id: str) -> None:
        """Make a run's script the ``__main__`` of this process."""
        with self._lock:
            self._enter(self._mains[run_id])

    def forget(self, run_id: str) -> None:
        """Drop the namespaces and targets of a run that has ended."""
        with self._lock:
            self._engine().home.forget(run_id)
            for digest in [digest for digest, target in self._targets.items() if target.main[1] == run_id]:
                del self._targets[digest]
            self._mains.pop(run_id, None)
            self._entered = None

    def _engine(self) -> Engine:
        if self._made is None:
            from .engine import Engine

            self._made = Engine()
        return self._made

    def _read_target(self, payload: bytes | bytearray | memoryview) -> _Target:
        from .files import opened
        from .load import Unpickler

        reader = Unpickler(opened(split(payload)[1]), self._engine().home)
        main, count = reader.load()
        reader.run = main[1]
        self._enter(main)
        for _ in range(count):
            reader.load()
        return _Target(main, reader.load(), reader.kept)

    def _enter(self, main: Ref) -> None:
        if main[0] != "value":
            return
        if self._entered is not None and self._entered[0] is main and sys.modules.get("__main__") is self._entered[1]:
            return
        self._run = main[1]
        self._mains[self._run] = main
        module = self._engine().home.module(main)
        self._entered = main, module
        if sys.modules.get("__main__") is not module:
            sys.modules["__main__"] = module
            if module.__name__ != "__main__":  # the caller is a spawned child itself
                sys.modules[module.__name__] = module


def decode_result(payload: Any, buffers: Iterable[Any] | None = None) -> Any:
    """A result, in a process that has nothing to do with the call."""
    from .engine import Engine

    return Engine().read(payload, buffers=buffers)
