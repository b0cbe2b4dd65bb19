"""What answers a route in the worker: the function, called with a request and giving an answer, both as bytes.

Request and answer are a line of JSON and a body behind it. The line of a request holds ``path``, ``query`` and
``accept``; that of an answer ``status`` and ``type``. A stream gives its line with its first item, so that what fails
before it has a status of its own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from remoted_client.http.binding import Collector, Invalid, invalid, suggest
from remoted_client.http.encoding import to_json
from remoted_client.http.hints import Form
from remoted_client.http.parameters import PATH, QUERY, Parameter, Plan
from remoted_client.settings import is_async, streams

_NAMES = ("__module__", "__name__", "__qualname__", "__doc__")
#: Each of them ends a line of an event stream, so a string that holds one becomes several lines of its event.
_LINE_END = re.compile(rb"\r\n|\r|\n")
JSON, NDJSON, EVENTS, TEXT, BYTES = "application/json", "application/x-ndjson", "text/event-stream", "text/plain; charset=utf-8", "application/octet-stream"


class Handler:
    """A function and what its parameters are made of. ``__wrapped__`` says whether it is asynchronous, as for any decorator."""

    __wrapped__: Callable[..., Any]

    def __init__(self, function: Callable[..., Any], plan: Plan) -> None:
        functools.update_wrapper(self, function, _NAMES, ())
        self._plan = plan

    def __call__(self, request: bytes) -> Any:
        if streams(self.__wrapped__):
            return self._stream_async(request) if is_async(self.__wrapped__) else self._stream(request)
        return self._answer_async(request) if is_async(self.__wrapped__) else self._answer(request)

    # -- one answer ----------------------------------------------------------------------------------------

    def _answer(self, request: bytes) -> bytes:
        try:
            return _whole(self._call(request))
        except Exception as error:
            return _refusal(error)

    async def _answer_async(self, request: bytes) -> bytes:
        try:
            awaitable: Awaitable[Any] = self._call(request)
            return _whole(await awaitable)
        except Exception as error:
            return _refusal(error)

    def _call(self, request: bytes) -> Any:
        args, kwargs = bind(self._plan, *_parse(request))
        return self.__wrapped__(*args, **kwargs)

    # -- a stream ------------------------------------------------------------------------------------------

    def _stream(self, request: bytes) -> Iterator[bytes]:
        items, writer = None, ItemWriter(_parse(request)[0])
        try:
            items = self._call(request)
            for item in items:
                yield writer.write(item)
            if not writer.is_begun:
                yield writer.nothing()
        except Exception as error:
            yield _refusal(error, writer.is_begun)
        finally:
            if items is not None:
                items.close()  # GeneratorExit at the yield where the client left

    async def _stream_async(self, request: bytes) -> AsyncIterator[bytes]:
        items, writer = None, ItemWriter(_parse(request)[0])
        try:
            items = self._call(request)
            async for item in items:
                yield writer.write(item)
            if not writer.is_begun:
                yield writer.nothing()
        except Exception as error:
            yield _refusal(error, writer.is_begun)
        finally:
            if items is not None:
                await items.aclose()


def _parse(request: bytes) -> tuple[dict[str, Any], bytes]:
    head, _, body = request.partition(b"\n")
    return json.loads(head), body


def bind(plan: Plan, head: dict[str, Any], body: bytes) -> tuple[list[Any], dict[str, Any]]:
    """(args, kwargs) for the function. Raises Invalid with everything that is wrong."""
    collector = Collector()
    given = {**{name: (PATH, text) for name, text in head["path"].items()}, **_rest(plan, head["query"], body, collector)}
    known = {parameter.name: parameter for parameter in plan.parameters}
    kwargs: dict[str, Any] = {}
    for name, (where, value) in given.items():
        if name in known:
            kwargs[name] = collector.convert(value, known[name].form, (where, name), is_text=where in (PATH, QUERY))
        elif plan.takes_more:
            kwargs[name] = value
        else:
            collector.add((where, name), f"there is no such parameter{suggest(name, known)}", "extra_forbidden")
    for parameter in plan.parameters:
        if parameter.required and parameter.name not in given:
            collector.add((parameter.where, parameter.name), "Field required", "missing")
    collector.check()
    return [kwargs.pop(parameter.name) for parameter in _positional(plan, kwargs)], kwargs


def _positional(plan: Plan, given: dict[str, Any]) -> Iterator[Parameter]:
    """Positional-only ones, up to the first that stays at its default."""
    for parameter in plan.parameters:
        if not parameter.is_positional or parameter.name not in given:
            return
        yield parameter


def _rest(plan: Plan, query: list[list[str]], body: bytes, collector: Collector) -> dict[str, tuple[str, Any]]:
    """What the query or the body says, by name and with where it stood."""
    if plan.rest == QUERY:
        return {name: (QUERY, value) for name, value in _by_name(plan, query, collector).items()}
    for name, _ in query:
        collector.add((QUERY, name), "this method takes its parameters from the body", "extra_forbidden")
    document = json.loads(body) if body.strip() else {}
    if not isinstance(document, dict):
        raise invalid(("body",), "Input should be an object with the parameters by name", "dict_type")
    in_path = {parameter.name for parameter in plan.parameters if parameter.where == PATH}
    for name in in_path & document.keys():
        collector.add(("body", name), "it comes from the path", "extra_forbidden")
    return {name: ("body", value) for name, value in document.items() if name not in in_path}


def _by_name(plan: Plan, query: list[list[str]], collector: Collector) -> dict[str, Any]:
    """Repeated names are the items of a list; of anything else they would be a guess."""
    texts: dict[str, list[str]] = {}
    for name, text in query:
        texts.setdefault(name, []).append(text)
    lists = {parameter.name for parameter in plan.parameters if parameter.where == QUERY and _takes_list(parameter.form)}
    in_path = {parameter.name for parameter in plan.parameters if parameter.where == PATH}
    for name, found in texts.items():
        if name in in_path:
            collector.add((QUERY, name), "it comes from the path", "extra_forbidden")
        elif len(found) > 1 and name not in lists:
            collector.add((QUERY, name), "it stands there more than once", "multiple_values")
    return {name: found if name in lists else found[0] for name, found in texts.items() if name not in in_path}


def _takes_list(form: Form) -> bool:
    return form.kind in ("list", "set") or (form.kind == "union" and any(_takes_list(item) for item in form.items))


def answer(status: int, kind: str, body: bytes) -> bytes:
    return json.dumps({"status": status, "type": kind}).encode() + b"\n" + body


def _whole(value: Any) -> bytes:
    """Bytes are the body themselves; everything else is JSON."""
    return answer(200, BYTES, bytes(value)) if isinstance(value, (bytes, bytearray, memoryview)) else answer(200, JSON, to_json(value))


def _refusal(error: Exception, is_begun: bool = False) -> bytes:
    """The answer to what is no failure: a request that does not fit, and an exception that names its HTTP status.

    Raises the error where it is one; and behind the first item, where nobody can be told a status any more.
    """
    if not is_begun and isinstance(error, Invalid):
        return answer(422, JSON, to_json({"detail": [problem._asdict() for problem in error.problems]}))
    status = getattr(error, "status_code", None)  # HTTPException of FastAPI and Starlette
    if not is_begun and type(status) is int and 400 <= status <= 599:
        return answer(status, JSON, to_json({"detail": getattr(error, "detail", None) or str(error)}))
    raise error


class ItemWriter:
    """The items of a stream as the client wants them.

    Server-sent events if it accepts those; else strings as text and bytes as bytes, just as they are; else a line of JSON
    for each. The first item decides.
    """

    def __init__(self, head: dict[str, Any]) -> None:
        self._kind = EVENTS if EVENTS in head.get("accept", "") else ""
        self._count = 0

    @property
    def is_begun(self) -> bool:
        return self._count > 0

    def write(self, item: Any) -> bytes:
        if not self._kind:
            self._kind = TEXT if isinstance(item, str) else BYTES if isinstance(item, (bytes, bytearray, memoryview)) else NDJSON
        data = self._encode(item)
        self._count += 1
        return data if self._count > 1 else answer(200, self._kind, data)

    def nothing(self) -> bytes:
        """A stream without an item."""
        return answer(200, self._kind or NDJSON, b"")

    def _encode(self, item: Any) -> bytes:
        name = f"item {self._count}"
        if self._kind == NDJSON:
            return to_json(item, name) + b"\n"
        if self._kind == EVENTS:
            text = item.encode("utf-8") if isinstance(item, str) else to_json(item, name)
            return b"".join(b"data: " + line + b"\n" for line in _LINE_END.split(text)) + b"\n"
        if isinstance(item, str) == (self._kind == TEXT) and isinstance(item, (str, bytes, bytearray, memoryview)):
            return item.encode("utf-8") if isinstance(item, str) else bytes(item)
        raise TypeError(f"cannot go on with {name}, a {type(item).__qualname__}: the stream began as {self._kind}")
