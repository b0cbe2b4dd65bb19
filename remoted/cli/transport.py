"""One HTTP request over the daemon's Unix socket, and no more than that.

Imported on the way to ``remotectl status``, so it imports next to nothing: http.client would bring ssl and email
(38 ms here). Before the first byte is sent, the server must be root's or ours by SO_PEERCRED (T08).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator
from typing import IO, Any

from remoted.cli.ending import CliError, NoDaemon, Refusal

_TIMEOUT_SECONDS = 30.0
#: Then who waits is told so, terminal or not: as the client does it.
_SILENCE_SECONDS = 3.0
#: Where the system's daemon listens.
SYSTEM_DIRECTORY = "/run/remoted"
#: Where it is enabled.
SYSTEM_UNIT = "/etc/systemd/system/sockets.target.wants/remoted.socket"


class CutOff(CliError):
    """The daemon went away in the middle of an answer."""

    exit_code = 3


class Silent(CutOff):
    """It has taken the connection and says nothing."""


class Unanswered(NoDaemon):
    """Nobody listens: there is no daemon, or not yet."""


def socket_directory() -> str:
    """As ``remoted_client.daemon.socket_directory``, which imports too much for this path; a test compares the two."""
    if named := os.environ.get("REMOTED_SOCKET"):
        return named
    if os.path.exists(os.path.join(SYSTEM_DIRECTORY, "api.sock")) or os.path.isfile(SYSTEM_UNIT):
        return SYSTEM_DIRECTORY
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(runtime, "remoted")
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"remoted-{os.geteuid()}")


@contextlib.contextmanager
def _cut_off() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise Silent(f"the daemon did not answer: {error}{_where_to_look()}") from error
    except OSError as error:
        raise CutOff(f"the daemon did not answer: {error}{_where_to_look()}") from error


def _where_to_look() -> str:
    """systemd holds the socket: it takes connections whether or not the daemon behind it can start."""
    return "; `systemctl status remoted` and `journalctl -u remoted` say why" if socket_directory() == SYSTEM_DIRECTORY else ""


class Answer:
    """The head of a response; the body is read once, whole or in pieces."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file: IO[bytes] = sock.makefile("rb")
        self.status = int(self._line().split(" ", 2)[1])
        self.headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()

    def _line(self) -> str:
        with _cut_off():
            line = self._file.readline(65536)
        if not line.endswith(b"\n"):
            raise CutOff("the daemon ended before it had answered: try again")
        return line.decode("latin-1").rstrip("\r\n")

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes. Raises CutOff when it is not whole. A chunk is given out as soon as it is here."""
        try:
            if self.headers.get("transfer-encoding", "") == "chunked":
                while size := int(self._line(), 16):
                    yield self._exactly(size)
                    self._line()
                self._line()
            else:
                yield self._exactly(int(self.headers.get("content-length", "0")))
        finally:
            self.close()

    def _exactly(self, size: int) -> bytes:
        with _cut_off():
            data = self._file.read(size)
        if len(data) < size:
            raise CutOff("the daemon ended in the middle of its answer: ask again when it is back")
        return data

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def close(self) -> None:
        self._file.close()
        self._sock.close()


def request(method: str, path: str, body: Any = None, timeout: float | None = _TIMEOUT_SECONDS, takes: float = 0.0) -> Answer:
    """A successful answer, its body unread. ``takes``: seconds for which there may well be none. Raises NoDaemon, Refusal."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: remoted\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    sock = connect()
    try:
        sock.settimeout(timeout)
        with _cut_off(), contextlib.suppress(BrokenPipeError):  # turned away unread: the reason is there to be read
            sock.sendall(head.encode() + data)
        _say_that_it_waits(sock, takes + _SILENCE_SECONDS)
        answer = Answer(sock)
    except BaseException:
        sock.close()
        raise
    if answer.status != 200:
        raise _refusal(answer)
    return answer


def _say_that_it_waits(sock: socket.socket, seconds: float) -> None:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    if not poller.poll(seconds * 1000):
        print(f"remotectl: the daemon has not answered yet, waiting ...{_where_to_look()}", file=sys.stderr, flush=True)


def _refusal(answer: Answer) -> Refusal:
    try:
        error = json.loads(answer.read())["error"]
        return Refusal(answer.status, str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return Refusal(answer.status, "UNKNOWN", f"the daemon refused with HTTP status {answer.status}")


def get(path: str, timeout: float | None = _TIMEOUT_SECONDS, takes: float = 0.0) -> Any:
    return json.loads(request("GET", path, timeout=timeout, takes=takes).read())


def post(path: str, body: Any = None) -> Any:
    return json.loads(request("POST", path, body if body is not None else {}).read())


def connect() -> socket.socket:
    """A connection to a daemon that is root's or ours. Raises NoDaemon."""
    folder = socket_directory()
    path = os.path.join(folder, "api.sock")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
        check_server(sock)
    except NoDaemon:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        from remoted_client.daemon import unreachable

        is_away = isinstance(error, (FileNotFoundError, ConnectionRefusedError, NotADirectoryError))
        raise (Unanswered if is_away else NoDaemon)(unreachable(path, error, "it starts with your first call, or run `remoted --user`")) from None
    return sock


def check_server(sock: Any) -> None:
    """Raises NoDaemon unless it is root's or ours who listens at the other end (T08)."""
    _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    folder = socket_directory()
    if uid not in ((0,) if folder == SYSTEM_DIRECTORY else (0, os.geteuid())):
        path = os.path.join(folder, "api.sock")
        raise NoDaemon(f"cannot trust the daemon at {path}: it runs as uid {uid}; check REMOTED_SOCKET")
