"""The globals that code refers to, found without pickling anything.

Pickling follows references depth first, and a script of a few hundred functions that call each other would
exhaust the recursion limit. So the globals below the root are listed first, callees before callers, and each is
pickled on its own. What this misses (functions inside containers) is pickled where it is met.
"""

from __future__ import annotations

import dis
import types
import weakref
from collections.abc import Iterator
from typing import Any

from .identity import functions_in, methods
from .origin import RESERVED, Scope, contents
from .reference import by_reference

Name = tuple[Scope, str]

#: The body of a class inside a function reads globals by the last two; cloudpickle passes them by.
_GLOBAL_OPS = frozenset(("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))
_names: weakref.WeakKeyDictionary[types.CodeType, tuple[str, ...]] = weakref.WeakKeyDictionary()


def names_of(function: types.FunctionType) -> tuple[str, ...]:
    """The global names in a function's code, nested code included."""
    code = function.__code__
    found = _names.get(code)
    if found is None:
        found = _names[code] = tuple(dict.fromkeys(name for name in _global_names(code) if name not in RESERVED))
    return found


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from (each.argval for each in dis.get_instructions(code) if each.opname in _GLOBAL_OPS)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def reachable(root: object) -> list[Name]:
    """Every global below ``root`` that has a value, callees first."""
    seen: set[tuple[int, str]] = set()
    order: list[Name] = []
    pending: list[tuple[Name | None, Iterator[Name]]] = [(None, _names_below(root))]
    while pending:
        name, below = pending[-1]
        following = next((each for each in below if (id(each[0]), each[1]) not in seen), None)
        if following is not None:
            scope, key = following
            seen.add((id(scope), key))
            pending.append((following, _names_below(scope[key])))
        else:
            pending.pop()
            if name is not None:
                order.append(name)
    return order


def _names_below(value: object) -> Iterator[Name]:
    visited: set[int] = set()
    pending = list(functions_of(value))
    while pending:
        function = pending.pop()
        if id(function) in visited or by_reference(function):
            continue
        visited.add(id(function))
        scope = function.__globals__
        for name in names_of(function):
            if name in scope:
                yield scope, name
        for cell in function.__closure__ or ():
            pending.extend(functions_of(contents(cell)))


def functions_of(value: Any) -> Iterator[types.FunctionType]:
    """The functions that a value is, wraps or has as methods, as far as they travel by value."""
    if isinstance(value, type):
        for cls in value.__mro__:
            if not by_reference(cls):
                yield from (function for _, function in methods(cls))
        return
    yield from functions_in(value)
    attributes = getattr(value, "__dict__", None) if not isinstance(value, types.ModuleType) else None
    if type(attributes) is dict:
        yield from functions_in(attributes.get("__wrapped__"))
