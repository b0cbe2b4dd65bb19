"""Bodies of requests: read whole, within a size and a time (T12, T15), and never expanded (T16)."""

from __future__ import annotations

import asyncio

from aiohttp import web

from remoted.api.exchange import HttpRefusal
from remoted.errors import BadRequest
from remoted.limits import Limits


def refuse_any(request: web.BaseRequest) -> None:
    """Where a body means nothing. Raises BadRequest, HttpRefusal."""
    refuse_compressed(request)
    if request.body_exists and request.content_length != 0:
        raise BadRequest("BAD_BODY", "cannot use a body: this path takes none")


def refuse_compressed(request: web.BaseRequest) -> None:
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise HttpRefusal(415, "UNSUPPORTED_ENCODING", "cannot read a compressed body: send it as it is")


async def read(request: web.BaseRequest, limits: Limits) -> bytes:
    """The whole of it. Raises HttpRefusal TOO_LARGE, TOO_SLOW, UNSUPPORTED_ENCODING; BadRequest BAD_BODY."""
    refuse_compressed(request)
    too_large = HttpRefusal(413, "TOO_LARGE", f"cannot take this body: the limit http_body_bytes is {limits.http_body_bytes}")
    if (request.content_length or 0) > limits.http_body_bytes:
        raise too_large  # said before the first byte of it is read (T15)
    received = bytearray()

    async def collect() -> None:
        while chunk := await request.content.readany():
            received.extend(chunk)
            if len(received) > limits.http_body_bytes:
                raise too_large

    try:
        await asyncio.wait_for(collect(), limits.http_body_deadline_seconds)
    except asyncio.TimeoutError:
        limit = f"http_body_deadline_seconds is {limits.http_body_deadline_seconds:g}"
        raise HttpRefusal(408, "TOO_SLOW", f"cannot wait longer for the body: the limit {limit}") from None
    except web.RequestPayloadError:
        raise BadRequest("BAD_BODY", "cannot read the body: it is not what its head says") from None
    return bytes(received)
