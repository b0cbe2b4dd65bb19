"""The process at the other end of a Unix socket, as the kernel attests it: asked in one place for both doors."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import select
import socket
import struct
from dataclasses import replace
from pathlib import Path

from remoted.access import Peer

# include/uapi/asm-generic/socket.h
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77  # linux 6.5
_SO_PASSRIGHTS = 83  # linux 6.16
_GROUP_BYTES = 4
#: What CPython lets getsockopt return.
_PYTHON_BYTES = 1024
_NGROUPS_MAX = 65536
#: What an administrator limits a user's processes by. Not CPU time, which a warm worker uses up for many; not the data
#: segment, which is the config's; and no core is ever written.
_LIMITS = {
    "Max file size": resource.RLIMIT_FSIZE,
    "Max stack size": resource.RLIMIT_STACK,
    "Max processes": resource.RLIMIT_NPROC,
    "Max locked memory": resource.RLIMIT_MEMLOCK,
    "Max address space": resource.RLIMIT_AS,
    "Max pending signals": resource.RLIMIT_SIGPENDING,
    "Max msgqueue size": resource.RLIMIT_MSGQUEUE,
    "Max nice priority": resource.RLIMIT_NICE,
    "Max realtime priority": resource.RLIMIT_RTPRIO,
}
#: The first column of /proc/PID/limits (fs/proc/base.c).
_NAME_WIDTH = 26


def take_no_descriptors(sock: socket.socket) -> None:
    """Who passes one here fails (EPERM), and at whoever connects to a listening one too. Before Linux 6.16 who reads looks for them (``foreign``).

    A descriptor need not even be received: where a file of the sender's own file system has unwritten pages, the drop of a message
    that holds its last reference writes them, and waits for the sender as long as that likes, whatever signals come (decision 0076).
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def peer_of(sock: socket.socket) -> Peer:
    """Who connected (SO_PEERCRED, unix(7)). Raises OSError, ValueError or struct.error; never guesses (T02)."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(uid, gid, pid, _groups_of(sock))


def _groups_of(sock: socket.socket) -> tuple[int, ...]:
    """The supplementary groups that the process had when it connected: no look-up of its user's could say that."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _PYTHON_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        data = _many_groups(sock)
    return struct.unpack(f"{len(data) // _GROUP_BYTES}I", data)


def _many_groups(sock: socket.socket) -> bytes:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_NGROUPS_MAX * _GROUP_BYTES)
    size = ctypes.c_uint32(len(buffer))
    if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, buffer, ctypes.byref(size)) != 0:
        raise OSError(ctypes.get_errno(), "cannot read the groups of a peer")
    return buffer.raw[: size.value]


def with_limits(peer: Peer, sock: socket.socket) -> Peer:
    """The same peer and what its process may use; unchanged if that has ended: its pid may be somebody else's by now."""
    pidfd = peer_pidfd(sock, peer.pid)
    if pidfd is None:
        return peer
    try:
        limits = _read_limits(peer.pid)
        lives = not select.select([pidfd], [], [], 0)[0]
    except (OSError, ValueError, KeyError):
        return peer
    finally:
        os.close(pidfd)
    return replace(peer, limits=limits) if lives else peer


def _read_limits(pid: int) -> tuple[tuple[int, int, int], ...]:
    """From /proc: prlimit(2) of another user's process needs CAP_SYS_RESOURCE, which root in a container lacks."""
    text = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
    found = {line[:_NAME_WIDTH].strip(): line[_NAME_WIDTH:].split()[:2] for line in text.splitlines()[1:]}
    limits = [(number, _number(found[name][0]), _number(found[name][1])) for name, number in _LIMITS.items()]
    descriptors = _number(found["Max open files"][1])  # how many it uses of them it says with each call
    return (*limits, (resource.RLIMIT_NOFILE, descriptors, descriptors))


def _number(text: str) -> int:
    return resource.RLIM_INFINITY if text == "unlimited" else int(text)


def peer_pidfd(sock: socket.socket, pid: int) -> int | None:
    """A pidfd of the process that connected; None when it is gone already."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        try:
            return os.pidfd_open(pid)
        except ProcessLookupError:
            return None
