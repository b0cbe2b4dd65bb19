"""The unpickler: it builds into namespaces that live on, and leaves alone what it has built before.

A class or function that is here already is taken as it is, so its attributes and closures keep what calls did to
them; a global is set only if its version is new here.

A class is made without running hooks of the script (``__init_subclass__``, a metaclass's ``__new__``): they ran at
the caller, and what they did is in the values that travel.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pickle import Unpickler as PlainUnpickler
from typing import Any

from cloudpickle import cloudpickle as cp  # type: ignore[import-untyped, unused-ignore]

from .errors import BadPayload
from .namespaces import Home
from .origin import Ref

_OPS = f"{__package__}.ops"


class Unpickler(PlainUnpickler):
    """Reads one payload into a ``Home``; ``kept`` lists the functions and classes it holds."""

    def __init__(self, file: Any, home: Home, run: str = "", buffers: Iterable[Any] | None = None) -> None:
        super().__init__(file, buffers=buffers)
        self._home = home
        self.run = run
        self._fresh: set[int] = set()
        self._cell_tokens: dict[int, str] = {}
        self.kept: list[object] = []

    def find_class(self, module: str, name: str) -> Any:
        if module == _OPS:
            return getattr(self, f"_{name}")
        return super().find_class(module, name)

    # -- functions -----------------------------------------------------------------------------------------

    def _make_function(
        self, ref: Ref, token: str, code: types.CodeType, cells: tuple[types.CellType, ...] | None
    ) -> types.FunctionType:
        scope = self._home.scope(ref)
        function = self._home.function(token)
        if function is None or function.__globals__ is not scope:  # its run was forgotten
            function = types.FunctionType(code, scope, code.co_name, None, cells)
            self._fresh.add(id(function))
            self._home.keep_function(token, function)
            for index, cell in enumerate(cells or ()):
                if id(cell) in self._cell_tokens:
                    self._home.keep_cell(self._cell_tokens[id(cell)], function, index)
        self.kept.append(function)
        return function

    def _set_function(self, function: types.FunctionType, state: tuple[Any, ...]) -> None:
        slots, attributes, _, fillings, source, _ = state
        for cell, value in fillings:
            if id(cell) in self._fresh:
                self._fresh.discard(id(cell))
                cell.cell_contents = value
        if id(function) in self._fresh:
            self._fresh.discard(id(function))
            function.__dict__.update(attributes)
            for name, value in slots.items():
                setattr(function, name, value)
        if source is not None:
            remember_source(*source)

    def _make_cell(self, token: str) -> types.CellType:
        cell = self._home.cell(token)
        if cell is None:
            cell = types.CellType()
            self._fresh.add(id(cell))
        self._cell_tokens[id(cell)] = token
        self.kept.append(cell)
        return cell

    def _known_function(self, token: str) -> types.FunctionType:
        function = self._home.function(token)
        if function is None:
            raise BadPayload("cannot find a function that the payload before this one should have brought")
        return function

    # -- globals -------------------------------------------------------------------------------------------

    def _bind(self, ref: Ref, name: str, version: int, value: object) -> None:
        self._home.bind(ref, name, version, value)

    def _namespace_module(self, ref: Ref) -> types.ModuleType:
        return self._home.module(ref)

    def _sentinel(self, token: str) -> object:
        return self._home.sentinel(token)

    def _applied(self, *_: object) -> None:
        return None

    # -- classes -------------------------------------------------------------------------------------------

    def _known_class(self, tracker: str) -> type:
        known: type | None = _tracked(tracker)
        if known is None:
            raise BadPayload("cannot find a class that the payload before this one should have brought")
        return known

    def _make_class(
        self, kind: type, name: str, bases: tuple[Any, ...], options: dict[str, Any], tracker: str, _: object
    ) -> type:
        return self._made(tracker, lambda: _new_class(kind, name, bases, options))

    def _make_enum(
        self, bases: Any, name: str, qualname: str, members: Any, module: str, tracker: str, _: object
    ) -> type:
        return self._made(tracker, lambda: _new_enum(bases, name, qualname, members, module))

    def _made(self, tracker: str, make: Callable[[], type]) -> type:
        cls: type | None = _tracked(tracker)
        if cls is None:
            cls = cp._lookup_class_or_track(tracker, make())
            self._fresh.add(id(cls))
            self._home.classes[tracker] = self.run
        self.kept.append(cls)
        return cls

    def _set_class(self, cls: Any, state: tuple[dict[str, Any], dict[str, Any], object]) -> None:
        if id(cls) not in self._fresh:
            return
        self._fresh.discard(id(cls))
        attributes, members, _ = state
        cp._class_setstate(cls, (attributes, {}))
        for name, values in members.items():
            vars(cls[name]).update(values)


def remember_source(filename: str, text: str) -> None:
    """Let ``linecache`` show the text that runs, not what the disk has by now (no mtime: it is not checked)."""
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)


def _tracked(tracker: str) -> Any:
    return cp._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker)


def _new_class(kind: type, name: str, bases: tuple[type, ...], options: dict[str, Any]) -> type:
    body = {sys.intern(key): value for key, value in options.items()}
    with _without_hooks(bases):
        if kind in cp._DYNAMIC_CLASS_TRACKER_BY_CLASS:
            return _builtin_maker(kind)(kind, name, bases, body)  # type: ignore[no-any-return]
        if kind.__name__ == "_TypedDictMeta":  # it refuses the bases that it has given the class
            return type.__new__(kind, name, bases, body)
        return types.new_class(name, bases, {"metaclass": kind}, lambda namespace: namespace.update(body))


def _builtin_maker(kind: type) -> Any:
    """The ``__new__`` of the nearest metaclass that is not of the script."""
    return next(each for each in kind.__mro__ if each not in cp._DYNAMIC_CLASS_TRACKER_BY_CLASS).__new__


def _new_enum(bases: Any, name: str, qualname: str, members: dict[str, Any], module: str) -> type:
    kind: Any = type(bases[-1])
    with _without_hooks(bases):
        body = kind.__prepare__(name, bases)
        for member, value in members.items():
            body[member] = value
        made: type = kind.__new__(kind, name, bases, body)
    made.__module__, made.__qualname__ = module, qualname
    return made


@contextlib.contextmanager
def _without_hooks(bases: tuple[type, ...]) -> Iterator[None]:
    """Take ``__init_subclass__`` off the script's classes for a moment."""
    taken = {}
    for cls in {each for base in bases for each in base.__mro__}:
        if "__init_subclass__" in vars(cls) and cls in cp._DYNAMIC_CLASS_TRACKER_BY_CLASS:
            taken[cls] = vars(cls)["__init_subclass__"]
            type.__setattr__(cls, "__init_subclass__", classmethod(_no_hook))
    try:
        yield
    finally:
        for cls, hook in taken.items():
            type.__setattr__(cls, "__init_subclass__", hook)


def _no_hook(*_: object, **__: object) -> None:
    """In place of a hook that has run at the caller."""
