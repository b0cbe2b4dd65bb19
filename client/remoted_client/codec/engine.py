"""Both directions of one process, with all that they need imported: made at the first use of an encoder or decoder.

``Engine.target`` builds a function's code and tells when it is out of date; ``write`` and ``read`` carry values.
"""

from __future__ import annotations

import hashlib
import io
import sys
import types
import uuid
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

from .code import MAGIC, Code
from .diagnose import Part, explain
from .dump import Known, Pickler
from .files import opened
from .load import Unpickler
from .marks import MISSING, FunctionMark, digest
from .modules import ModuleSet
from .namespaces import Home
from .origin import Origin, Ref
from .reference import MAIN_NAMES
from .walk import reachable


class Target:
    """A function's code, and all that it was made from."""

    def __init__(self, code: Code, pickler: Pickler, origin: Origin) -> None:
        self.code = code
        self._globals = tuple(pickler.watched.values())
        self._functions = [FunctionMark(function, origin) for function in pickler.functions.values()]

    def is_current(self) -> bool:
        """Has nothing that the code captured changed at the caller?"""
        for scope, name, found in self._globals:
            if not found.same(scope.get(name, MISSING)):
                return False
        for found in self._functions:  # noqa: SIM110 - asked at every call, and a generator costs as much again
            if not found.is_unchanged():
                return False
        return True

    def with_modules(self, modules: ModuleSet) -> Code:
        old = self.code
        self.code = Code(old.digest, old.payload, modules, old.parameters, old.known)
        return self.code


class Engine:
    """One process as sender and receiver."""

    def __init__(self) -> None:
        self.origin = Origin()
        self.home = Home(self.origin)
        self._sent_classes: dict[str, type] = {}

    def target(self, function: Callable[..., Any], modules: ModuleSet) -> Target:
        """The code of a function, class or other callable."""
        file = io.BytesIO()
        pickler = Pickler(file, self.origin)
        names = [(scope, name) for scope, name in reachable(function) if self.origin.ref(scope)[0] == "value"]
        try:
            pickler.dump((self._main(function), len(names)))
            pickler.bind_all(names)
            pickler.dump(function)
        except Exception as error:
            raise explain([(f"function {_name(function)!r}", function)], self.origin, error) from error
        self._sent_classes.update(pickler.classes)
        identity = self._digest(function, pickler)
        payload = b"".join((MAGIC, identity.encode(), file.getbuffer()))
        return Target(Code(identity, payload, modules, _parameters(function), _brought(pickler)), pickler, self.origin)

    def write(
        self,
        file: BinaryIO,
        value: object,
        parts: Callable[[], Iterable[Part]],
        known: Known | None = None,
        wants: Callable[[Ref, str], bool] | None = None,
        sources: bool = True,
        buffer_callback: Callable[[Any], Any] | None = None,
    ) -> None:
        """Pickle a value; ``parts`` names what it consists of, should it fail."""
        pickler = Pickler(file, self.origin, known, wants, sources, buffer_callback)
        try:
            pickler.dump(value)
        except Exception as error:
            raise explain(parts(), self.origin, error) from error
        if pickler.classes:
            self._sent_classes.update(pickler.classes)

    def read(self, payload: Any, run: str = "", buffers: Iterable[Any] | None = None) -> Any:
        """Unpickle a value from bytes or a file."""
        return Unpickler(opened(payload), self.home, run, buffers).load()

    def _main(self, function: object) -> Ref:
        """The script's namespace. In a child that was spawned, and in a worker, there may be several."""
        scope = getattr(function, "__globals__", None)
        if scope is None or scope.get("__name__") not in MAIN_NAMES:
            scope = sys.modules["__main__"].__dict__
        return self.origin.ref(scope)

    def _digest(self, function: object, pickler: Pickler) -> str:
        """Of names and versions, never of pickle bytes."""
        root = digest(function, self.origin) or uuid.uuid4().bytes
        bound = sorted((ref[1], ref[2], name, version) for (ref, name), version in pickler.bound.items())
        parts = (self.origin.run, root, bound, sorted(pickler.functions), sorted(pickler.classes))
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _brought(pickler: Pickler) -> Known:
    return Known(pickler.bound, frozenset(pickler.functions), frozenset(pickler.classes), frozenset(pickler.sources))


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def _parameters(function: Any) -> tuple[str, ...]:
    bound = isinstance(function, type)
    code = getattr(getattr(function, "__init__", None) if bound else function, "__code__", None)
    return tuple(code.co_varnames[bound : code.co_argcount]) if isinstance(code, types.CodeType) else ()
