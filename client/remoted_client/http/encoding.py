"""From what a function returns to JSON. What JSON has no form for is named by its path, after the failure."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import sys
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

_DEPTH = 100
_AS_TEXT = (uuid.UUID, decimal.Decimal, pathlib.PurePath)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=lambda value: _simpler(value))


class NotJson(TypeError):
    """A value that cannot be the answer to a request; the message says where it stands."""


def to_json(value: Any, name: str = "the result") -> bytes:
    """Raises NotJson."""
    try:
        return _ENCODER.encode(value).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise NotJson(f"cannot answer with {next(_blame(value, name, _DEPTH), f'{name}: {error}')}") from error


def _simpler(value: Any) -> Any:
    """One step nearer to JSON. Raises TypeError."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(type(value)):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if _is_array(value):
        return value.tolist()
    raise TypeError(f"JSON has no form for {_article(value)}")


def _is_array(value: Any) -> bool:
    """Of numpy, or a tensor; neither is imported for that."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    return isinstance(value, ((numpy.ndarray, numpy.generic) if numpy else ()) + ((torch.Tensor,) if torch else ()))


def _blame(value: Any, path: str, depth: int) -> Iterator[str]:
    """What is wrong, the first of it first."""
    if depth == 0:
        yield f"{path[:200]}: it is nested deeper than {_DEPTH} levels, or holds itself"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: JSON has no {value}"
    elif isinstance(value, str):
        yield from _blame_text(value, path)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _blame(item, f"{path}[{number}]", depth - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int, float, bool, type(None))):
                yield f"{path}: its key {key!r:.80} is {_article(key)}, and JSON has only strings"
            yield from _blame(item, f"{path}[{key!r:.80}]", depth - 1)
    elif not isinstance(value, (int, float, type(None))):
        yield from _blame_object(value, path, depth)


def _blame_text(text: str, path: str) -> Iterator[str]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        yield f"{path}: it holds half a surrogate pair, which is no character"


def _blame_object(value: Any, path: str, depth: int) -> Iterator[str]:
    try:
        simpler = _simpler(value)
    except Exception as error:
        yield f"{path}: {error}"
        return
    if isinstance(simpler, dict) and not isinstance(value, Mapping):
        for name, item in simpler.items():
            yield from _blame(item, f"{path}.{name}", depth - 1)
    else:
        yield from _blame(simpler, path, depth - 1)


def _article(value: Any) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
