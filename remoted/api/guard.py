"""Who gets a connection, and for how long it may stay silent.

Identity, rule and caps are settled on the accepted socket, before its first byte is read: the peer is what the
kernel attests (SO_PEERCRED), frozen, and no header can change it (T01). A look-up that fails closes the connection
(T02). One uid has its own cap besides the global one (T13), heads have a deadline (T12: aiohttp alone keeps a
half-sent head for an hour), compressed bodies are never expanded (T16).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from typing import Any

from aiohttp import web

from remoted import foreign
from remoted.access import Access, Peer
from remoted.api.exchange import refusal_body, refuse
from remoted.limits import Limits
from remoted.peers import peer_of
from remoted.tally import Tally

log = logging.getLogger(__name__)
#: Header lines of one request; a client of ours sends four.
_HEADERS = 64


class Door:
    """Counts who is inside and lets in whom the rule and the caps admit."""

    def __init__(self, limits: Limits, access: Access, tally: Tally) -> None:
        self._limits = limits
        self._access = access
        self._tally = tally
        self._inside = tally.connections["api"]
        #: Those whose next request has not begun to be answered, the one that has waited for longest first.
        self.waiting: dict[Connection, None] = {}

    def admit(self, sock: socket.socket) -> Peer | None:
        """The peer, counted until ``leave``; or None, and the socket is closed."""
        try:
            peer = peer_of(sock)
        except (OSError, ValueError, struct.error):
            foreign.leave(sock)
            return None
        if not self._access.admits(peer):
            self._turn_away(sock, 403, "FORBIDDEN", "cannot serve you: this daemon serves another user")
        elif limit := self._reached(peer):
            self._turn_away(sock, 429, "OVER_LIMIT", f"cannot take another connection: the limit {limit}; close some, or raise it in [limits] of the configuration")
        else:
            self._inside[peer.uid] += 1
            return peer
        return None

    def _reached(self, peer: Peer) -> str:
        """The cap that is reached, with its value; "" if there is room."""
        own = self._inside[peer.uid]
        if full := self._limits.full_for_one(peer.uid, own):
            return full
        full = self._limits.full_for_all(own, self._inside.total())
        return full if full and not self._drop_waiting() else ""

    def _drop_waiting(self) -> bool:
        """Who has sent nothing for longest goes: a user of many uids (subuid(5)) may fill the house, but only with silence."""
        oldest = next(iter(self.waiting), None)
        if oldest is None:
            return False
        del self.waiting[oldest]
        oldest.force_close()
        return True

    def leave(self, peer: Peer) -> None:
        self._inside[peer.uid] -= 1
        if not self._inside[peer.uid]:
            del self._inside[peer.uid]

    def _turn_away(self, sock: socket.socket, status: int, code: str, message: str) -> None:
        self._tally.note_refusal(code)
        _turn_away(sock, status, code, message)


def _turn_away(sock: socket.socket, status: int, code: str, message: str) -> None:
    """A whole answer in one write into an empty buffer: it costs no waiting and no memory."""
    body = refusal_body(code, message)
    head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(head.encode() + body)
    foreign.leave(sock)


class Impatient(web.RequestHandler):
    """A connection whose heads have a deadline, and whose failures have our one shape."""

    __slots__ = ("_head_deadline_seconds", "_head_timer")

    def __init__(self, server: web.Server, limits: Limits) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=limits.http_head_deadline_seconds,
            tcp_keepalive=False,
            access_log=None,  # type: ignore[arg-type]
            max_headers=_HEADERS,
            lingering_time=0.0,  # an unread body ends the connection: nobody waits for the rest of it
            auto_decompress=False,
        )
        self._head_deadline_seconds = limits.http_head_deadline_seconds
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await_head()

    def _await_head(self) -> None:
        """From here to the end of the next head; trickling does not lengthen it."""
        self.head_arrived()
        self._head_timer = self._loop.call_later(self._head_deadline_seconds, self.force_close)

    def head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        done = await super().finish_response(request, resp, start_time)
        if self.transport is not None:
            self._await_head()
        return done

    def connection_lost(self, exc: BaseException | None) -> None:
        self.head_arrived()
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What is not even HTTP, or broke under way: our one shape, no traceback, and the connection ends."""
        if request.writer.output_size > 0:
            raise ConnectionError("cannot answer twice")
        if status == 400:
            response = refuse(400, "BAD_REQUEST", "cannot read the request: it is not HTTP/1.1")
        else:
            log.error("cannot answer a request", exc_info=exc)
            response = refuse(500, "INTERNAL", "cannot answer: something is wrong in the daemon; its log says what")
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        log.error(*args, **kw)


class Connection(Impatient):
    """One admitted connection. Its peer was settled when it was accepted and never changes."""

    __slots__ = ("_door", "peer")

    def __init__(self, server: web.Server, peer: Peer, limits: Limits, door: Door) -> None:
        super().__init__(server, limits)
        self.peer = peer
        self._door = door

    def _await_head(self) -> None:
        super()._await_head()
        self._door.waiting[self] = None

    def head_arrived(self) -> None:
        super().head_arrived()
        self._door.waiting.pop(self, None)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._door.leave(self.peer)
