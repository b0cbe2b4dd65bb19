"""A function's HTTP route: what it is, and whether it can be one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remoted_client import wire
from remoted_client.function import RemoteFunction
from remoted_client.http.handler import Handler
from remoted_client.http.parameters import plan_of
from remoted_client.http.schema import describe
from remoted_client.settings import name_of

if TYPE_CHECKING:
    from remoted_client.settings import Settings


@dataclass(frozen=True)
class Route:
    """``description``: its operation of OpenAPI and the components that this refers to, as JSON."""

    method: str
    path: str
    name: str
    handler: Handler
    settings: Settings
    options: dict[str, Any]
    is_stream: bool
    description: bytes

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def route_of(function: RemoteFunction[Any, Any]) -> Route:
    """Raises TypeError, naming the function, for what cannot have a route."""
    if not isinstance(function, RemoteFunction):
        raise TypeError(f"cannot serve {function!r}: it is not a function with @remote")
    target, settings = function._function, function._settings
    name = name_of(target)
    if not settings.config.is_load_balanced:
        raise TypeError(f"cannot serve {name}: {type(settings.config).__name__} is a queue class; HTTP routes are for load-balanced ones, e.g. CpuLiveLoadBalancer")
    if settings.runs_here:
        raise TypeError(f"cannot serve {name}: it runs here (local=True or REMOTED_LOCAL), and a route runs in a worker")
    method, path = settings.method or "POST", settings.path or f"/{getattr(target, '__name__', type(target).__name__)}"
    try:
        plan = plan_of(target, method, path)
        described = describe(target, method, path, plan)
    except TypeError as error:
        raise TypeError(f"cannot serve {name}: {error}") from error
    options = {word: value for word, value in function._options.items() if word != "copy"}
    return Route(method, path, options.get("name") or name, Handler(target, plan), settings, options, function._stream, _encode(described))


def _encode(described: dict[str, Any]) -> bytes:
    """In a frame there is room for so much; a description that is longer goes without its schemas."""
    data = json.dumps(described).encode()
    if len(data) > wire.INLINE_BYTES:
        bare = {word: described["operation"][word] for word in ("operationId", "summary")}
        data = json.dumps({"operation": {**bare, "responses": {"200": {"description": "the result"}}}, "components": {}}).encode()
    return data


def functions_in(names: dict[str, Any], chosen: Iterable[str] = ()) -> list[RemoteFunction[Any, Any]]:
    """A script's load-balanced functions, each once; those of ``chosen`` names alone, if there are any."""
    functions: dict[int, RemoteFunction[Any, Any]] = {}
    for name, value in names.items():
        if isinstance(value, RemoteFunction) and value._settings.config.is_load_balanced and (not chosen or name in chosen):
            functions.setdefault(id(value), value)
    return list(functions.values())


def routes_in(functions: list[RemoteFunction[Any, Any]], advice: str) -> list[Route]:
    """Their routes. ``advice``: how to leave one of them out. Raises TypeError, naming the one that cannot have a route."""
    try:
        return [route_of(function) for function in functions]
    except TypeError as error:
        raise TypeError(f"{error}; {advice}" if len(functions) > 1 else str(error)) from error
