"""The keywords of ``options``: what can be said of single calls, of functions and of methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from remoted_client.suggest import check_amount, check_int, did_you_mean

_CHECKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "timeout": ("timeout_seconds", lambda value: check_amount("timeout", value)),
    "max_retries": ("max_retries", lambda value: check_int("max_retries", value, 0, 1000)),
    "detach": ("detach", bool),
    "name": ("name", lambda value: str(value)[:200]),
    "priority": ("priority", lambda value: check_int("priority", value, -100, 100)),
    "copy": ("copy", bool),
}


def checked(given: dict[str, Any]) -> dict[str, Any]:
    """By their names on the wire; None leaves one as it was. Raises TypeError for an unknown one, ValueError for a bad value."""
    refuse_unknown("options", [word for word in given if word not in _CHECKS], list(_CHECKS))
    found = {}
    for word, value in given.items():
        if value is not None:
            name, check = _CHECKS[word]
            found[name] = check(value)
    return found


def refuse_unknown(method: str, unknown: list[str], known: list[str]) -> None:
    """Raises TypeError for the first unknown keyword, with what was probably meant."""
    for word in unknown:
        raise TypeError(f"{method}() has no keyword {word!r}{did_you_mean(word, known) or '; its keywords are ' + ', '.join(known)}")
