"""Type hints as JSON Schema, and a route as an operation of OpenAPI 3.1."""

from __future__ import annotations

import datetime
import decimal
import inspect
import typing
import uuid
from typing import Any

from remoted_client.http import handler
from remoted_client.http.hints import Form, adapter_of, form_of, read_hints
from remoted_client.http.parameters import BODY, PATH, Parameter, Plan
from remoted_client.settings import name_of, streams

_SCALARS: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    datetime.datetime: {"type": "string", "format": "date-time"},
    datetime.date: {"type": "string", "format": "date"},
    datetime.time: {"type": "string", "format": "time"},
    datetime.timedelta: {"type": "number", "description": "seconds"},
    uuid.UUID: {"type": "string", "format": "uuid"},
    decimal.Decimal: {"type": ["number", "string"]},
}
_PROBLEM = {"type": "object", "properties": {"loc": {"type": "array"}, "msg": {"type": "string"}, "type": {"type": "string"}}}
_INVALID = {"type": "object", "properties": {"detail": {"type": "array", "items": _PROBLEM}}}
_REFUSED = {"type": "object", "properties": {"error": {"type": "object", "properties": {"code": {"type": "string"}, "message": {"type": "string"}}}}}
_FAILURES = {
    "500": "the function raised, or its worker ended",
    "503": "no worker became free in time",
    "504": "it took longer than its timeout",
}


class Schemas:
    """Makes schemas, and keeps what they share as components under names that begin with ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self.components: dict[str, Any] = {}
        self._prefix = prefix

    def of(self, form: Form) -> dict[str, Any]:
        make = getattr(self, f"_{form.kind}")
        schema: dict[str, Any] = make(form)
        return schema

    def _any(self, form: Form) -> dict[str, Any]:
        return {}

    def _scalar(self, form: Form) -> dict[str, Any]:
        return dict(_SCALARS.get(form.target, {"type": "string"}))

    def _enum(self, form: Form) -> dict[str, Any]:
        return {"title": form.name, "enum": [member.value for member in form.choices]}

    def _literal(self, form: Form) -> dict[str, Any]:
        return {"enum": [getattr(choice, "value", choice) for choice in form.choices]}

    def _union(self, form: Form) -> dict[str, Any]:
        return {"anyOf": [self.of(item) for item in form.items]}

    def _list(self, form: Form) -> dict[str, Any]:
        return {"type": "array", "items": self.of(form.items[0])}

    def _set(self, form: Form) -> dict[str, Any]:
        return {**self._list(form), "uniqueItems": True}

    def _tuple(self, form: Form) -> dict[str, Any]:
        count = len(form.items)
        return {"type": "array", "prefixItems": [self.of(item) for item in form.items], "minItems": count, "maxItems": count}

    def _mapping(self, form: Form) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.of(form.items[1])}

    def _record(self, form: Form) -> dict[str, Any]:
        name = self._prefix + form.name.replace("<locals>", "locals")
        if name not in self.components:
            self.components[name] = {}  # it may hold itself
            required = [name for name, field in form.fields.items() if field.required]
            properties = {name: self.of(field.form) for name, field in form.fields.items()}
            self.components[name] = {"title": form.name, **_object(properties, required, False)}
        return {"$ref": f"#/components/schemas/{name}"}

    def _pydantic(self, form: Form) -> dict[str, Any]:
        schema: dict[str, Any] = adapter_of(form.target).json_schema(ref_template="#/components/schemas/" + self._prefix + "{model}")
        for name, definition in schema.pop("$defs", {}).items():
            self.components[self._prefix + name] = definition
        return schema


def _object(properties: dict[str, Any], required: list[str], is_open: bool) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": is_open}


def describe(function: Any, method: str, path: str, plan: Plan) -> dict[str, Any]:
    """``{"operation": ..., "components": ...}``."""
    identity = _identity(method, path)
    schemas = Schemas(f"{identity}.")
    first, _, rest = (inspect.getdoc(function) or "").partition("\n")
    operation: dict[str, Any] = {"operationId": identity, "summary": first.strip() or name_of(function), "description": rest.strip()}
    outside = [_parameter(parameter, schemas) for parameter in plan.parameters if parameter.where != BODY]
    if outside:
        operation["parameters"] = outside
    inside = [parameter for parameter in plan.parameters if parameter.where == BODY]
    if plan.rest == BODY and (inside or plan.takes_more):
        required = [parameter.name for parameter in inside if parameter.required]
        schema = _object({parameter.name: schemas.of(parameter.form) for parameter in inside}, required, plan.takes_more)
        operation["requestBody"] = {"required": bool(required), "content": {handler.JSON: {"schema": schema}}}
    operation["responses"] = _responses(function, schemas)
    return {"operation": operation, "components": schemas.components}


def _identity(method: str, path: str) -> str:
    """One for each route, of the characters that a component's name may have."""
    letters = {"/": ".", "{": "_", "}": "_"}
    return method.lower() + "".join(letters.get(c, c if c.isascii() and c.isalnum() else f"-{ord(c):02x}") for c in path)


def _parameter(parameter: Parameter, schemas: Schemas) -> dict[str, Any]:
    required = parameter.required or parameter.where == PATH
    return {"name": parameter.name, "in": parameter.where, "required": required, "schema": schemas.of(parameter.form)}


def _responses(function: Any, schemas: Schemas) -> dict[str, Any]:
    failures = {status: {"description": text, "content": {handler.JSON: {"schema": _REFUSED}}} for status, text in _FAILURES.items()}
    invalid = {"description": "the request does not fit", "content": {handler.JSON: {"schema": _INVALID}}}
    return {"200": {"description": "the result", "content": _result(function, schemas)}, "422": invalid, **failures}


def _result(function: Any, schemas: Schemas) -> dict[str, Any]:
    """What a function returns may be anything at all: a hint that JSON has no form for promises nothing."""
    hint = read_hints(function).get("return", Any)
    is_stream = streams(function)
    if is_stream:
        hint = (typing.get_args(hint) or (Any,))[0]
    if hint in (bytes, bytearray):
        return {handler.BYTES: {}}
    try:
        schema = schemas.of(form_of(hint))
    except TypeError:
        schema = {}
    if not is_stream:
        return {handler.JSON: {"schema": schema}}
    return {handler.TEXT: {}, handler.EVENTS: {}} if hint is str else {handler.NDJSON: {"schema": schema}, handler.EVENTS: {}}
