"""Where the workers of one fork server present themselves: a socket that nobody else can reach, and whom to believe.

The socket's file is unlinked at once; what is left is a descriptor, which the server gets and its children inherit. A
server is as hostile as a worker, so nothing that is said here counts but the birth token, and that only from the server's
own grandchild: who connected is what the kernel says (SO_PEERCRED, SO_PEERPIDFD), whose child it is what /proc says while
it and the server live (MECHANISMS 9). A pid in a message is not even read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import socket
import struct
from pathlib import Path

from remoted import foreign
from remoted.peers import peer_of, peer_pidfd
from remoted.spawn.launch import Process
from remoted_client import wire

_BACKLOG = 64
#: Connections that have not said yet what they are; more come only from a server that means no good.
_SILENT_MOST = 16
_BUFFER_BYTES = 1 << 20


class NotBelieved(Exception):
    """Whoever holds a birth token is not who may hold it."""


class Door:
    """One fork server's. ``key`` is the descriptor by which its children find the socket."""

    def __init__(self, folder: Path, uid: int) -> None:
        """Raises OSError."""
        self._uid = uid
        self._server: Process | None = None
        self._expected: dict[str, asyncio.Future[tuple[Process, socket.socket]]] = {}
        self._silent: set[socket.socket] = set()
        self._loop = asyncio.get_running_loop()
        self._sock, self.key = _open(folder, uid)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def belongs_to(self, server: Process) -> None:
        """The server has been started, and has the key; before that nobody can be its grandchild."""
        self._server = server
        self._forget_key()

    def expect(self, token: str) -> asyncio.Future[tuple[Process, socket.socket]]:
        """A worker that is to be born: its process and its channel, on which it waits for a word, or NotBelieved."""
        self._expected[token] = self._loop.create_future()
        return self._expected[token]

    def forget(self, token: str) -> None:
        """Nobody waits for it any more."""
        self._expected.pop(token, None)

    def fail(self, token: str, error: Exception) -> None:
        """It will not come."""
        future = self._expected.pop(token, None)
        if future is not None and not future.done():
            future.set_exception(error)

    def close(self, error: Exception) -> None:
        """Idempotent. Whoever is expected does not come."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        foreign.leave(self._sock)
        self._forget_key()
        for sock in list(self._silent):
            self._hear_no_more(sock)
            foreign.leave(sock)
        for token in list(self._expected):
            self.fail(token, error)

    def _forget_key(self) -> None:
        if self.key >= 0:
            os.close(self.key)
            self.key = -1

    def _accept(self) -> None:
        try:
            sock, _address = self._sock.accept()
        except OSError:
            return
        if len(self._silent) >= _SILENT_MOST:
            foreign.leave(sock)
            return
        sock.setblocking(False)
        self._silent.add(sock)
        self._loop.add_reader(sock.fileno(), self._hear, sock)

    def _hear_no_more(self, sock: socket.socket) -> None:
        self._silent.discard(sock)
        self._loop.remove_reader(sock.fileno())

    def _hear(self, sock: socket.socket) -> None:
        """The first message decides."""
        try:
            data, fds = wire.receive(sock, wire.MESSAGE_BYTES)
            frame = wire.decode_message(data, foreign.sift(fds, foreign.is_memory))
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, wire.WireError):
            self._hear_no_more(sock)
            foreign.leave(sock)
            return
        self._hear_no_more(sock)
        frame.close()
        future = self._expected.pop(str(frame.header.get("token", "")), None)
        if future is None or future.done():
            foreign.leave(sock)
            return
        try:
            process = self._attest(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        except (OSError, ValueError, struct.error, NotBelieved) as error:
            foreign.leave(sock)
            future.set_exception(error if isinstance(error, NotBelieved) else NotBelieved(f"the worker is gone: {error}"))
            return
        future.set_result((process, sock))

    def _attest(self, sock: socket.socket) -> Process:
        """Who connected. Raises NotBelieved unless it is the server's living grandchild."""
        peer = peer_of(sock)
        if self._server is None or peer.uid != self._uid:
            raise NotBelieved("another user's process came in the place of a worker")
        pidfd = peer_pidfd(sock, peer.pid)
        if pidfd is None:
            raise NotBelieved("the worker is gone")
        parent = parent_of(peer.pid)
        is_its = bool(parent) and parent_of(parent) == self._server.pid
        # All of them lived throughout, so none of these numbers can have been somebody else's.
        if not is_its or parent_of(peer.pid) != parent or not (lives(pidfd) and lives(self._server.pidfd)):
            os.close(pidfd)
            raise NotBelieved("a process that the fork server has not borne came in the place of a worker")
        return Process(peer.pid, pidfd)


def _open(folder: Path, uid: int) -> tuple[socket.socket, int]:
    """(listening socket, descriptor of its file), without the file. By way of a descriptor of the folder, whose path may be long.

    The folder is the daemon's own, so nobody can put something else in the place of the file.
    """
    at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = f"/proc/self/fd/{at}/{secrets.token_hex(8)}"
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        if uid != os.geteuid():
            os.chown(path, uid, -1, follow_symlinks=False)
        key = os.open(path, os.O_PATH | os.O_CLOEXEC)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(at)
    return sock, key


def parent_of(pid: int) -> int:
    """0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def lives(pidfd: int) -> bool:
    """Is that process neither dead nor a zombie?"""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return not poller.poll(0)
