"""What a process keeps of code that came from elsewhere: namespaces, functions by token, closure cells.

A namespace is the globals of one module of one script run. It lives as long as the process, and remembers which
version of each name it was given, so that what calls put there stays until the caller sends something new.
"""

from __future__ import annotations

import builtins
import sys
import types
import weakref
from collections.abc import Iterator

from .dump import Known
from .mainfile import MainFile, MainSpec
from .origin import Origin, Ref, Scope


class Namespace:
    """The globals of one module of one script run."""

    def __init__(self, ref: Ref) -> None:
        attributes = dict(ref[3])
        self.ref = ref
        self.versions: dict[str, int] = {}
        self.module = types.ModuleType(str(attributes.get("__name__", ref[2])))
        self.scope: Scope = self.module.__dict__
        self.scope.update(attributes, __builtins__=builtins)

    def bind(self, name: str, version: int, value: object) -> None:
        if self.versions.get(name) != version:
            self.scope[name] = value
            self.versions[name] = version


class Home:
    """What this process keeps of code that came from elsewhere."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.main_file = MainFile()
        self.spaces: dict[tuple[str, str], Namespace] = {}
        #: The run that each class came from, by tracker id.
        self.classes: dict[str, str] = {}
        self._functions: weakref.WeakValueDictionary[str, types.FunctionType] = weakref.WeakValueDictionary()
        self._cells: dict[str, tuple[weakref.ref[types.FunctionType], int]] = {}

    def space(self, ref: Ref) -> Namespace:
        key = (ref[1], ref[2])
        space = self.spaces.get(key)
        if space is None:
            space = self.spaces[key] = Namespace(ref)
            space.module.__spec__ = MainSpec(self, space)
            self.origin.adopt_scope(space.scope, ref)
        return space

    def is_own(self, ref: Ref) -> bool:
        """Did this process send it?"""
        return ref[0] == "value" and bool(ref[1] == self.origin.run) and self.origin.scope(ref[2]) is not None

    def scope(self, ref: Ref) -> Scope:
        if ref[0] == "module":
            __import__(ref[1])
            return vars(sys.modules[ref[1]])
        own = self.origin.scope(ref[2]) if self.is_own(ref) else None
        return self.space(ref).scope if own is None else own

    def module(self, ref: Ref) -> types.ModuleType:
        return sys.modules[dict(ref[3])["__name__"]] if self.is_own(ref) else self.space(ref).module

    def bind(self, ref: Ref, name: str, version: int, value: object) -> None:
        """Set a global; the caller's own are not touched, only those it lacks are added."""
        if self.is_own(ref):
            self.scope(ref).setdefault(name, value)
        else:
            self.space(ref).bind(name, version, value)

    def forget(self, run: str) -> None:
        """Drop the namespaces of a run."""
        for key in [key for key in self.spaces if key[0] == run]:
            self.origin.drop_scope(self.spaces.pop(key).scope)
        for tracker in list(self.known_to(run).classes):
            del self.classes[tracker]

    def known_to(self, run: str) -> Known:
        """What the caller of a run surely has: the classes that it sent."""
        return Known(classes=_ClassesOf(self.classes, run))

    def is_news(self, ref: Ref, name: str) -> bool:
        """Has the caller not got this global?"""
        space = self.spaces.get((ref[1], ref[2]))
        return space is None or name not in space.versions

    def function(self, token: str) -> types.FunctionType | None:
        return self._functions.get(token) or self.origin.function(token)

    def keep_function(self, token: str, function: types.FunctionType) -> None:
        self._functions[token] = function
        self.origin.adopt_function(function, token)

    def cell(self, token: str) -> types.CellType | None:
        """A living cell: that of a living function."""
        reference, index = self._cells.get(token, (None, 0))
        function = reference() if reference is not None else None
        return function.__closure__[index] if function is not None and function.__closure__ else None

    def keep_cell(self, token: str, function: types.FunctionType, index: int) -> None:
        self._cells[token] = (weakref.ref(function), index)
        weakref.finalize(function, self._forget_cell, token).atexit = False

    def _forget_cell(self, token: str) -> None:
        if self.cell(token) is None:
            self._cells.pop(token, None)

    def sentinel(self, token: str) -> object:
        value = self.origin.sentinel_of(token)
        if value is None:
            value = object()
            self.origin.adopt_sentinel(value, token)
        return value


class _ClassesOf:
    """The tracker ids of classes that came from one run."""

    def __init__(self, runs: dict[str, str], run: str) -> None:
        self._runs, self._run = runs, run

    def __contains__(self, tracker: object) -> bool:
        return self._runs.get(tracker) == self._run  # type: ignore[call-overload, no-any-return]

    def __iter__(self) -> Iterator[str]:
        return (tracker for tracker, run in self._runs.items() if run == self._run)

    def __len__(self) -> int:
        return sum(1 for _ in self)
