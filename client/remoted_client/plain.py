"""Small values of built-in types, pickled without looking for what they might refer to.

Most arguments and results of small calls are of this kind, and preparing the careful pickler costs several times as
much as pickling them.
"""

from __future__ import annotations

import pickle
from typing import Any

_SCALARS = frozenset({int, float, bool, type(None), str, bytes})
_ITEMS = 16
_BYTES = 16 * 1024

loads = pickle.loads
#: The arguments of a call that has none.
_NO_ARGUMENTS = pickle.dumps(((), {}), 5)


def dumps_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
    """As ``dumps`` of both."""
    return dumps((args, kwargs)) if args or kwargs else _NO_ARGUMENTS


def dumps(value: Any) -> bytes | None:
    """The pickle of a plain value; None if it is not plain, or large."""
    if not _is_plain(value, 3):
        return None
    data = pickle.dumps(value, 5)
    return data if len(data) <= _BYTES else None


def _is_plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind in _SCALARS:
        return True
    if not depth or (kind is not tuple and kind is not list and kind is not dict) or len(value) > _ITEMS:
        return False
    if kind is dict:
        for name in value:
            if type(name) is not str:
                return False
        value = value.values()
    for item in value:  # noqa: SIM110 - a generator costs as much as the pickle
        if type(item) not in _SCALARS and not _is_plain(item, depth - 1):
            return False
    return True
