"""Reducers for objects of the standard library that neither pickle nor cloudpickle can carry by value.

Each names the trap. The ``_make`` functions are looked up by import on the other side.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from .reference import importable

#: What ``types.CodeType`` takes, in its order.
_CODE_ARGUMENTS = (
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_nlocals", "co_stacksize", "co_flags", "co_code", "co_consts", "co_names", "co_varnames"),
    *("co_filename", "co_name", *(("co_qualname",) if sys.version_info >= (3, 11) else ()), "co_firstlineno", "co_linetable"),
    *(*(("co_exceptiontable",) if sys.version_info >= (3, 11) else ()), "co_freevars", "co_cellvars"),
)


def _is_global(value: Any, name: str) -> bool:
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    return module is not None and importable(module) and getattr(module, name, None) is value


def _code(value: types.CodeType) -> tuple[Any, ...]:
    """From cloudpickle 3.1.3 on it loses its file, without which there are no lines in tracebacks and no sources."""
    return types.CodeType, tuple(getattr(value, name) for name in _CODE_ARGUMENTS)


def _lru_cache(value: Any) -> str | tuple[Any, ...]:
    """It reduces to its name, which a by-value namespace may not have yet. The cached entries stay behind."""
    if "." not in value.__qualname__ and _is_global(value, value.__qualname__):
        return str(value.__qualname__)
    options = value.cache_parameters()
    return _make_lru_cache, (value.__wrapped__, options["maxsize"], options["typed"]), vars(value)


def _make_lru_cache(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _cached_property(value: Any) -> tuple[Any, ...]:
    """Before Python 3.12 it holds a lock."""
    return _make_cached_property, (value.func, value.attrname)


def _make_cached_property(function: Callable[[Any], Any], name: str | None) -> Any:
    made: Any = functools.cached_property(function)
    if name is not None:
        made.__set_name__(None, name)
    return made


def _weak_keys(value: Any) -> tuple[Any, ...]:
    """Weak references cannot be pickled; ``functools.singledispatch`` keeps its cache in such a dict."""
    return _make_weak_keys, (list(value.items()),)


def _make_weak_keys(items: Iterable[tuple[Any, Any]]) -> Any:
    return weakref.WeakKeyDictionary(dict(items))


def _weak_values(value: Any) -> tuple[Any, ...]:
    return _make_weak_values, (list(value.items()),)


def _make_weak_values(items: Iterable[tuple[Any, Any]]) -> Any:
    return weakref.WeakValueDictionary(dict(items))


def _new_type(value: Any) -> str | tuple[Any, ...]:
    """It reduces to its name."""
    if _is_global(value, value.__name__):
        return str(value.__qualname__)
    return _make_new_type, (value.__name__, value.__supertype__, value.__module__)


def _make_new_type(name: str, supertype: Any, module: str) -> Any:
    make: Any = typing.NewType
    made = make(name, supertype)
    made.__module__ = module
    return made


def _named_parameter(value: Any) -> str | tuple[Any, ...]:
    """``ParamSpec`` and ``TypeVarTuple`` reduce to their names."""
    if _is_global(value, value.__name__):
        return str(value.__name__)
    return type(value), (value.__name__,)


def _sentinel(name: str) -> Callable[[Any], tuple[Any, ...]]:
    """Dataclasses compare their sentinels by identity, and pickle would make new ones."""

    def reduce(_: Any) -> tuple[Any, ...]:
        return getattr, (dataclasses, name)

    return reduce


def _config(value: Any) -> Any:
    """What travels with code is kept by the daemon, so it goes without the values of ``env=`` (F16)."""
    return value.without_env().__reduce_ex__(5)


def _table() -> dict[type, Callable[[Any], Any]]:
    wrapper: Any = functools.lru_cache(None)(int)
    table: dict[type, Callable[[Any], Any]] = {
        types.CodeType: _code,
        type(wrapper): _lru_cache,
        functools.cached_property: _cached_property,
        weakref.WeakKeyDictionary: _weak_keys,
        weakref.WeakValueDictionary: _weak_values,
    }
    for name in ("NewType", "ParamSpec", "TypeVarTuple"):
        kind = getattr(typing, name, None)
        if isinstance(kind, type):
            table[kind] = _new_type if name == "NewType" else _named_parameter
    for name in ("MISSING", "KW_ONLY", "_HAS_DEFAULT_FACTORY"):
        if hasattr(dataclasses, name):
            table[type(getattr(dataclasses, name))] = _sentinel(name)
    configs = sys.modules.get("remoted_client.config")  # loaded before the first call, or nobody here has one
    table.update({kind: _config for kind in vars(configs or object).values() if isinstance(kind, type) and hasattr(kind, "without_env")})
    return table


TABLE = _table()
