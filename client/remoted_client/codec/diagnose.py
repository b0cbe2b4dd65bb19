"""Which part of a value cannot be pickled? Asked only after a failure, so it may take its time.

The search tries each part on its own and goes down into the first that fails. Parts of an object are what its
own reduction gives, not its attributes: a class may leave its lock out of its state.
"""

from __future__ import annotations

import functools
import io
import os
import types
from collections.abc import Iterable, Iterator
from typing import Any

from .dump import Pickler
from .errors import UnpicklableError
from .files import null_file
from .identity import functions_in
from .marks import is_special
from .origin import Origin, contents
from .reference import by_reference, is_made_in_c
from .walk import names_of

Part = tuple[str, Any]
_MAX_DEPTH = 200


def explain(roots: Iterable[Part], origin: Origin, error: BaseException) -> UnpicklableError:
    """The error that names the part, among ``roots`` (path and value), that made pickling fail."""
    for root in roots:
        failure = _failure(root[1], origin)
        if failure is not None:
            (path, value), failure = _descend(root, failure, origin)
            return UnpicklableError(path, _type_name(value), _reason(failure) + _advice(value))
    return UnpicklableError("the call", "", _reason(error))


def _descend(part: Part, failure: BaseException, origin: Origin) -> tuple[Part, BaseException]:
    visited = {id(part[1])}
    for _ in range(_MAX_DEPTH):
        if _is_recursion(failure):
            break
        below = _first_failing(part, visited, origin)
        if below is None:
            break
        part, failure = below
        visited.add(id(part[1]))
    return part, failure


def _first_failing(part: Part, visited: set[int], origin: Origin) -> tuple[Part, BaseException] | None:
    for path, value in _parts(*part):
        failure = _failure(value, origin) if id(value) not in visited else None
        if failure is not None:
            return (path, value), failure
    return None


def _failure(value: object, origin: Origin) -> BaseException | None:
    try:
        Pickler(null_file(), origin, sources=False).dump(value)
    except Exception as error:
        return error
    return None


def _parts(path: str, value: Any) -> Iterator[Part]:
    kind = type(value)
    if issubclass(kind, dict):
        for key, item in value.items():
            yield f"{path}[{key!r}]", item
            yield f"key {key!r} of {path}", key
    elif issubclass(kind, (list, tuple)):
        names: Any = getattr(kind, "_fields", None)
        for index, item in enumerate(value):
            yield (f"{path}.{names[index]}" if names else f"{path}[{index}]"), item
    elif issubclass(kind, (set, frozenset)):
        yield from ((f"an item of {path}", item) for item in value)
    elif kind is types.FunctionType:
        yield from _function_parts(value)
    elif kind is functools.partial:
        yield from ((f"{path}.{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    elif kind is types.MethodType:
        yield from ((f"{path}.__self__", value.__self__), (f"{path}.__func__", value.__func__))
    elif issubclass(kind, type):
        yield from _class_parts(value)
    else:
        yield from _reduced_parts(path, value)


def _function_parts(function: types.FunctionType) -> Iterator[Part]:
    name = function.__qualname__
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield f"closure variable {variable!r} of {name!r}", contents(cell)
    for each in names_of(function):
        if each in function.__globals__:
            yield f"global {each!r} of function {name!r}", function.__globals__[each]
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    for each, default in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True):
        yield f"default of {each!r} of {name!r}", default
    for each, default in (function.__kwdefaults__ or {}).items():
        yield f"default of {each!r} of {name!r}", default
    for each, attribute in function.__dict__.items():
        yield f"attribute {each!r} of function {name!r}", attribute


def _class_parts(cls: type) -> Iterator[Part]:
    if is_special(cls) or by_reference(cls) or is_made_in_c(cls):
        return
    for base in cls.__bases__:
        yield f"base class {base.__name__!r} of {cls.__qualname__!r}", base
    for name, attribute in list(vars(cls).items()):
        if name in ("__dict__", "__weakref__", "_abc_impl"):
            continue
        for function in functions_in(attribute):
            yield f"method {name!r} of class {cls.__qualname__!r}", function
        yield f"attribute {name!r} of class {cls.__qualname__!r}", attribute


def _reduced_parts(path: str, value: Any) -> Iterator[Part]:
    try:
        reduced = value.__reduce_ex__(5)
    except Exception:
        return
    if not isinstance(reduced, tuple):
        return
    parts: tuple[Any, ...] = (*reduced, None, None, None, None)
    _, arguments, state, items, pairs, *_ = parts
    for states in state if isinstance(state, tuple) else (state,):
        if isinstance(states, dict):
            yield from ((f"{path}.{name}", item) for name, item in states.items())
    if state is not None and not isinstance(state, (dict, tuple)):
        yield f"the state of {path}", state
    yield f"the class of {path}", type(value)
    yield from ((f"{path}[{index}]", item) for index, item in enumerate(items or ()))
    yield from ((f"{path}[{key!r}]", item) for key, item in pairs or ())
    yield from ((f"part {index} of {path}", item) for index, item in enumerate(arguments) if item is not type(value))


def _is_recursion(error: BaseException) -> bool:
    return isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError)


def _reason(error: BaseException) -> str:
    if _is_recursion(error):
        return "it is nested too deeply for pickle; send a flat form of it"
    return str(error) or type(error).__name__


def _advice(value: object) -> str:
    """An open file, not a closed one, has a way that works: its path, if it has one, and its content, if it can be read."""
    if not isinstance(value, io.IOBase) or value.closed:
        return ""
    name = getattr(value, "name", None)
    ways = ["its path, and open it there"] if isinstance(name, (str, bytes)) and os.path.isfile(name) else []
    ways += ["what it holds: .read()"] if value.readable() else []
    return "; an open file stays in its process" + (f": send {', or '.join(ways)}" if ways else "")


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
