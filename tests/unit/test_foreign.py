"""Descriptors that are passed where none are wanted, and what lies unread in a connection that is closed (T20)."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path

import pytest

from remoted import foreign
from remoted_client import wire


def _wait_for_threads() -> None:
    for thread in [thread for thread in threading.enumerate() if thread.name == "foreign"]:
        thread.join(10)


async def test_t20_asyncio_ends_a_connection_on_which_descriptors_are_passed() -> None:
    """Read as bytes, the kernel would drop them, in the loop and for as long as their file system likes."""
    theirs, ours = socket.socketpair()
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    class Heard(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data[::-1])

        def connection_lost(self, exc: Exception | None) -> None:
            lost.set_result(type(exc).__name__)

    sock = foreign.ByteSocket(fileno=ours.detach())
    sock.setblocking(False)
    reading, writing = os.pipe()
    with theirs:
        await asyncio.get_running_loop().connect_accepted_socket(Heard, sock)
        await asyncio.to_thread(theirs.send, b"abc")
        assert await asyncio.to_thread(theirs.recv, 10) == b"cba"
        wire.send(theirs, b"abc", (writing,))
        os.close(writing)
        assert await asyncio.wait_for(lost, 10) == "ConnectionResetError"
        assert theirs.recv(10) == b""
    _wait_for_threads()
    assert os.read(reading, 1) == b"", "nobody has the other end any more"
    os.close(reading)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_t20_what_is_unread_when_a_connection_ends_is_closed_behind_it(kind: int, tmp_path: Path) -> None:
    """Memory, a pipe, an ordinary file, a socket that holds one more; and an empty message before them all."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, kind)
    inner, outer = socket.socketpair()
    reading, writing = os.pipe()
    wire.send(inner, b"x", (writing,))
    passed = (wire.memfd("test", b"x"), os.dup(writing), os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR), outer.detach())
    if kind == socket.SOCK_SEQPACKET:
        theirs.send(b"")
    for fd in passed:
        wire.send(theirs, b"abc", (fd,))
    for fd in (*passed, writing):
        os.close(fd)
    inner.close()
    before = len(os.listdir("/proc/self/fd"))
    foreign.leave(ours)
    _wait_for_threads()
    theirs.close()
    assert os.read(reading, 1) == b"", "nobody has any of them"
    assert len(os.listdir("/proc/self/fd")) == before - 2
    os.close(reading)


def test_a_file_that_is_no_fuses_belongs_to_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", "/proc/self/status", "/dev/null"):
        fd = os.open(path, os.O_RDONLY)
        assert foreign._fuse_of(fd) is None
        os.close(fd)
