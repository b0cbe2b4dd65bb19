"""Loopback TCP in front of the functions of one process, for whoever has the token.

It answers on loopback alone, to its own names (a page that makes a browser believe that a stranger's name is 127.0.0.1
says that name in Host), and passes nothing on but what it knows: requests become new ones on the API socket. There is no
cookie: cookies go to every port of a host, and other ports are other people's (docs/decisions/0011).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import secrets
import socket
from importlib import resources
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from remoted.api import bodies
from remoted.api.exchange import HttpRefusal, refuse
from remoted.api.guard import Impatient
from remoted.cli import transport
from remoted.cli.ending import CliError, NoDaemon
from remoted.errors import Refused
from remoted.limits import Limits

_CONNECTIONS = 256
_UP = ("Accept", "Content-Type")
_DOWN = ("Content-Type", "Content-Length", "Retry-After", "Allow", "Cache-Control", "X-Content-Type-Options", "X-Remoted-Job")
_OPENAPI = "/v1/endpoints/openapi.json"
#: Served to anybody who asks: there is nothing of the user's in them.
_PAGES = {"/docs": ("docs.html", "text/html"), "/docs.js": ("docs.js", "text/javascript")}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
RESERVED = ("GET /docs", "GET /docs.js", "GET /openapi.json")


class Gateway:
    """One listening socket, from ``start`` to ``close``."""

    def __init__(self, sock: socket.socket, process: int) -> None:
        """``process``: whose routes these are, as the daemon numbers it."""
        self.token = secrets.token_urlsafe(32)
        self._limits = Limits()
        self._sock = sock
        host, port = sock.getsockname()[:2]
        own = f"[{host}]" if ":" in host else host
        self.url = f"http://{own}:{port}"
        self._names = {f"{name}:{port}" for name in (own, "localhost")} | ({own, "localhost"} if port == 80 else set())
        #: Only what that process serves: another script's functions are not what this token is for.
        self._ours = {"X-Remoted-Process": str(process), "Accept-Encoding": "identity"}
        self._inside: set[Impatient] = set()

    async def start(self) -> None:
        self._server = web.Server(self._handle, handler_cancellation=True)
        self._session = aiohttp.ClientSession(connector=_Trusted(os.path.join(transport.socket_directory(), "api.sock")), auto_decompress=False)
        self._listener = await asyncio.get_running_loop().create_server(self._enter, sock=self._sock)

    def _enter(self) -> Impatient:
        return _Visitor(self._server, self._limits, self._inside)

    async def close(self) -> None:
        self._listener.close()
        await self._server.shutdown(0.5)
        await self._session.close()

    # -- a request -----------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if isinstance(request.protocol, Impatient):
            request.protocol.head_arrived()
        try:
            response = await self._answer(request)
        except HttpRefusal as error:
            response = refuse(error.http_status, error.code, str(error), error.headers)
        except Refused as error:
            response = refuse(error.http_status, error.code, str(error))
        except (aiohttp.ClientConnectionError, CliError) as error:
            if _was_reached(error):
                response = refuse(502, "LOST", "the daemon went away before it had answered: the call may have run, and is not made a second time")
            else:
                response = refuse(503, "DAEMON_AWAY", f"cannot reach the daemon: {error}; it may be starting, try again", {"Retry-After": "1"})
        if not request.content.is_eof():
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if [name.lower() for name in request.headers.getall("Host", [])] not in [[name] for name in self._names]:
            raise HttpRefusal(403, "WRONG_HOST", f"cannot serve this host name: use {self.url}")
        path = request.rel_url.raw_path
        if request.method == "GET" and path in _PAGES:
            return _page(*_PAGES[path])
        self._check_token(request)
        if request.method == "GET" and path == "/openapi.json":
            return await self._openapi()
        return await self._pass_on(request)

    def _check_token(self, request: web.BaseRequest) -> None:
        given = request.headers.getall("Authorization", [""])
        expected = f"Bearer {self.token}"
        if len(given) != 1 or not hmac.compare_digest(given[0].encode("utf-8", "replace"), expected.encode()):
            raise HttpRefusal(401, "NO_TOKEN", "cannot let you in: send the header 'Authorization: Bearer TOKEN' with the token that `remotectl serve` printed", {"WWW-Authenticate": "Bearer"})

    async def _openapi(self) -> web.StreamResponse:
        async with self._session.get(f"http://remoted{_OPENAPI}", headers=self._ours) as answer:
            document = json.loads(await answer.read())
        return web.json_response({**document, "servers": [{"url": "/"}]})

    async def _pass_on(self, request: web.BaseRequest) -> web.StreamResponse:
        """A new request of the same meaning, and its answer as it comes."""
        body = await bodies.read(request, self._limits)
        headers = {name: request.headers[name] for name in _UP if name in request.headers}
        url = _upstream(request)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
        async with self._session.request(request.method, url, data=body or None, headers={**headers, **self._ours}, allow_redirects=False, timeout=timeout) as answer:
            response = web.StreamResponse(status=answer.status, headers={name: answer.headers[name] for name in _DOWN if name in answer.headers})
            if answer.content_length is None:
                response.enable_chunked_encoding()
            await response.prepare(request)
            try:
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            except aiohttp.ClientPayloadError as error:
                raise ConnectionError("the answer broke off") from error
            await response.write_eof()
            return response


class _Visitor(Impatient):
    """Anybody on this host may connect, so there is a cap, and silence has its deadline."""

    __slots__ = ("_inside",)

    def __init__(self, server: web.Server, limits: Limits, inside: set[Impatient]) -> None:
        super().__init__(server, limits)
        self._inside = inside

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._inside.add(self)
        if len(self._inside) > _CONNECTIONS:
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._inside.discard(self)
        super().connection_lost(exc)


class _Trusted(aiohttp.UnixConnector):
    """Not one byte goes to a daemon that is neither root's nor ours (T08)."""

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> Any:
        protocol: Any = await super()._create_connection(req, traces, timeout)
        try:
            transport.check_server(protocol.transport.get_extra_info("socket"))
        except NoDaemon:
            protocol.close()
            raise
        return protocol


def _was_reached(error: Exception) -> bool:
    """Had the request gone to a daemon?"""
    return isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)) and not isinstance(error, aiohttp.ClientConnectorError)


def _upstream(request: web.BaseRequest) -> URL:
    """The path and query as they came, below the prefix of functions."""
    return URL(f"http://remoted/f{request.rel_url.raw_path_qs}", encoded=True)


def _page(name: str, kind: str) -> web.Response:
    body = resources.files("remoted.cli").joinpath(name).read_bytes()
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=_PAGE_HEADERS)


def listen(host: str, port: int) -> socket.socket:
    """A socket on a loopback address; 0 is a free port. Raises CliError."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise CliError(f"cannot listen on {host}: it is not an address; use 127.0.0.1 or ::1") from None
    if not address.is_loopback:
        raise CliError(f"cannot listen on {host}: functions are served on this machine only; from another one use `ssh -L`, or put a server with TLS in front")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(address), port))
        sock.listen(128)  # at once: until then another user could take the port from us
    except OSError as error:
        sock.close()
        raise CliError(f"cannot listen on {host}:{port}: {error.strerror}; --port 0 takes a free one") from error
    return sock
