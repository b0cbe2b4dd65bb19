"""The pickler: cloudpickle's, but functions leave their globals at home and classes are sent to be kept.

A function is written as code, contents and the *name* of its namespace; each global that it refers to follows
once per payload as a binding (name, version, value). Bindings are written at the very place where the function
that needs them is, so that they are set before anything later in the pickle runs code of the script
(``__setstate__``, ``__hash__``, ``__reduce__``).
"""

from __future__ import annotations

import linecache
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pickle import PicklingError
from typing import Any, BinaryIO, ClassVar

from cloudpickle import cloudpickle as cp  # type: ignore[import-untyped, unused-ignore]

from . import ops
from .blank import shown
from .marks import MISSING, Mark, is_special, mark
from .origin import Origin, Ref, Scope, contents
from .reducers import TABLE
from .reference import MAIN_NAMES, by_reference, import_name, importable, is_made_in_c
from .tensors import reduce_storage
from .walk import names_of

#: Texts of source files above this stay at home; tracebacks then show what the disk has.
_SOURCE_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Known:
    """What the receiver has for certain, from the payload before this one."""

    names: Mapping[tuple[Ref, str], int] = field(default_factory=dict)
    functions: Collection[str] = frozenset()
    classes: Collection[str] = frozenset()
    sources: Collection[str] = frozenset()


_NOTHING = Known()


class Binding:
    """Stands in a pickle where a global is to be set."""

    __slots__ = ("name", "ref", "scope")

    def __init__(self, scope: Scope, ref: Ref, name: str) -> None:
        self.scope, self.ref, self.name = scope, ref, name


class Pickler(cp.Pickler):  # type: ignore[misc]
    """One payload in the making, with the list of all that it holds."""

    dispatch_table: ClassVar[Any] = ChainMap(TABLE, cp.Pickler.dispatch_table)  # pyright: ignore[reportArgumentType]  # never written to

    def __init__(
        self,
        file: BinaryIO,
        origin: Origin,
        known: Known | None = None,
        wants: Callable[[Ref, str], bool] | None = None,
        sources: bool = True,
        buffer_callback: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self._origin = origin
        self._known = known or _NOTHING
        self._wants = wants
        self._sends_sources = sources
        self._own_cells: dict[int, str] = {}
        self._filled: set[int] = set()
        self._scheduled: set[tuple[int, str]] = set()
        self.bound: dict[tuple[Ref, str], int] = {}
        self.watched: dict[tuple[int, str], tuple[Scope, str, Mark]] = {}
        self.functions: dict[str, types.FunctionType] = {}
        self.classes: dict[str, type] = {}
        self.sources: dict[str, None] = {}

    def bind_all(self, names: Collection[tuple[Scope, str]]) -> None:
        """Write globals, each as a pickle of its own.

        A function whose turn will come is not written inside one that calls it: in a long circle of calls
        that would be as deep as the circle. It is needed when the other is called, not before.
        """
        self._scheduled = {(id(scope), name) for scope, name in names if type(scope[name]) is types.FunctionType}
        for scope, name in names:
            self._scheduled.discard((id(scope), name))
            self.dump(Binding(scope, self._origin.ref(scope), name))

    def reducer_override(self, value: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # pickle passes it by position
        kind = type(value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is Binding:
            return self._binding(value)
        if kind is types.CellType:
            token = self._own_cells.get(id(value))
            return NotImplemented if token is None else (ops.make_cell, (token,))
        if kind is object:
            return ops.sentinel, (self._origin.sentinel(value),)
        if issubclass(kind, type):
            return self._class(value)
        if issubclass(kind, types.ModuleType):
            return self._module(value)
        return reduce_storage(value)

    # -- globals -------------------------------------------------------------------------------------------

    def _bindings(self, scope: Scope, names: Collection[str]) -> list[Binding]:
        ref = self._origin.ref(scope)
        if ref[0] == "module":
            return []
        for name in names:
            if name not in scope:
                self.watched[id(scope), name] = (scope, name, mark(MISSING, self._origin))
        return [Binding(scope, ref, name) for name in names if name in scope and self._is_due(scope, ref, name)]

    def _is_due(self, scope: Scope, ref: Ref, name: str) -> bool:
        return (ref, name) not in self.bound and (id(scope), name) not in self._scheduled

    def _binding(self, binding: Binding) -> Any:
        ref, name = binding.ref, binding.name
        value = binding.scope.get(name, MISSING)
        skipped = ref[0] == "module" or (ref, name) in self.bound or value is MISSING
        if skipped or (self._wants is not None and not self._wants(ref, name)):
            return ops.applied, ()
        version = self._version(binding, value)
        self.bound[ref, name] = version
        if self._known.names.get((ref, name)) == version:
            return ops.applied, ()
        return ops.bind, (ref, name, version, value)

    def _version(self, binding: Binding, value: object) -> int:
        if binding.ref[1] != self._origin.run:
            return 0  # it goes back where it came from, and nothing is overwritten there
        found, version = self._origin.version(binding.ref, binding.name, value)
        self.watched[id(binding.scope), binding.name] = (binding.scope, binding.name, found)
        return version

    # -- functions -----------------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> Any:
        if by_reference(function):
            return NotImplemented
        token = self._origin.token(function)
        if token in self._known.functions:
            return ops.known_function, (token,)
        self.functions[token] = function
        cells = function.__closure__
        for cell in cells or ():
            self._own_cells[id(cell)] = self._origin.cell(cell, function)
        made = (self._origin.ref(function.__globals__), token, function.__code__, cells)
        return ops.make_function, made, self._function_state(function), None, None, ops.set_function

    def _function_state(self, function: types.FunctionType) -> tuple[Any, ...]:
        scope, names = function.__globals__, names_of(function)
        used = [scope[name] for name in names if name in scope]
        used += [contents(cell) for cell in function.__closure__ or ()]
        home = [function.__name__] if scope.get(function.__qualname__) is function else []
        return (
            _slots(function),
            dict(function.__dict__),
            cp._find_imported_submodules(function.__code__, used),
            self._fillings(function),
            self._source(function.__code__.co_filename, scope),
            self._bindings(scope, [*names, *home]),
        )

    def _fillings(self, function: types.FunctionType) -> list[tuple[types.CellType, object]]:
        cells = [cell for cell in function.__closure__ or () if id(cell) not in self._filled]
        self._filled.update(map(id, cells))
        return [(cell, value) for cell in cells if (value := contents(cell)) is not MISSING]

    def _source(self, filename: str, scope: Scope) -> tuple[str, str] | None:
        """The text behind a function, for tracebacks and for compilers that read it (Triton, TorchScript)."""
        if not self._sends_sources or filename in self.sources or filename in self._known.sources:
            return None
        self.sources[filename] = None
        text = shown("".join(linecache.getlines(filename, scope)))
        return (filename, text) if 0 < len(text) <= _SOURCE_LIMIT_BYTES else None

    # -- classes and modules -------------------------------------------------------------------------------

    def _class(self, cls: Any) -> Any:
        if is_special(cls):
            return cp._class_reduce(cls)
        if by_reference(cls):
            return NotImplemented
        tracker = cp._get_or_create_tracker_id(cls)
        if tracker in self._known.classes:
            return ops.known_class, (tracker,)
        if is_made_in_c(cls):
            raise PicklingError(f"the class {cls.__module__}.{cls.__qualname__} is made in C, and its module does not have it under this name")
        self.classes[tracker] = cls
        _, made, (attributes, _), *_ = cp._dynamic_class_reduce(cls)
        state = (attributes, _member_states(cls), self._home(cls))
        if issubclass(cls, Enum):
            return ops.make_enum, made, state, None, None, ops.set_class
        return ops.make_class, _made_from(cls, made, attributes), state, None, None, ops.set_class

    def _home(self, cls: type) -> list[Binding]:
        """Bound to its own name, so that pickle finds it in ``__main__`` there as well."""
        module = cls.__module__ if isinstance(cls.__module__, str) else ""
        scope = getattr(sys.modules.get(module), "__dict__", {})
        return self._bindings(scope, [cls.__name__]) if scope.get(cls.__qualname__) is cls else []

    def _module(self, module: types.ModuleType) -> Any:
        for found in (module, sys.modules.get(module.__name__, module)):
            if importable(found):
                return cp.subimport, (import_name(found),)
        scope = module.__dict__
        listed = () if module.__name__ in MAIN_NAMES else [name for name in scope if not name.startswith("__")]
        state = self._bindings(scope, listed)
        return ops.namespace_module, (self._origin.ref(scope),), state, None, None, ops.applied


def _slots(function: types.FunctionType) -> dict[str, Any]:
    slots = {
        "__name__": function.__name__,
        "__qualname__": function.__qualname__,
        "__module__": function.__module__,
        "__doc__": function.__doc__,
        "__defaults__": function.__defaults__,
        "__kwdefaults__": function.__kwdefaults__,
        "__annotations__": _annotations(function),
        "__type_params__": getattr(function, "__type_params__", None),
    }
    return {name: value for name, value in slots.items() if value or name == "__module__"}


def _annotations(function: types.FunctionType) -> dict[str, Any]:
    """From Python 3.14 they are computed when asked for, and may name what is imported for type checkers only."""
    try:
        return dict(function.__annotations__)
    except Exception:
        import annotationlib  # type: ignore[import-not-found, unused-ignore]

        return dict(annotationlib.get_annotations(function, format=annotationlib.Format.STRING))


def _made_from(cls: type, made: tuple[Any, ...], attributes: dict[str, Any]) -> tuple[Any, ...]:
    """What a class is made from: its real bases, and what must be there from the start.

    cloudpickle leaves out slots and the qualified name, and takes the bases as they were written: ``NamedTuple``
    would make another tuple.
    """
    kind, name, _, options, *rest = made
    options = {**options, "__qualname__": cls.__qualname__}
    if "__orig_bases__" in vars(cls):
        options["__orig_bases__"] = vars(cls)["__orig_bases__"]
    if "__slots__" in vars(cls):
        options["__slots__"] = attributes.pop("__slots__")
        for each, value in list(attributes.items()):
            if isinstance(value, types.MemberDescriptorType):
                del attributes[each]
    return (kind, name, cls.__bases__, options, *rest)


def _member_states(cls: Any) -> dict[str, dict[str, Any]]:
    """What ``__init__`` of an enum has put on its members."""
    if not issubclass(cls, Enum):
        return {}
    return {
        member.name: state
        for member in cls
        if (state := {name: value for name, value in vars(member).items() if not name.startswith("_")})
    }
