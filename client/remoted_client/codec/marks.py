"""Has a value changed since it was last sent? A mark remembers as little as answers that.

Immutable atoms are compared by type and value, modules and classes by identity, functions by token, all else by
a digest of its pickle, in which functions and classes of the script stand as stable names: their bytes differ
between two pickles, and their changes are seen elsewhere. Large buffers are hashed in place.
"""

from __future__ import annotations

import hashlib
import types
import weakref
from collections import ChainMap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from cloudpickle import cloudpickle as cp  # type: ignore[import-untyped, unused-ignore]

from . import ops
from .reducers import TABLE
from .reference import by_reference
from .tensors import reduce_storage

if TYPE_CHECKING:
    import pickle

    from .origin import Origin

#: A global or a closure variable without a value.
MISSING = object()

_ATOMS = frozenset(
    (int, float, complex, bool, str, bytes, type(None), type(Ellipsis), type(NotImplemented), range, object)
)


class Mark:
    """What is remembered of a value."""

    __slots__ = ()

    def same(self, value: object) -> bool:
        """Is this still the value that was marked?"""
        raise NotImplementedError


class _Atom(Mark):
    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def same(self, value: object) -> bool:
        mine = self._value
        return value is mine or (type(value) is type(mine) and value == mine and repr(value) == repr(mine))


class _Identity(Mark):
    __slots__ = ("_get",)

    def __init__(self, value: object) -> None:
        try:
            self._get: Callable[[], object] = weakref.ref(value)
        except TypeError:
            self._get = lambda: value

    def same(self, value: object) -> bool:
        return self._get() is value


class FunctionMark(Mark):
    """A function, by its token; a plain one that is the same object costs no token."""

    __slots__ = ("_get", "_origin", "_seen", "_token")

    def __init__(self, function: types.FunctionType, origin: Origin) -> None:
        self._origin = origin
        self._get = weakref.ref(function)
        self._seen = origin.seen(function)
        self._token = self._seen.token

    def same(self, value: object) -> bool:
        if value is self._get() and self._seen.token == self._token and self._seen.is_plainly_same(value):  # type: ignore[arg-type]
            return True
        return type(value) is types.FunctionType and self._origin.token(value) == self._token

    def is_unchanged(self) -> bool:
        """Is the marked function itself what it was? One that is gone has no state to send."""
        function = self._get()
        return function is None or self.same(function)


class _Frozen(Mark):
    """A tuple or frozenset of atoms: the same object needs no look inside."""

    __slots__ = ("_digest", "_origin", "_value")

    def __init__(self, value: object, origin: Origin) -> None:
        self._value, self._origin, self._digest = value, origin, digest(value, origin)

    def same(self, value: object) -> bool:
        if value is self._value:
            return True
        return type(value) is type(self._value) and digest(value, self._origin) == self._digest


class _Content(Mark):
    __slots__ = ("_digest", "_origin")

    def __init__(self, value: object, origin: Origin) -> None:
        self._origin, self._digest = origin, digest(value, origin)

    def same(self, value: object) -> bool:
        return self._digest is not None and digest(value, self._origin) == self._digest


def mark(value: object, origin: Origin) -> Mark:
    """The mark that fits a value."""
    kind = type(value)
    if kind in _ATOMS:
        return _Atom(value)
    if kind is types.FunctionType:
        return _Identity(value) if by_reference(value) else FunctionMark(value, origin)  # type: ignore[arg-type]
    if issubclass(kind, (type, types.ModuleType)):
        return _Identity(value)
    return _Frozen(value, origin) if is_frozen(value) else _Content(value, origin)


def is_frozen(value: object, depth: int = 20) -> bool:
    """Can nothing inside it change?"""
    if type(value) in _ATOMS:
        return True
    if type(value) not in (tuple, frozenset) or depth == 0:
        return False
    return all(is_frozen(item, depth - 1) for item in value)  # type: ignore[attr-defined]


def digest(value: object, origin: Origin) -> bytes | None:
    """Digest of a value's pickle; None if it has none."""
    sink = _HashSink()
    try:
        if type(value) in (set, frozenset) and is_frozen(frozenset(value)):  # type: ignore[call-overload]
            value = sorted((type(item).__name__, repr(item)) for item in value)  # type: ignore[attr-defined]
        _DigestPickler(sink, origin).dump(value)
    except Exception:
        return None
    return sink.digest()


class _HashSink:
    """A file that keeps nothing but a hash. SHA-1 is the fastest here, and nobody gains by deceiving himself."""

    def __init__(self) -> None:
        self._hasher = hashlib.sha1(usedforsecurity=False)

    def write(self, data: Any) -> int:
        self._hasher.update(data)
        return len(data)

    def add_buffer(self, buffer: pickle.PickleBuffer) -> None:
        """Out of band: ``None`` tells pickle to leave the bytes out."""
        self._hasher.update(buffer.raw())

    def digest(self) -> bytes:
        return self._hasher.digest()


class _DigestPickler(cp.Pickler):  # type: ignore[misc]
    dispatch_table: ClassVar[Any] = ChainMap(TABLE, cp.Pickler.dispatch_table)  # pyright: ignore[reportArgumentType]  # never written to

    def __init__(self, sink: _HashSink, origin: Origin) -> None:
        super().__init__(sink, protocol=5, buffer_callback=sink.add_buffer)
        self._origin = origin

    def reducer_override(self, value: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # pickle passes it by position
        kind = type(value)
        if kind is types.FunctionType:
            return NotImplemented if by_reference(value) else (ops.known_function, (self._origin.token(value),))
        if issubclass(kind, type):
            reduced = cp._class_reduce(value) if is_special(value) else NotImplemented
            if reduced is not NotImplemented or by_reference(value):
                return reduced
            return ops.known_class, (cp._get_or_create_tracker_id(value),)
        if issubclass(kind, types.ModuleType):
            return ops.namespace_module, (value.__name__,)
        return reduce_storage(value)


def is_special(cls: type) -> bool:
    """Classes without a name to import them by, for which cloudpickle has a way."""
    return cls in (type(None), type(Ellipsis), type(NotImplemented)) or cls in cp._BUILTIN_TYPE_NAMES
