"""JSON without surprises (T17): one meaning per document, nothing that another parser would read differently."""

from __future__ import annotations

import json
import math
from typing import Any

DEPTH = 16


class BadJson(ValueError):
    """Not a document that is accepted; the message says where or why, never a value."""


def parse(data: bytes) -> Any:
    """Raises BadJson on bad UTF-8, NaN, infinities, duplicate keys, lone surrogates and more than 16 levels."""
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError:
        raise BadJson(f"it is nested deeper than {DEPTH} levels") from None
    except BadJson:
        raise
    except ValueError as error:
        raise BadJson(str(error)) from None
    _check(document, DEPTH)
    return document


def _refuse_constant(name: str) -> Any:
    raise BadJson(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadJson("a number is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadJson("a key stands twice in one object")
    return found


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        _check_text(value)
    elif depth == 0 and isinstance(value, (list, dict)):
        raise BadJson(f"it is nested deeper than {DEPTH} levels")
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check(item, depth - 1)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadJson("a string holds half a surrogate pair") from None
