"""Where each parameter of a function comes from: the path, the query or the body of a request."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remoted_client.http.hints import Form, form_of, read_hints

PATH, QUERY, BODY = "path", "query", "body"
#: Methods whose requests have no body that means anything (RFC 9110, 9.3).
BODILESS = ("GET", "DELETE")
#: What a path or a query can hold: one text for each name, or several.
_IN_TEXT = frozenset({"any", "scalar", "enum", "literal"})


@dataclass(frozen=True)
class Parameter:
    name: str
    where: str
    form: Form
    required: bool
    is_positional: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that a worker must know to make a call of a request. ``takes_more``: the function has ``**kwargs``."""

    parameters: tuple[Parameter, ...]
    #: Where names go that no path parameter has: ``query`` or ``body``.
    rest: str
    takes_more: bool


def plan_of(function: Callable[..., Any], method: str, path: str) -> Plan:
    """Raises TypeError for a parameter that cannot come over HTTP, by name."""
    hints = read_hints(function)
    in_path = set(path_names(path))
    rest = QUERY if method in BODILESS else BODY
    found: list[Parameter] = []
    takes_more = False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_more = True
            continue
        required, where = parameter.default is parameter.empty, PATH if name in in_path else rest
        form = _form_of(name, hints.get(name, Any), where)
        found.append(Parameter(name, where, form, required, parameter.kind is parameter.POSITIONAL_ONLY))
    return Plan(tuple(found), rest, takes_more)


def path_names(path: str) -> list[str]:
    """The parameters in a path: ``/items/{id}`` has ``id``."""
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def _form_of(name: str, hint: Any, where: str) -> Form:
    try:
        form = form_of(hint)
    except TypeError as error:
        raise TypeError(f"the parameter {name!r} cannot come over HTTP: {error}") from None
    if where != BODY and not _fits_text(form, where):
        advice = "use method='POST', or take text" if where == QUERY else "take text, a number or the like"
        raise TypeError(f"the parameter {name!r} cannot come from the {where}: a {form.kind} is not one text; {advice}")
    return form


def _fits_text(form: Form, where: str) -> bool:
    if form.kind == "union":
        return all(_fits_text(item, where) for item in form.items)
    if form.kind in ("list", "set"):
        return where == QUERY and all(item.kind in _IN_TEXT for item in form.items)
    return form.kind in _IN_TEXT or (form.kind == "pydantic" and not isinstance(form.target, type))
