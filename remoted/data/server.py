"""Who gets a data connection: identity, rule and caps come before the first byte is read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct

from remoted import foreign
from remoted.access import Access
from remoted.accounts import Accounts
from remoted.clock import Clock
from remoted.data.callers import Clients, Runners
from remoted.data.connection import Connection
from remoted.limits import Limits
from remoted.peers import peer_of, with_limits
from remoted.rates import Rate
from remoted.tally import Tally
from remoted_client import wire

log = logging.getLogger(__name__)
#: Taken at one turn of the loop: what closed meanwhile is noticed before it counts against its user's next ones.
_ACCEPTS = 16


class DataServer:
    """Accepts connections and keeps them within their limits."""

    def __init__(self, sock: socket.socket, runners: Runners, limits: Limits, access: Access, accounts: Accounts, tally: Tally, clock: Clock) -> None:
        self._sock = sock
        self._runners = runners
        self._limits = limits
        self._access = access
        self._accounts = accounts
        self._connections: set[Connection] = set()
        #: Those that had not greeted when that was last looked at, the oldest first.
        self._silent: dict[Connection, None] = {}
        self._clients: Clients = {}
        self._tally = tally
        self._rate = Rate(lambda: limits.frames_per_second_per_uid, clock)
        self._per_uid = tally.connections["data"]
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.error("cannot accept a connection: %s", error)
                return
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        try:
            peer = peer_of(sock)
        except (OSError, ValueError, struct.error):
            foreign.leave(sock)
            return
        limit = self._limits.full_for_one(peer.uid, self._per_uid[peer.uid]) or self._full_for_all(peer.uid)
        if limit or not self._access.admits(peer):
            code, why = ("OVER_LIMIT", f"the limit {limit}; [limits] in config.toml raises it") if limit else ("FORBIDDEN", "this daemon serves another user")
            self._tally.note_refusal(code)
            with contextlib.suppress(OSError):
                sock.send(wire.encode({"op": "refused", "code": code, "message": f"cannot serve this connection: {why}"}))
            foreign.leave(sock)
            return
        if self._access.serves_everybody:
            peer = with_limits(peer, sock)
        try:
            connection = Connection(sock, peer, self._runners, self._clients, self._limits, self._accounts, self._tally, self._rate, self._gone)
        except OSError as error:
            log.error("cannot serve a connection: %s", error)
            foreign.leave(sock)
            return
        self._per_uid[peer.uid] += 1
        self._connections.add(connection)
        self._silent[connection] = None

    def _full_for_all(self, uid: int) -> str:
        """The cap that is reached, unless somebody makes room. A user of many uids (subuid(5)) may fill the house, but only with silence."""
        full = self._limits.full_for_all(self._per_uid[uid], len(self._connections))
        return full if full and not self._drop_silent(full) else ""

    def _drop_silent(self, full: str) -> bool:
        """Who has been silent for longest goes: an honest client greets at once, and who greets has an account."""
        while self._silent:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            if not oldest.has_greeted:
                oldest.turn_away("OVER_LIMIT", f"cannot wait any longer for your greeting: the limit {full}")
                return True
        return False

    def _gone(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._silent.pop(connection, None)
        if connection.foreign is None:
            self._leave_room(connection.peer.uid)
        else:  # whoever passes what cannot be closed has the fewer connections for it
            connection.foreign.add_done_callback(lambda _: self._leave_room(connection.peer.uid))

    def _leave_room(self, uid: int) -> None:
        self._per_uid[uid] -= 1
        if not self._per_uid[uid]:
            del self._per_uid[uid]

    def close(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        for connection in list(self._connections):
            connection.close()
