"""Functions with HTTP routes: a request becomes a call, and its outcome the answer.

    200 what it returned       404, 405 no such route       422 the request does not fit the parameters, named
    500 it raised, or died     503 no worker is free: again later       504 longer than its timeout

The worker makes the answers of 200 and 422; those of a call that had none are made here.
"""

from __future__ import annotations

import json

from aiohttp import web

from remoted.api import bodies, schemas, strict_json
from remoted.api.answering import EVENTS, NDJSON, Answering, BadAnswer, Head, Part, exception_of
from remoted.api.exchange import Ask, HttpRefusal, refusal_body, reply
from remoted.api.openapi import describe_endpoints
from remoted.api.services import Services
from remoted.calls import Call
from remoted.endpoints import Endpoint, WrongMethod
from remoted.errors import BadRequest, Conflict
from remoted.model import Reason, Status

_BODILESS = ("GET", "DELETE")
#: Nobody may take an answer for a page or a script, or keep it.
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
#: nginx's number, for whoever looks at what was served.
_CLIENT_LEFT = 499
_RETRY_AFTER = {"Retry-After": "1"}


async def list_endpoints(services: Services, ask: Ask) -> web.StreamResponse:
    """The routes of your functions, and which of your processes serves them."""
    found = services.endpoints.of(ask.peer)
    return reply(schemas.Endpoints(endpoints=[_view(endpoint) for endpoint in found]))


def _view(endpoint: Endpoint) -> schemas.Endpoint:
    name = endpoint.request.options.name or ""
    return schemas.Endpoint(method=endpoint.method, path=endpoint.path, name=name, stream=endpoint.is_stream, pid=endpoint.owner.pid)


async def openapi(services: Services, ask: Ask) -> web.StreamResponse:
    """The routes of your functions as an OpenAPI document, made from their type hints."""
    return web.json_response(describe_endpoints(services.endpoints.of(ask.peer, _process(ask))))


def _process(ask: Ask) -> int | None:
    """``X-Remoted-Process`` leaves only the routes that this process of yours serves; it can never add any (T01)."""
    text = ask.request.headers.get("X-Remoted-Process")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise BadRequest("BAD_HEADER", "cannot use X-Remoted-Process: it is not a process id")
    return int(text[:18])


async def answer(services: Services, ask: Ask) -> web.StreamResponse:
    """Call one of your functions by its HTTP route."""
    body = await bodies.read(ask.request, services.limits)  # before any refusal: who is still sending hears none
    endpoint, parameters = _find(services, ask)
    began, call, status = services.clock.monotonic(), None, _CLIENT_LEFT
    try:
        call = _begin(services, endpoint, _request(ask, endpoint, parameters, body))
        response = await _answer(services, ask, endpoint, call)
        status = response.status
        return response
    except HttpRefusal as error:
        status = error.http_status
        raise
    finally:
        endpoint.owner.on_served(endpoint, status, services.clock.monotonic() - began, call)


def _find(services: Services, ask: Ask) -> tuple[Endpoint, dict[str, str]]:
    try:
        return services.endpoints.find(ask.peer, ask.request.method, ask.parameters["path"], _process(ask))
    except WrongMethod as error:
        raise HttpRefusal(405, error.code, str(error), {"Allow": error.allowed}) from None


def _request(ask: Ask, endpoint: Endpoint, parameters: dict[str, str], body: bytes) -> bytes:
    """The request as the worker reads it: a line of JSON, and the body as it came. It is JSON of one meaning (T17)."""
    if body.strip():
        if endpoint.method in _BODILESS:
            raise HttpRefusal(400, "BAD_BODY", f"cannot use a body: {endpoint.method} takes its parameters from the query")
        try:
            strict_json.parse(body)
        except strict_json.BadJson as error:
            problem = {"loc": ["body"], "msg": f"cannot read it: {error}", "type": "json_invalid"}
            raise HttpRefusal(422, "BAD_JSON", f"cannot read the body: {error}", document={"detail": [problem]}) from None
    query = [list(pair) for pair in ask.request.rel_url.query.items()]
    head = {"path": parameters, "query": query, "accept": ask.request.headers.get("Accept", "")}
    return json.dumps(head).encode() + b"\n" + body


def _begin(services: Services, endpoint: Endpoint, request: bytes) -> Call:
    try:
        return services.endpoints.call(endpoint, request)
    except Conflict as error:
        raise HttpRefusal(503, error.code, str(error), _RETRY_AFTER) from None


async def _answer(services: Services, ask: Ask, endpoint: Endpoint, call: Call) -> web.StreamResponse:
    watcher = Answering(call, endpoint.owner)
    try:
        first = await watcher.next()
        if first is None:
            raise _failure(call)
        head = _head(first)
        if endpoint.is_stream:
            return await _send_stream(services, ask, call, watcher, first, head)
        return await _send_whole(ask, call, first, head)
    finally:
        watcher.close()
        if not call.status.is_terminal:
            services.endpoints.leave(call)


def _head(part: Part) -> Head:
    try:
        return part.head()
    except BadAnswer:
        part.close()
        raise HttpRefusal(500, "BAD_ANSWER", "cannot give the answer: the worker sent something that is none") from None


async def _send_whole(ask: Ask, call: Call, part: Part, head: Head) -> web.StreamResponse:
    response = _response(call, head)
    response.content_length = part.size - head.size
    return await _send(ask, response, part, head.size)


async def _send(ask: Ask, response: web.StreamResponse, part: Part, start: int) -> web.StreamResponse:
    try:
        await response.prepare(ask.request)
        async for chunk in part.chunks(start):
            await response.write(chunk)
        await response.write_eof()
    finally:
        part.close()
    return response


async def _send_stream(services: Services, ask: Ask, call: Call, watcher: Answering, first: Part, head: Head) -> web.StreamResponse:
    """The worker may be so many items ahead of what the client has taken. What breaks off says why, and lacks its last chunk."""
    response = _response(call, head)
    response.enable_chunked_encoding()
    part: Part | None = first
    start = head.size
    while part is not None:
        try:
            if not response.prepared:
                await response.prepare(ask.request)
            async for chunk in part.chunks(start):
                await response.write(chunk)
        finally:
            part.close()
        services.endpoints.credit(call, 1)
        part, start = await watcher.next(), 0
    if call.status is not Status.COMPLETED:
        await response.write(_last_words(call, head))
        raise ConnectionError(f"the stream broke off: {call.error}")
    await response.write_eof()
    return response


def _last_words(call: Call, head: Head) -> bytes:
    """Why a stream breaks off, where its form has a place for that: an event, or a line. Text and bytes could not be told apart from it."""
    failure = _failure(call)
    body = refusal_body(failure.code, str(failure), failure.document)
    return {EVENTS: b"event: error\ndata: " + body + b"\n\n", NDJSON: body + b"\n"}.get(head.content_type, b"")


def _response(call: Call, head: Head) -> web.StreamResponse:
    return web.StreamResponse(status=head.status, headers={**_HEADERS, "Content-Type": head.content_type, "X-Remoted-Job": call.id})


def _failure(call: Call) -> HttpRefusal:
    """The answer to a call that ended without one."""
    error = call.error or f"{call.name} ended without an answer"
    if call.error_type == "POOL_BUSY":
        return HttpRefusal(503, "POOL_BUSY", error, _RETRY_AFTER)
    if call.status is Status.TIMED_OUT:
        return HttpRefusal(504, "TIMED_OUT", error)
    if call.reason is Reason.DAEMON_STOPPED:
        return HttpRefusal(503, "DAEMON_STOPPED", error, _RETRY_AFTER)
    reason = call.reason.value if call.reason is not None else "FAILED"
    return HttpRefusal(500, reason, error, document=exception_of(call))
