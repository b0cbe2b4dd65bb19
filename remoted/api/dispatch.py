"""From a request to its handler: route, rule, query, body, in this order; anything else is refused.

Nothing here is looked up by a name from the request but in the table of ``routes`` (CVE-2017-11610 was a server
that resolved methods by attribute).
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import replace
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ValidationError

from remoted.access import Access, Peer
from remoted.api import bodies, strict_json
from remoted.api.exchange import Ask, HttpRefusal, refuse
from remoted.api.guard import Connection
from remoted.api.routes import ROUTES, Route
from remoted.api.services import Services
from remoted.errors import BadRequest, Refused, StoreError
from remoted.limits import Limits
from remoted.rates import Rate

log = logging.getLogger(__name__)


class Dispatcher:
    """Answers every request of every connection."""

    def __init__(self, services: Services, access: Access) -> None:
        self._services = services
        self._access = access
        self._rate = Rate(lambda: services.limits.requests_per_second_per_uid, services.clock)
        self._busy: set[asyncio.Task[Any]] = set()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        try:
            response = await self._answer_or_refuse(request)
        finally:
            self._busy.discard(task)
        if not request.content.is_eof():
            response.force_close()  # the rest of a body that nobody reads would be taken for the next request
        return response

    async def _answer_or_refuse(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.head_arrived()
        try:
            return await self._answer(request, connection.peer)
        except HttpRefusal as error:
            self._services.tally.note_refusal(error.code)
            return refuse(error.http_status, error.code, str(error), error.headers, error.document)
        except Refused as error:
            self._services.tally.note_refusal(error.code)
            return refuse(error.http_status, error.code, str(error))
        except StoreError as error:
            log.error("%s", error)
            return refuse(503, "STORE_FAILED", "cannot answer: the daemon's database refuses; `remotectl doctor` may say why")

    async def _answer(self, request: web.BaseRequest, peer: Peer) -> web.StreamResponse:
        if wait := self._rate.admit(peer.uid):
            most = self._services.limits.requests_per_second_per_uid
            raise HttpRefusal(429, "OVER_LIMIT", f"cannot answer so many requests: requests_per_second_per_uid is {most}; ask again in a moment", {"Retry-After": str(math.ceil(wait))})
        route, parameters = find_route(request.method, request.rel_url.raw_path)
        if not self._access.allows(route.rule, peer):
            raise HttpRefusal(403, "FORBIDDEN", "cannot do this for you: it needs an administrator (remotectl: with sudo)")
        peer = replace(peer, name=await self._services.accounts.require(peer.uid))
        query = body = None
        if not route.is_open:
            query = parse_query(route, request)
            body = await parse_body(route, request, self._services.limits)
        return await route.handler(self._services, Ask(peer, parameters, query, body, request))

    async def close(self, grace_seconds: float) -> None:
        """Running requests end by themselves, or are cancelled."""
        if self._busy:
            await asyncio.wait(list(self._busy), timeout=grace_seconds)
        left = list(self._busy)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=grace_seconds)


def find_route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """The table's row and the path's parameters, as sent. Raises HttpRefusal NO_ROUTE, WRONG_METHOD."""
    here = [(route, parameters) for route in ROUTES if (parameters := route.match(path)) is not None]
    for route, parameters in here:
        if route.method == method:
            return route, parameters
    if here:
        allowed = ", ".join(route.method for route, _ in here)
        raise HttpRefusal(405, "WRONG_METHOD", f"cannot use this method here: use {allowed}", {"Allow": allowed})
    raise HttpRefusal(404, "NO_ROUTE", "cannot find this path: /v1/openapi.json lists what there is")


def parse_query(route: Route, request: web.BaseRequest) -> BaseModel | None:
    """Raises BadRequest BAD_QUERY on a name that is unknown or stands twice, and on a bad value."""
    given = request.rel_url.query
    values = dict(given.items())
    if len(values) != len(given):
        raise BadRequest("BAD_QUERY", "cannot use the query: a name stands twice")
    if route.query is None:
        if values:
            raise BadRequest("BAD_QUERY", "cannot use the query: this path takes none")
        return None
    try:
        return route.query.model_validate(values)
    except ValidationError as error:
        raise BadRequest("BAD_QUERY", f"cannot use the query: {_problems(error)}") from None


async def parse_body(route: Route, request: web.BaseRequest, limits: Limits) -> BaseModel | None:
    """Raises BadRequest BAD_JSON, BAD_BODY; HttpRefusal TOO_LARGE, TOO_SLOW, UNSUPPORTED_ENCODING."""
    if route.body is None:
        bodies.refuse_any(request)
        return None
    data = await bodies.read(request, limits)
    try:
        return route.body.model_validate(strict_json.parse(data) if data else {})
    except strict_json.BadJson as error:
        raise BadRequest("BAD_JSON", f"cannot read the body: {error}") from None
    except ValidationError as error:
        raise BadRequest("BAD_BODY", f"cannot use the body: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    """Where and what, never the value: it may be a secret."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))[:100]}: {item['msg']}" for item in error.errors(include_input=False)[:5])
