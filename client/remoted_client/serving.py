"""HTTP routes of this process: the daemon serves them for as long as the process lives, or until they are closed.

They are registered on a connection of their own, whose end takes them away. What the calls print comes back on it.
When the daemon goes away and comes back they are registered again.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import secrets
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from remoted_client import connection, wire
from remoted_client.daemon import await_word, connect, connect_or_start, socket_directory
from remoted_client.errors import DaemonUnreachable, RemotedError, for_code
from remoted_client.function import RemoteFunction
from remoted_client.greeting import hello
from remoted_client.http.route import Route, functions_in, route_of, routes_in
from remoted_client.lease import put
from remoted_client.submission import _describe, _modules_upload

_READ_BYTES = 256 * 1024
_ANSWER_SECONDS = 30.0
_RETRY_SECONDS = 60.0
#: Whoever stops a daemon mostly starts the next one.
_PATIENCE_SECONDS = 5.0
_CLOSE_SECONDS = 5.0
#: Below it lie the routes on ``api.sock``.
PREFIX = "/f"
#: Hears of each request: method, path, status, seconds, and id, error and traceback of its call.
OnServed = Callable[[dict[str, Any]], None]
OnOutput = Callable[[int, str], None]


def serve(*functions: RemoteFunction[Any, Any], on_served: OnServed | None = None) -> Served:
    """Give functions HTTP routes on the daemon's ``api.sock``; without arguments all load-balanced ones of the script.

    Returns at once. The routes are there until ``close()``, the end of the ``with`` block, or the end of this process.
    ``on_served`` hears of each request, in another thread.

    Raises:
        TypeError: a function or parameter that cannot have a route, by name.
        SubmissionRefused: the daemon does not take a route, e.g. because another process of yours has it.

    Example:
        >>> with serve(predict) as served:
        ...     served.wait()          # until Ctrl-C
        $ curl --unix-socket $XDG_RUNTIME_DIR/remoted/api.sock http://remoted/f/predict -d '{"x": 3}'
    """
    if functions:
        return Served([route_of(function) for function in functions], on_served)
    routes = routes_in(functions_in(vars(sys.modules["__main__"])), "to leave it out, name the functions to serve: serve(f, g)")
    if not routes:
        raise TypeError("cannot serve: the script has no load-balanced function with @remote at its top level")
    return Served(routes, on_served)


class Served:
    """Routes that are served; made by ``serve``."""

    def __init__(self, routes: list[Route], on_served: OnServed | None = None, on_output: OnOutput | None = None) -> None:
        self.routes = [str(route) for route in routes]
        #: What ended it although nobody closed it.
        self.failure: RemotedError | None = None
        #: This process's id as the daemon sees it.
        self.process = 0
        self._routes = routes
        self._on_served = on_served or (lambda news: None)
        self._on_output = on_output or _print
        self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in (1, 2)}
        self._closed = False
        self._over = threading.Event()
        self._reader = wire.FrameReader()
        self._frames: list[wire.Frame] = []
        self._sock = self._register(connect_or_start())
        self._thread = threading.Thread(target=self._run, name="remoted-served", daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=_forgetting(weakref.ref(self)))

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<served routes {', '.join(self.routes)} in {socket_directory()}>"

    def wait(self, timeout: float | None = None) -> None:
        """Until they are closed, or Ctrl-C, or for so many seconds. Raises what ended them otherwise."""
        with contextlib.suppress(KeyboardInterrupt):
            self._over.wait(timeout)
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """No request is taken any more; those that run go on. Idempotent."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def forget(self) -> None:
        """In a forked child: the parent's end must be the only one."""
        self._sock.close()

    # -- the connection ------------------------------------------------------------------------------------

    def _register(self, sock: socket.socket) -> socket.socket:
        """The connection, once the daemon has taken every route on it. Raises RemotedError."""
        try:
            sock.settimeout(_ANSWER_SECONDS)
            self._reader, self._frames = wire.FrameReader(), []
            with contextlib.suppress(BrokenPipeError):  # refused at the door: the reason can still be read
                sock.sendall(hello(""))
            await_word(sock)
            self._expect(sock, "welcome", "")
            sent: set[str] = set()
            for route in self._routes:
                self._send_route(sock, route, sent)
            sock.settimeout(None)
        except OSError as error:
            sock.close()
            raise DaemonUnreachable(f"the daemon went away while it took the routes: {error}") from error
        except BaseException:
            sock.close()
            raise
        return sock

    def _send_route(self, sock: socket.socket, route: Route, sent: set[str]) -> None:
        line = connection.current()
        described = _describe(line, route.handler, route.settings, route.is_stream)
        data, digest = line.surroundings.document(route.settings.declared)
        code, spec = described.uploads
        modules = _modules_upload(described.code)
        for upload in (spec, code, connection.Upload(digest, "context", data), *((modules,) if modules else ())):
            if upload.digest not in sent:
                sent.add(upload.digest)
                _send(sock, *put(upload))
        header = {"spec": spec.digest, "code": code.digest, "modules": modules.digest if modules else "", "context": digest}
        key = secrets.token_hex(16)
        options = {**route.options, "name": route.name[:200]}
        _send(sock, wire.encode({"op": "route", "key": key, "method": route.method, "path": route.path, "options": options, **header}, route.description))
        self._expect(sock, "routed", key)

    def _expect(self, sock: socket.socket, op: str, key: str) -> None:
        while True:
            for frame in self._receive(sock):
                if frame.op == "refused":
                    raise for_code(frame.header["code"], frame.header["message"])
                if frame.op == op and frame.header.get("key", "") == key:
                    self.process = frame.header.get("process", 0)
                    return
                self._handle(frame)

    def _receive(self, sock: socket.socket) -> list[wire.Frame]:
        """Raises OSError at the end of the connection."""
        data, fds = wire.receive(sock, _READ_BYTES)
        if not data:
            raise ConnectionResetError("it closed the connection")
        try:
            return self._reader.feed(data, fds)
        except wire.WireError as error:
            raise for_code("VERSION_MISMATCH", str(error)) from error

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._talk()
                if not self._closed:
                    self._return()
        except (RemotedError, OSError) as error:
            self.failure = error if isinstance(error, RemotedError) else DaemonUnreachable(f"the daemon did not come back: {error}")
            sys.stderr.write(f"remoted: the routes {', '.join(self.routes)} are not served any more: {self.failure}\n")
        finally:
            self._sock.close()
            self._over.set()

    def _talk(self) -> None:
        """Until the connection ends."""
        with contextlib.suppress(OSError):
            while True:
                for frame in self._receive(self._sock):
                    self._handle(frame)

    def _return(self) -> None:
        """The daemon is restarted by somebody, or after a while by us. Raises RemotedError when it does not come back."""
        since = time.monotonic()
        self._sock.close()
        while not self._closed:
            away = time.monotonic() - since
            try:
                self._sock = self._register(connect() if away < _PATIENCE_SECONDS else connect_or_start())
                return
            except (DaemonUnreachable, OSError):
                if away > _RETRY_SECONDS:
                    raise
                time.sleep(0.1)

    def _handle(self, frame: wire.Frame) -> None:
        frame.close()
        with contextlib.suppress(Exception):  # a closed or replaced stream of the caller's is not our failure
            if frame.op == "output":
                stream = frame.header["stream"]
                self._on_output(stream, self._decoders[stream].decode(frame.body))
            elif frame.op == "served":
                self._on_served(frame.header)


def _print(stream: int, text: str) -> None:
    target = sys.stdout if stream == 1 else sys.stderr
    target.write(text)
    target.flush()


def _send(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
    try:
        sent = wire.send(sock, data, fds)
        sock.sendall(memoryview(data)[sent:])
    finally:
        wire.close_all(fds)


def _forgetting(served: weakref.ref[Served]) -> Callable[[], None]:
    def forget() -> None:
        found = served()
        if found is not None:
            found.forget()

    return forget
