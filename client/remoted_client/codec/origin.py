"""What this process has said about its own code: the sending half of by-value namespaces.

Owns the run id, the label of every dict of globals, the version of every global, the token of every function and
closure cell. Nothing here knows what any receiver has: a payload is complete, and the receiver skips what it has.

A token names one function *as it is now*. A plain top-level function is named by its content, so a notebook cell
that is run again unchanged is no new function; one with a closure or changeable defaults has a state of its own,
and two alike must not become one, so it is named by a number, counted up when its state changed at the caller.
"""

from __future__ import annotations

import hashlib
import itertools
import types
import uuid
import weakref
from typing import Any

from .identity import code_digest
from .marks import MISSING, Mark, is_frozen, mark
from .reference import import_name, importable, owner

#: ``("module", name)``, or ``("value", run, label, ((attribute, value), ...))``.
Ref = tuple[Any, ...]
Scope = dict[str, Any]

ATTRIBUTES = ("__name__", "__file__", "__package__", "__doc__")
#: Globals that every namespace has of its own.
RESERVED = frozenset(
    (*ATTRIBUTES, "__path__", "__builtins__", "__spec__", "__loader__", "__cached__", "__annotations__")
)


class Seen:
    """A function as it was when its token was made."""

    __slots__ = ("adopted", "busy", "code", "count", "defaults", "kwdefaults", "marks", "name", "token")

    def __init__(self, name: str) -> None:
        self.name = name
        self.token = name
        self.count = 0
        self.marks: tuple[Mark, ...] | None = None
        self.busy = False
        self.adopted = False
        self.code: types.CodeType | None = None
        self.defaults: object = None
        self.kwdefaults: object = None

    def is_plainly_same(self, function: types.FunctionType) -> bool:
        """A plain function has no state but its code and defaults: a look at them is enough."""
        return (
            self.marks is None
            and function.__code__ is self.code
            and function.__defaults__ is self.defaults
            and function.__kwdefaults__ is self.kwdefaults
            and not function.__dict__
        )


class Origin:
    """The sending side of one process. Not thread-safe; its owner locks."""

    def __init__(self) -> None:
        self.run = uuid.uuid4().hex
        self._refs: dict[int, tuple[Scope, Ref]] = {}
        self._scopes: dict[str, Scope] = {}
        self._versions: dict[tuple[str, str], tuple[Mark, int]] = {}
        self._count = itertools.count(1)
        self._seen: weakref.WeakKeyDictionary[types.FunctionType, Seen] = weakref.WeakKeyDictionary()
        self._functions: weakref.WeakValueDictionary[str, types.FunctionType] = weakref.WeakValueDictionary()
        self._cells: dict[int, tuple[str, Mark, int]] = {}
        self._sentinels: dict[int, tuple[object, str]] = {}
        self._sentinel_tokens: dict[str, object] = {}

    # -- namespaces ----------------------------------------------------------------------------------------

    def ref(self, scope: Scope) -> Ref:
        """The name of a dict of globals; always the same object, so that a pickle holds it once."""
        known = self._refs.get(id(scope))
        if known is None:
            known = self._refs[id(scope)] = (scope, self._new_ref(scope))
        return known[1]

    def adopt_scope(self, scope: Scope, ref: Ref) -> None:
        """Call a dict that came from elsewhere by the name it has there."""
        self._refs[id(scope)] = (scope, ref)

    def drop_scope(self, scope: Scope) -> None:
        self._refs.pop(id(scope), None)

    def scope(self, label: str) -> Scope | None:
        """The dict of this process under a label."""
        return self._scopes.get(label)

    def _new_ref(self, scope: Scope) -> Ref:
        module = owner(scope)
        if module is not None and importable(module):
            return ("module", import_name(module))
        name = str(scope.get("__name__") or "<anonymous>")
        label = next(each for each in _labels(name) if each not in self._scopes)
        self._scopes[label] = scope
        attributes = tuple((each, scope[each]) for each in ATTRIBUTES if _is_plain(scope.get(each, MISSING)))
        return ("value", self.run, label, attributes)

    # -- globals -------------------------------------------------------------------------------------------

    def version(self, ref: Ref, name: str, value: object) -> tuple[Mark, int]:
        """The mark and version number of a global; a new number if the value is not what it was."""
        key = (ref[2], name)
        known = self._versions.get(key)
        if known is None or not known[0].same(value):
            known = self._versions[key] = (mark(value, self), next(self._count))
        return known

    # -- functions -----------------------------------------------------------------------------------------

    def function(self, token: str) -> types.FunctionType | None:
        """The living function of this process that has a token."""
        return self._functions.get(token)

    def adopt_function(self, function: types.FunctionType, token: str) -> None:
        """Call a function that came from elsewhere by the token it has there, whatever its state is now."""
        seen = self._seen[function] = Seen(token)
        seen.adopted = True

    def token(self, function: types.FunctionType) -> str:
        """The name of a function as it is now."""
        return self.seen(function).token

    def seen(self, function: types.FunctionType) -> Seen:
        """What is known of a function, up to date."""
        seen = self._seen.get(function)
        if seen is None:
            seen = self._seen[function] = Seen(uuid.uuid4().hex)
        if not (seen.adopted or seen.busy or self._is_same(function, seen)):
            self._rename(function, seen)
        return seen

    def _is_same(self, function: types.FunctionType, seen: Seen) -> bool:
        if seen.marks is None or function.__code__ is not seen.code:
            return seen.is_plainly_same(function)
        return self._matches(function, seen, seen.marks)

    def _matches(self, function: types.FunctionType, seen: Seen, marks: tuple[Mark, ...]) -> bool:
        seen.busy = True  # a closure may hold the function itself
        try:
            state = _state(function)
            return len(state) == len(marks) and all(each.same(value) for each, value in zip(marks, state, strict=True))
        finally:
            seen.busy = False

    def _rename(self, function: types.FunctionType, seen: Seen) -> None:
        seen.code, seen.defaults, seen.kwdefaults = function.__code__, function.__defaults__, function.__kwdefaults__
        if _is_plain_function(function):
            seen.marks = None
            place = "/".join(map(str, self.ref(function.__globals__)[:3]))
            content = f"{code_digest(function)}{function.__defaults__!r}".encode("utf-8", "surrogatepass")
            seen.token = f"{place}/{function.__qualname__}/{hashlib.blake2b(content, digest_size=16).hexdigest()}"
        else:
            self._count_up(function, seen)
        self._functions[seen.token] = function

    def _count_up(self, function: types.FunctionType, seen: Seen) -> None:
        seen.busy = True
        try:
            seen.marks = tuple(mark(value, self) for value in _state(function))
        finally:
            seen.busy = False
        seen.count += 1
        seen.token = f"{seen.name}/{seen.count}"

    def cell(self, cell: types.CellType, holder: types.FunctionType) -> str:
        """The name of a closure cell with its present content, the same for every function that shares it.

        Cells have no weak references: the name is kept while the function that was first seen with it lives.
        """
        content = contents(cell)
        known = self._cells.get(id(cell))
        if known is None:
            known = (uuid.uuid4().hex, mark(content, self), 1)
            weakref.finalize(holder, self._cells.pop, id(cell), None).atexit = False
        elif not known[1].same(content):
            known = (known[0], mark(content, self), known[2] + 1)
        self._cells[id(cell)] = known
        return f"{known[0]}/{known[2]}"

    # -- sentinels -----------------------------------------------------------------------------------------

    def sentinel(self, value: object) -> str:
        """The name of an ``object()``, of which only the identity counts. Kept for good: it has no weak references."""
        if id(value) not in self._sentinels:
            self.adopt_sentinel(value, uuid.uuid4().hex)
        return self._sentinels[id(value)][1]

    def adopt_sentinel(self, value: object, token: str) -> None:
        self._sentinels[id(value)] = (value, token)
        self._sentinel_tokens[token] = value

    def sentinel_of(self, token: str) -> object | None:
        return self._sentinel_tokens.get(token)


def contents(cell: types.CellType) -> object:
    """What a closure cell holds; ``MISSING`` for an empty one."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _state(function: types.FunctionType) -> list[object]:
    cells = [contents(cell) for cell in function.__closure__ or ()]
    return [function.__defaults__, function.__kwdefaults__, function.__dict__ or None, *cells]


def _is_plain_function(function: types.FunctionType) -> bool:
    return (
        function.__closure__ is None
        and not function.__dict__
        and "<" not in function.__qualname__
        and function.__kwdefaults__ is None
        and is_frozen(function.__defaults__)
    )


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str)


def _labels(name: str) -> Any:
    yield name
    for number in itertools.count(2):
        yield f"{name}#{number}"
