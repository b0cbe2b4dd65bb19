"""Accepts connections on ``api.sock``, serves them, and ends on time whatever clients do (T57)."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket

from aiohttp import web

from remoted.access import Access
from remoted.api.dispatch import Dispatcher
from remoted.api.guard import Connection, Door
from remoted.api.services import Services
from remoted.foreign import ByteSocket
from remoted.peers import take_no_descriptors

log = logging.getLogger(__name__)
#: How long running requests may go on after ``close``; twice in the worst case.
_GRACE_SECONDS = 0.5
_ACCEPTS_A_TURN = 64
#: Without a descriptor left, ask again after this long instead of spinning.
_STARVED_SECONDS = 0.1


async def serve(services: Services, sock: socket.socket, access: Access | None = None) -> ApiServer:
    """Serve on a listening Unix socket until ``close``. ``access`` says whom, by default our own user."""
    server = ApiServer(services, sock, access or Access(os.geteuid()))
    server.start()
    return server


class ApiServer:
    """Made by ``serve``."""

    def __init__(self, services: Services, sock: socket.socket, access: Access) -> None:
        self._sock = sock
        self._limits = services.limits
        self._loop = asyncio.get_running_loop()
        self._door = Door(services.limits, access, services.tally)
        self._dispatcher = Dispatcher(services, access)
        # handler_cancellation: a follower that hangs up takes its handler, and its watcher, with it.
        self._server = web.Server(self._dispatcher, handler_cancellation=True)
        self._arriving: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        take_no_descriptors(self._sock)
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                sock, _address = self._sock.accept()  # the address is text of the client's choosing: unused (T01)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._starve(error)
                return
            self._admit(sock)

    def _starve(self, error: OSError) -> None:
        log.error("cannot accept a connection: %s", error)
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(_STARVED_SECONDS, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _admit(self, sock: socket.socket) -> None:
        peer = self._door.admit(sock)
        if peer is None:
            return
        sock = ByteSocket(fileno=sock.detach())
        sock.setblocking(False)
        task = self._loop.create_task(self._attach(sock, Connection(self._server, peer, self._limits, self._door)))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    async def _attach(self, sock: socket.socket, connection: Connection) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock)
        except OSError as error:
            log.error("cannot serve a connection: %s", error)
            sock.close()
            self._door.leave(connection.peer)

    async def close(self) -> None:
        """Take nothing new, let short requests end, cut the rest off. Under two seconds."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
        if self._arriving:
            await asyncio.wait(self._arriving, timeout=_GRACE_SECONDS)
        self._server.pre_shutdown()
        await self._dispatcher.close(_GRACE_SECONDS)
        await self._server.shutdown(_GRACE_SECONDS)
