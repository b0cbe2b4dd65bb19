"""A client that speaks the wire by hand: what a hostile or broken one may send, byte by byte."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from remoted_client import CpuLiveLoadBalancer, CpuLiveServerless, wire
from remoted_client.codec import Encoder
from remoted_client.connection import Outgoing, Upload
from remoted_client.decorator import remote
from remoted_client.surroundings import Surroundings
from tests.harness import Host


class RawClient:
    """One connection to a host's data socket."""

    def __init__(self, host: Host, *, greet: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(str(host.sockets / "data.sock"))
        self._reader = wire.FrameReader()
        self._frames: list[wire.Frame] = []
        if greet:
            self.send({"op": "hello", "protocol": wire.PROTOCOL, "started": 0})
            assert self.next().op == "welcome"

    def send(self, header: dict[str, Any], body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        self.send_raw(wire.encode(header, body, len(fds)), fds)

    def send_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        sent = wire.send(self.sock, data, fds)
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def next(self) -> wire.Frame:
        """The next frame. Raises EOFError at the end of the connection."""
        while not self._frames:
            data, fds = wire.receive(self.sock, 1 << 18)
            if not data:
                raise EOFError
            for frame in self._reader.feed(data, fds):
                self._frames += _apart(frame)
        return self._frames.pop(0)

    def until(self, *ops: str) -> wire.Frame:
        """The next frame with one of these ops; others are dropped."""
        while True:
            frame = self.next()
            if frame.op in ops:
                return frame
            frame.close()

    def ended(self) -> bool:
        """Has the daemon closed its end? Waits for it; what it still says is dropped."""
        try:
            while True:
                self.next().close()
        except (EOFError, ConnectionError):
            return True
        except TimeoutError:
            return False

    def ping(self) -> None:
        """Everything sent before is handled once this returns: frames are handled in order."""
        self.send({"op": "ping?", "key": "ping"})
        while self.until("refused").header.get("key") != "ping":
            pass

    def upload(self, upload: Upload) -> None:
        header = {"op": "put", "digest": upload.digest, "role": upload.role}
        if isinstance(upload.data, bytes) and len(upload.data) <= wire.INLINE_BYTES:
            self.send(header, upload.data)
            return
        fd = wire.memfd("test", upload.data) if isinstance(upload.data, bytes) else os.dup(upload.data.fd)
        self.send(header, fds=(fd,))
        os.close(fd)

    def submit(self, call: Outgoing, **changed: Any) -> str:
        """Send a call with its content. Returns its key."""
        for upload in call.uploads:
            self.upload(upload)
        key = str(changed.pop("key", secrets.token_hex(16)))
        self.send({**call.common, **changed, "calls": [key], "sizes": [len(call.body)]}, call.body)
        return key

    def close(self) -> None:
        self.sock.close()
        self._reader.close()
        for frame in self._frames:
            frame.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _apart(frame: wire.Frame) -> list[wire.Frame]:
    """Of a frame about many calls one about each."""
    if frame.op == "accepted":
        return [wire.Frame({"op": "accepted", "key": key, "id": call_id}, body) for (key, call_id), body in wire.calls_of(frame)]
    if frame.op == "done":
        return [wire.Frame({**wire.DONE, **word}, body, frame.fds) for word, body in wire.calls_of(frame)]
    return [frame]


class _Recorder:
    """Takes the place of a connection: keeps the call instead of sending it."""

    def __init__(self) -> None:
        self.encoder = Encoder()
        self.surroundings = Surroundings()
        self.outgoing: Outgoing | None = None

    def start(self, state: Any) -> None:
        self.outgoing = state.outgoing


def prepare(function: Callable[..., Any], *args: Any, direct: bool = False, detach: bool = True, max_retries: int = 0) -> Outgoing:
    """The call as a client would send it."""
    from remoted_client.submission import submit

    config = CpuLiveLoadBalancer(name="raw") if direct else CpuLiveServerless(name="raw")
    made: Any = remote(config, max_retries=max_retries)(function)
    recorder: Any = _Recorder()
    submit(recorder, function, made._settings, {"detach": detach}, args, {}, stream=False)
    assert recorder.outgoing is not None
    found: Outgoing = recorder.outgoing
    return found


def daemon_process(host: Host) -> psutil.Process:
    assert host.process is not None
    return psutil.Process(host.process.pid)


def descriptors(host: Host) -> int:
    return int(daemon_process(host).num_fds())


def resident_bytes(host: Host) -> int:
    return int(daemon_process(host).memory_info().rss)


@contextlib.contextmanager
def raw(host: Host, *, greet: bool = True) -> Iterator[RawClient]:
    client = RawClient(host, greet=greet)
    try:
        yield client
    finally:
        client.close()
