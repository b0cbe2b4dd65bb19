"""The table as an OpenAPI 3.1 document: made from the same rows and shapes that serve, so it cannot differ."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import remoted

if TYPE_CHECKING:
    from remoted.api.routes import Route
    from remoted.endpoints import Endpoint

_REFERENCE = "#/components/schemas/{model}"
_REFUSAL = {"type": "object", "required": ["code", "message"], "properties": {"code": {"type": "string"}, "message": {"type": "string"}}}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": _REFUSAL}}
_ABOUT = "On the Unix socket api.sock. Who asks is what the kernel says; there is nothing to log in to."
_ABOUT_ENDPOINTS = "Your functions with HTTP routes, below /f of api.sock or at the top of what `remotectl serve` serves."


def describe(routes: Iterable[Route]) -> dict[str, Any]:
    rows = list(routes)
    models = {model for route in rows for model in (route.answer, route.body) if isinstance(model, type)}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schema = models_json_schema([(model, "serialization") for model in ordered], ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for route in rows:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "remoted", "version": remoted.__version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": {**schema.get("$defs", {}), "Error": _ERROR}},
    }


def describe_endpoints(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The functions of one user as a document of their own: what their client said of them, put together."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = endpoint.operation
        schemas |= endpoint.components
    return {
        "openapi": "3.1.0",
        "info": {"title": "functions", "version": remoted.__version__, "description": _ABOUT_ENDPOINTS},
        "servers": [{"url": "/f"}],
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": (route.handler.__doc__ or "").strip().splitlines()[0],
        "x-rule": route.rule.value,
        "parameters": [*_path_parameters(route.path), *_query_parameters(route.query)],
        "responses": {
            "200": {"description": "done", "content": _content(route.answer)},
            "default": {"description": "refused", "content": _json("Error")},
        },
    }
    if route.body is not None:
        operation["requestBody"] = {"content": _json(route.body.__name__)}
    return operation


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"{(\w+)}", path)]


def _query_parameters(model: type[BaseModel] | None) -> list[dict[str, Any]]:
    properties = model.model_json_schema()["properties"] if model else {}
    return [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]


def _content(answer: type[BaseModel] | str) -> dict[str, Any]:
    return {answer: {}} if isinstance(answer, str) else _json(answer.__name__)


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=name)}}}
