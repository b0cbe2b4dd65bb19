"""The fork server: one process that imports once and is copied for every worker.

Orders come over a channel like a worker's: ``preload`` once, ``bear`` for each worker. A worker is born by two forks. The
process in the middle lives until the daemon has seen whose grandchild the worker is, and no longer: with its end the
worker becomes a child of the daemon (a subreaper), which then waits for it as for any other, and nothing that happens to
this process concerns it. The worker connects to the daemon by itself; that connection is its channel.

What is imported here is what every worker imports, so that a fork is all that is left to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
from importlib import import_module
from typing import Any

from remoted_client import wire

from . import context, runtime
from .mark import Mark
from .preload import Preload, Unfit

#: What a worker imports by and by until its first call has been answered.
_SOON_IMPORTED = ("ctypes", "encodings.ascii", *(f"remoted_client.codec.{name}" for name in ("diagnose", "dump", "installed", "load", "mainfile")))
#: What those with async bodies import; here as soon as nobody waits for a worker.
_IMPORTED_AT_LEISURE = "asyncio.unix_events"
_LEISURE_MS = 50
_MARK = "REMOTED_WORKER_ID"
_BUFFER_BYTES = 1 << 20
_KNOWN = b"k"


def main(channel: int, door: int) -> None:
    """Entry of ``worker.pyz``: the channel to the daemon, and the socket file at which workers present themselves."""
    own, middle = ForkServer(channel, door).serve()
    sys.argv[:] = [sys.argv[0], str(own)]
    runtime.main(own, before_greeting=lambda: _await_end(middle))


class ForkServer:
    """One user's, of one interpreter, environment and set of modules."""

    def __init__(self, channel: int, door: int) -> None:
        self._sock = socket.socket(fileno=channel)
        self._door = door
        for fd in (channel, door):
            os.set_inheritable(fd, False)
        self._preload = Preload()
        self._is_ready = False
        for name in _SOON_IMPORTED:
            import_module(name)

    def serve(self) -> tuple[int, int]:
        """Fork until the daemon is gone. Returns in a worker alone: its own channel, and a pidfd of the process in the middle."""
        while True:
            self._use_leisure()
            data, fds = wire.receive(self._sock, wire.MESSAGE_BYTES)
            if not data:
                os._exit(0)
            frame = wire.decode_message(data, fds)
            if frame.op == "preload":
                self._load(frame.header)
            elif frame.op == "bear":
                own = self._bear(frame)
                if own is not None:
                    return own
            frame.close()

    def _use_leisure(self) -> None:
        """The first worker must not wait for what it may not need, and the others shall find it."""
        if self._is_ready and _IMPORTED_AT_LEISURE not in sys.modules and not _is_readable(self._sock.fileno(), _LEISURE_MS):
            import_module(_IMPORTED_AT_LEISURE)

    def _load(self, header: dict[str, Any]) -> None:
        problem = ""
        try:
            self._mark = Mark(_MARK)
            self._preload.load(header["modules"], header["hints"])
        except (Unfit, LookupError) as error:
            problem = str(error)
        self._is_ready = not problem
        self._say({"op": "ready", "problem": problem})

    def _bear(self, frame: wire.Frame) -> tuple[int, int] | None:
        """None in this process, once the worker is known to the daemon or dead; in the worker as ``serve``."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()  # else what is buffered here would be printed by the worker
        try:
            middle = os.fork()
        except OSError as error:
            self._refuse(frame, f"cannot fork: {error}")
            return None
        if not middle:
            return self._in_the_middle(frame)
        # A thousand files to look at, while the worker gets ready: the daemon takes nobody in before it has heard this.
        if changed := self._preload.changed():
            self._refuse(frame, f"{changed} has changed since the fork server imported it", stale=True)
        else:
            self._say({"op": "fresh", "token": frame.header["token"]})
        _, status = os.waitpid(middle, 0)
        if status:
            self._refuse(frame, "the worker ended before it was one")
        return None

    def _in_the_middle(self, frame: wire.Frame) -> tuple[int, int]:
        """Returns in the worker. This process ends when the worker is known, or has ended."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            if os.fork():
                os.close(writing)
                os._exit(0 if os.read(reading, 1) == _KNOWN else 1)
            os.close(reading)
            return self._become_worker(frame, writing)
        except BaseException as error:
            with contextlib.suppress(BaseException):
                sys.excepthook(type(error), error, error.__traceback__)
            os._exit(1)

    def _become_worker(self, frame: wire.Frame, middle: int) -> tuple[int, int]:
        parent = os.pidfd_open(os.getppid())
        os.setsid()
        for target, fd in zip((1, 2), frame.fds, strict=True):
            os.dup2(fd, target)
        frame.close()
        self._sock.close()
        environ = json.loads(frame.body)
        self._mark.write(environ[_MARK])
        context.replace_environ(environ)
        reseed()
        own = self._introduce(frame.header["token"])
        os.write(middle, _KNOWN)
        os.close(middle)
        return own.detach(), parent

    def _introduce(self, token: str) -> socket.socket:
        """Connect, say which birth this is, and hear that the daemon believes it."""
        own = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        own.connect(f"/proc/self/fd/{self._door}")
        os.close(self._door)
        wire.send(own, wire.encode({"op": "born", "token": token}))
        if not own.recv(wire.MESSAGE_BYTES):
            os._exit(1)  # the daemon does not want it any more, or is gone
        return own

    def _refuse(self, frame: wire.Frame, problem: str, stale: bool = False) -> None:
        self._say({"op": "refused", "token": frame.header["token"], "problem": problem, "stale": stale})

    def _say(self, header: dict[str, Any]) -> None:
        wire.send(self._sock, wire.encode(header))


def _await_end(pidfd: int) -> None:
    """Until that process has ended; its children have another parent by then (exit_notify in the kernel)."""
    _is_readable(pidfd)
    os.close(pidfd)


def _is_readable(fd: int, timeout_ms: int | None = None) -> bool:
    """Is there something to read by then, or an end?"""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_ms))


def reseed() -> None:
    """Two workers of one server must not draw the same numbers. ``random`` sees to that itself, and torch on its devices."""
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()
    if generator := getattr(sys.modules.get("torch"), "default_generator", None):
        generator.seed()  # as torch.seed(), which also notes down where it was called from, for 3 ms
    if processes := sys.modules.get("multiprocessing.process"):
        processes.current_process().authkey = os.urandom(32)
