"""The process at the other end of a Unix socket, as the kernel attests it: asked in one place for both doors."""

from __future__ import annotations

import os
import socket
import struct

from remoted.access import Peer

_SO_PEERPIDFD = 77  # linux 6.5, include/uapi/asm-generic/socket.h


def peer_of(sock: socket.socket) -> Peer:
    """Who connected (SO_PEERCRED, unix(7)). Raises OSError, ValueError or struct.error; never guesses (T02)."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(uid, gid, pid)


def peer_pidfd(sock: socket.socket, pid: int) -> int | None:
    """A pidfd of the process that connected; None when it is gone already."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        try:
            return os.pidfd_open(pid)
        except ProcessLookupError:
            return None
