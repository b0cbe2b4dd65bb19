"""Which function is this? Equal in every run of the same script, different after an edit of the body.

Bytes of a pickle cannot say it (memo order, sets of strings, file names), nor can marshal (line numbers,
reference flags). So the code is walked field by field, and the source text is added where it can be had:
an edited default expression or decorator may leave the code object as it was.
"""

from __future__ import annotations

import hashlib
import inspect
import types
import weakref
from collections.abc import Iterator

_FIELDS = ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags", "co_name")
_NAMES = ("co_names", "co_varnames", "co_freevars", "co_cellvars")

_digests: weakref.WeakKeyDictionary[types.FunctionType, tuple[types.CodeType, str]] = weakref.WeakKeyDictionary()


def function_identity(function: object) -> tuple[str, str, str]:
    """``(module, qualified name, digest)`` of a function or class."""
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return module, name, object_digest(function)


def object_digest(value: object) -> str:
    """Digest of a function's code and source, or of a class with all of its methods."""
    if isinstance(value, types.FunctionType):
        return code_digest(value)
    hasher = hashlib.blake2b(digest_size=16)
    if isinstance(value, type):
        for name, function in sorted(methods(value)):
            hasher.update(f"{name}={code_digest(function)};".encode())
    hasher.update(_source(value).encode())
    return hasher.hexdigest()


def code_digest(function: types.FunctionType) -> str:
    """Digest of code and source; counted once per function object and code."""
    known = _digests.get(function)
    if known is not None and known[0] is function.__code__:
        return known[1]
    hasher = hashlib.blake2b(digest_size=16)
    for part in _code_parts(function.__code__):
        hasher.update(f"{len(part)}:".encode() + part)
    hasher.update(_source(function).encode())
    digest = hasher.hexdigest()
    _digests[function] = (function.__code__, digest)
    return digest


def methods(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The functions in the body of a class, with those inside static methods, class methods and properties."""
    for name, attribute in vars(cls).items():
        for function in functions_in(attribute):
            yield name, function


def functions_in(value: object) -> Iterator[types.FunctionType]:
    """The plain functions that a value is or wraps."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, (staticmethod, classmethod)):
        yield from functions_in(value.__func__)
    elif isinstance(value, property):
        for accessor in (value.fget, value.fset, value.fdel):
            yield from functions_in(accessor)


def _code_parts(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield getattr(code, "co_exceptiontable", b"")
    for field in _FIELDS:
        yield repr(getattr(code, field)).encode()
    for field in _NAMES:
        yield "\0".join(getattr(code, field)).encode()
    for constant in code.co_consts:
        yield from _constant_parts(constant)


def _constant_parts(value: object) -> Iterator[bytes]:
    """Types count (1, 1.0 and True are equal), and the order inside a frozen set does not."""
    yield type(value).__name__.encode()
    if isinstance(value, types.CodeType):
        yield from _code_parts(value)
    elif isinstance(value, tuple):
        for item in value:
            yield from _constant_parts(item)
    elif isinstance(value, frozenset):
        yield from sorted(b"\0".join(_constant_parts(item)) for item in value)
    else:
        yield repr(value).encode("utf-8", "surrogatepass")


def _source(value: object) -> str:
    try:
        return inspect.getsource(value)  # type: ignore[arg-type]
    except Exception:  # no file, no text, or a text that was edited under the running script
        return ""
