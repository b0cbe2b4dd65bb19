"""The data socket against hostile and broken clients: threats T12 to T21, T44 and T61 of reference/security.md."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import socket
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from remoted.data.transport import Transport
from remoted.limits import Limits
from remoted_client import wire
from remoted_client.connection import Outgoing, Upload
from tests.faults.rawclient import RawClient, descriptors, prepare, raw, resident_bytes
from tests.harness import Host, host, wait_until

FLAT_BYTES = 24 << 20


def work(x: int) -> int:
    return x + 1


def note(path: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("ran\n")


@pytest.fixture(scope="module")
def impatient() -> Iterator[Host]:
    """A daemon whose patience with slow senders is short, so that the tests are."""
    with host("[limits]\nhello_deadline_seconds = 0.5\nframe_deadline_seconds = 0.5\n") as made:
        yield made.start()


@pytest.fixture
def late() -> Iterator[Host]:
    """A daemon that keeps little for who does not read."""
    with host("[limits]\noutbox_bytes = 262144\n") as made:
        yield made.start()


def assert_works(host: Host) -> None:
    """The daemon still serves a new client from beginning to end."""
    with raw(host) as client:
        client.submit(prepare(work, 1))
        assert client.until("done", "refused").header.get("status") == "COMPLETED"


# -- T12, T15, T17: bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "BAD_MAGIC"),
        (os.urandom(4096).replace(b"RM", b"XX"), "BAD_MAGIC"),
        (struct.pack("!2sBBII", b"RM", 99, 0, 2, 0) + b"{}", "BAD_VERSION"),
        (struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, 0xFFFFFFFF, 0), "TOO_LARGE"),
        (struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, 2, 0xFFFFFFFF) + b"{}", "TOO_LARGE"),
        (struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 200, 2, 0) + b"{}", "BAD_FDS"),
        (struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 1, 2, 0) + b"{}", "BAD_FDS"),
        (struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, 4, 0) + b"nope", "BAD_HEADER"),
        (struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, 2, 0) + b"[]", "BAD_HEADER"),
        (struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, 9, 0) + b'{"a":NaN}', "BAD_HEADER"),
        (struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, 60000, 0) + b"[" * 60000, "BAD_HEADER"),
        (struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, 10006, 0) + b'{"a":' + b"9" * 10000 + b"}", "BAD_HEADER"),
    ],
    ids=["http", "noise", "version", "header-4g", "body-4g", "200-fds", "missing-fd", "no-json", "no-object", "nan", "deep", "huge-int"],
)
@pytest.mark.parametrize("greet", [False, True], ids=["first", "later"])
def test_t15_broken_bytes_are_refused_with_a_stable_code(shared_daemon: Host, data: bytes, code: str, greet: bool) -> None:
    before = descriptors(shared_daemon)
    with raw(shared_daemon, greet=greet) as client:
        client.send_raw(data)
        frame = client.until("refused")
        assert frame.header["code"] == code
        assert client.ended()
    wait_until(lambda: descriptors(shared_daemon) <= before, 5, lambda: f"{descriptors(shared_daemon)} > {before}")


def test_t15_a_flood_of_broken_clients_leaves_memory_flat(shared_daemon: Host) -> None:
    assert_works(shared_daemon)
    before = resident_bytes(shared_daemon)
    for number in range(300):
        with raw(shared_daemon, greet=bool(number % 2)) as client, contextlib.suppress(OSError):
            client.send_raw(struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, 60000, 60000) + os.urandom(120_000))
            assert client.ended()
    assert resident_bytes(shared_daemon) - before < FLAT_BYTES
    assert_works(shared_daemon)


@pytest.mark.parametrize("data", [b"", b"R", b"RM\x01\x00\x00\x00"], ids=["silent", "one-byte", "half-a-prefix"])
def test_t12_a_client_that_does_not_introduce_itself_is_dropped(impatient: Host, data: bytes) -> None:
    with raw(impatient, greet=False) as client:
        if data:
            client.send_raw(data)
        assert client.until("refused").header["code"] == "TOO_SLOW"
        assert client.ended()
    assert_works(impatient)


def test_t12_half_a_header_is_not_waited_for(impatient: Host) -> None:
    frame = wire.encode({"op": "watch", "id": "0" * 32})
    with raw(impatient) as client:
        client.send_raw(frame[:20])
        assert client.until("refused").header["code"] == "TOO_SLOW"
        assert client.ended()


def test_t12_a_trickling_sender_has_a_deadline_from_the_first_byte_to_the_last(impatient: Host) -> None:
    """Each byte must not buy another half second."""
    frame = wire.encode({"op": "watch", "id": "0" * 1000})
    with raw(impatient) as client:
        client.sock.settimeout(0.1)
        refused = False
        for byte in frame[:100]:
            try:
                client.send_raw(bytes([byte]))
                refused = client.next().op == "refused"
            except TimeoutError:
                continue
            except (OSError, EOFError):
                break
            if refused:
                break
        else:
            raise AssertionError("ten seconds of trickling were accepted")
    assert_works(impatient)


ONE = {"calls": ["12345678"], "sizes": [0]}
BAD_LISTS: list[dict[str, object]] = [
    {"calls": "12345678", "sizes": [0]},
    {"calls": ["12345678"], "sizes": {"0": 0}},
    {"calls": ["12345678"], "sizes": []},
    {"calls": ["12345678"], "sizes": [1]},
    {"calls": ["12345678"] * 2, "sizes": [1, -1]},
    {"calls": ["12345678"], "sizes": [True]},
    {"calls": ["12345678"], "sizes": [0.0]},
    {"calls": [["12345678"]], "sizes": [0]},
    {"calls": ["x" * 100], "sizes": [0]},
    {"calls": ["12345678"] * (wire.FRAME_CALLS + 1), "sizes": [0] * (wire.FRAME_CALLS + 1)},
    {"calls": ["12345678"] * 2, "sizes": [0, 0], "arguments": "0" * 64},
]


def test_t17_an_unknown_op_and_bad_fields_are_refused_and_the_connection_goes_on(shared_daemon: Host) -> None:
    with raw(shared_daemon) as client:
        for header, code in [
            ({"op": "become_root", "key": "k"}, "UNKNOWN_OP"),
            ({"key": "k"}, "UNKNOWN_OP"),
            ({"op": ["list"], "key": "k"}, "UNKNOWN_OP"),
            ({"op": "submit", "key": "k"}, "BAD_REQUEST"),
            ({"op": "submit", "key": 5}, "BAD_REQUEST"),
            ({"op": "submit", **ONE, "spec": "x", "code": "", "modules": "", "context": "", "options": 7}, "BAD_OPTIONS"),
            *(({"op": "submit", **ONE, "spec": "x", "code": "", "modules": "", "context": "", name: value}, "BAD_REQUEST") for name in ("spec", "parent", "arguments") for value in ({}, 1, True, None)),
            ({"op": "submit", **ONE, "spec": "x", "code": "", "modules": "", "context": "", "instance": 7}, "BAD_REQUEST"),
            ({"op": "submit", **ONE, "spec": "../../etc", "code": "", "modules": "", "context": ""}, "MISSING_CONTENT"),
            *(({"op": op, **lists, "spec": "x", "code": "", "modules": "", "context": ""}, "BAD_REQUEST") for op in ("submit", "call") for lists in BAD_LISTS),
            ({"op": "watch"}, "BAD_REQUEST"),
            ({"op": "watch", "id": "../../etc/passwd"}, "NOT_FOUND"),
            ({"op": "watch", "id": "0" * 32, "offset": -5}, "NOT_FOUND"),
            ({"op": "cancel", "id": "0" * 32}, "NOT_FOUND"),
            ({"op": "cancel", "id": None}, "NOT_FOUND"),
            ({"op": "waiting", "id": "0" * 32}, "BAD_REQUEST"),
            ({"op": "settle", "instance": "0" * 32}, "BAD_REQUEST"),
            ({"op": "settle", "instance": "0" * 65, "lease": "0" * 32}, "BAD_REQUEST"),
            ({"op": "settle", "instance": ["0" * 32], "lease": "0" * 32}, "BAD_REQUEST"),
            ({"op": "put", "role": "spec"}, "BAD_REQUEST"),
            ({"op": "put", "role": "x\x1b[31m", "digest": "0" * 64}, "BAD_CONTENT"),
            ({"op": "put", "role": "spec", "digest": "../../../etc/passwd"}, "BAD_DIGEST"),
        ]:
            client.send(header)  # type: ignore[arg-type]
            frame = client.until("refused")
            assert frame.header["code"] == code, (header, frame.header)
            client.ping()  # there may be one refusal for each call
        client.submit(prepare(work, 1))
        assert client.until("done").header["status"] == "COMPLETED"


def test_t17_headers_at_the_edge_of_recursion_and_numbers_beyond_all_others_are_refused_and_the_connection_goes_on(shared_daemon: Host) -> None:
    """What could just be read must not be too deep for what looks at it."""
    tracebacks = shared_daemon.log().count("Traceback")
    values = ["1e999", "-1e999", "1" + "0" * 4000, *("[" * depth + "]" * depth for depth in range(900, 1000, 2)), *("[" * depth + "]" * depth for depth in range(961, 1000, 2))]
    client = RawClient(shared_daemon)
    for value in values:
        for head in (f'{{"op":{value}}}', f'{{"op":"watch","id":"{"0" * 32}","offset":{value}}}', f'{{"op":"cancel","id":{value}}}'):
            client.send_raw(struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 0, len(head), 0) + head.encode())
            if client.until("refused").header["code"] == "BAD_HEADER":
                client.close()
                client = RawClient(shared_daemon)
    client.ping()
    client.close()
    assert shared_daemon.log().count("Traceback") == tracebacks


def test_t18_a_client_greets_once(shared_daemon: Host) -> None:
    """The daemon knows each by its name, and would never forget the other names."""
    with raw(shared_daemon) as client:
        client.send({"op": "hello", "protocol": wire.PROTOCOL, "started": 0, "client": "another"})
        assert client.until("refused").header["code"] == "BAD_REQUEST"
        client.ping()


def test_t12_nothing_but_hello_is_understood_before_hello(shared_daemon: Host) -> None:
    with raw(shared_daemon, greet=False) as client:
        client.send({"op": "watch", "id": "0" * 32})
        assert client.until("refused").header["code"] == "UNKNOWN_OP"
    with raw(shared_daemon, greet=False) as client:
        client.send({"op": "hello", "protocol": 99})
        assert client.until("refused").header["code"] == "VERSION_MISMATCH"
        assert client.ended()


def test_t12_clients_that_vanish_before_hello_leave_nothing(shared_daemon: Host) -> None:
    assert_works(shared_daemon)
    before = descriptors(shared_daemon)
    for _ in range(200):
        RawClient(shared_daemon, greet=False).close()
    assert_works(shared_daemon)
    wait_until(lambda: descriptors(shared_daemon) <= before, 5, lambda: f"{descriptors(shared_daemon)} > {before}")


def test_t18_frames_beyond_a_users_rate_wait_and_none_is_lost(bare_host: Host) -> None:
    bare_host.config.write_text("[limits]\nframes_per_second_per_uid = 500\n", encoding="utf-8")
    client = RawClient(bare_host.start())
    for _ in range(1000):
        client.send({"op": "ping"})
    for _ in range(1000):
        client.until("pong")
    client.close()


async def test_t18_the_frames_of_one_client_are_paced_and_others_have_turns_between_them() -> None:
    mine, theirs = socket.socketpair()
    handled: list[int] = []
    paced: list[tuple[int, int]] = []
    turns: list[int] = []

    async def handle(frame: wire.Frame) -> None:
        handled.append(frame.header["n"])
        if len(handled) == 1:
            asyncio.get_running_loop().call_soon(lambda: turns.append(len(handled)))

    def pace(count: int) -> float:
        paced.append((count, len(handled)))
        return 0.0

    transport = Transport(theirs, Limits(), handle, lambda frame, error: None, lambda: None, lambda: None, pace=pace)
    mine.sendall(b"".join(wire.encode({"op": "ping", "n": number}) for number in range(100)))
    while len(handled) < 100:
        await asyncio.sleep(0)
    transport.close()
    mine.close()

    assert handled == list(range(100))
    assert paced == [(32, 32), (32, 64), (32, 96)]
    assert turns == [32]


def test_t13_400_connections_of_one_user_are_capped_and_it_works_again_afterwards(bare_host: Host) -> None:
    bare_host.config.write_text("[limits]\nconnections_per_uid = 64\n", encoding="utf-8")
    daemon = bare_host.start()
    before = descriptors(daemon)
    clients = [RawClient(daemon, greet=False) for _ in range(400)]
    refused = 0
    for client in clients[64:]:
        frame = client.next()
        assert frame.header["code"] == "OVER_LIMIT"
        assert "connections_per_uid" in frame.header["message"]
        refused += 1
    assert refused == 336
    assert descriptors(daemon) < before + 64 * 2 + 8
    result = daemon.run(
        """
        from remoted_client import CpuLiveServerless, QuotaExceeded, remote
        @remote(CpuLiveServerless(name="x"))
        def f(): return 1
        try: f().result()
        except QuotaExceeded as error: print(error)
        """
    )
    assert "connections_per_uid is 64" in result.out
    for client in clients:
        client.close()
    wait_until(lambda: descriptors(daemon) <= before, 5)
    assert_works(daemon)


def test_t14_a_connect_storm_ends_with_a_daemon_that_works(shared_daemon: Host) -> None:
    sockets = []
    for _ in range(1000):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(str(shared_daemon.sockets / "data.sock"))
        sockets.append(sock)
        if len(sockets) == 100:
            for opened in sockets:
                opened.close()
            sockets.clear()
    assert_works(shared_daemon)


# -- T20, T21: descriptors -----------------------------------------------------------------------------------


def test_t20_descriptors_that_no_frame_asked_for_are_closed(shared_daemon: Host) -> None:
    assert_works(shared_daemon)
    before = descriptors(shared_daemon)
    fd = os.open("/dev/null", os.O_RDONLY)
    frame = wire.encode({"op": "nothing"})
    for number in range(100):
        with raw(shared_daemon, greet=bool(number % 2)) as client, contextlib.suppress(OSError):
            client.send_raw(frame, (fd,) * 253)
            assert client.until("refused").header["code"] in ("BAD_FDS", "UNKNOWN_OP")
    os.close(fd)
    assert_works(shared_daemon)
    wait_until(lambda: descriptors(shared_daemon) <= before, 5, lambda: f"{descriptors(shared_daemon)} > {before}")


@pytest.mark.parametrize("greet", [False, True], ids=["before-hello", "after-hello"])
@pytest.mark.parametrize(
    "header",
    [
        {"op": "nothing"},
        {"op": "watch", "id": "0" * 32},
        {"op": "hello", "protocol": wire.PROTOCOL},
        {"op": "submit", "key": "12345678"},
        {"op": "put"},
        {"op": "put", "digest": "0" * 64, "role": "nonsense"},
        {"op": "put", "digest": "0" * 64, "role": "code"},
    ],
    ids=["unknown", "watch", "hello", "submit", "put-nothing", "put-role", "put-lie"],
)
def test_t20_descriptors_of_frames_that_are_refused_are_closed(shared_daemon: Host, header: dict[str, object], greet: bool) -> None:
    assert_works(shared_daemon)
    before = descriptors(shared_daemon)
    fd = wire.memfd("test", b"content")
    with raw(shared_daemon, greet=greet) as client:
        for _ in range(20):
            client.send(header, fds=(fd,) * (1 if header["op"] == "put" else 4))
        client.ping()
        during = descriptors(shared_daemon)
    os.close(fd)
    assert during <= before + 4
    wait_until(lambda: descriptors(shared_daemon) <= before, 5, lambda: f"{descriptors(shared_daemon)} > {before}")


def test_t20_descriptors_behind_a_frame_that_lasts_stay_with_their_sender(shared_daemon: Host) -> None:
    """A memfd of nothing but a hole takes long to read; what comes behind it is not taken meanwhile."""
    before, most = descriptors(shared_daemon), 0
    large, small = os.memfd_create("large"), os.memfd_create("small")
    os.ftruncate(large, 256 << 20)
    with raw(shared_daemon) as client:
        client.send({"op": "put", "digest": "0" * 64, "role": "arguments"}, fds=(large,))
        for _ in range(200):
            client.send({"op": "put", "digest": "0" * 64, "role": "nothing"}, fds=(small,) * 4)
        client.sock.setblocking(False)
        refused = False
        while not refused:
            most = max(most, descriptors(shared_daemon))
            with contextlib.suppress(BlockingIOError):
                refused = client.until("refused").header["code"] == "BAD_DIGEST"
        assert most - before < 40
    os.close(large)
    os.close(small)
    assert_works(shared_daemon)


def test_t20_a_good_frame_with_descriptors_before_garbage_leaks_none(shared_daemon: Host) -> None:
    assert_works(shared_daemon)
    before = descriptors(shared_daemon)
    fd = os.memfd_create("nothing")
    for _ in range(20):
        with raw(shared_daemon) as client:
            client.send_raw(wire.encode({"op": "put"}, fd_count=4) + b"garbage" * 10, (fd,) * 4)
            assert client.until("refused").header["code"] == "BAD_MAGIC"
    os.close(fd)
    wait_until(lambda: descriptors(shared_daemon) <= before, 5, lambda: f"{descriptors(shared_daemon)} > {before}")


def test_t21_a_memfd_truncated_after_sending_harms_nobody(shared_daemon: Host) -> None:
    data = os.urandom(8 << 20)
    digest = hashlib.sha256(data).hexdigest()
    for _ in range(10):
        with raw(shared_daemon) as client:
            fd = wire.memfd("test", data)
            client.send({"op": "put", "digest": digest, "role": "code"}, fds=(fd,))
            os.ftruncate(fd, 100)
            client.send({"op": "ping?", "key": "ping"})
            frame = client.until("refused")
            assert frame.header["code"] in ("BAD_DIGEST", "UNKNOWN_OP")
            os.close(fd)
    assert_works(shared_daemon)


@pytest.mark.parametrize("how", ["disk", "device", "pipe", "socket", "directory", "grown"])
def test_t21_only_a_plain_file_is_content(shared_daemon: Host, how: str) -> None:
    """/dev/zero has no end, a pipe no size, and a file that grows while it is read would fill the disk."""
    extra: list[int] = []
    if how == "device":
        fd = os.open("/dev/zero", os.O_RDONLY)
    elif how == "pipe":
        fd, other = os.pipe()
        extra.append(other)
    elif how == "socket":
        left, right = socket.socketpair()
        fd = left.detach()
        extra.append(right.detach())
    elif how == "disk":
        fd = os.open("/proc/self/stat", os.O_RDONLY)
    elif how == "directory":
        fd = os.open("/", os.O_RDONLY)
    else:
        fd = os.memfd_create("sparse")
        os.ftruncate(fd, 1 << 50)
    with raw(shared_daemon) as client:
        client.send({"op": "put", "digest": "0" * 64, "role": "code"}, fds=(fd,))
        client.sock.settimeout(5)
        frame = client.until("refused")
        if how == "grown":
            assert frame.header["code"] in ("OVER_LIMIT", "DISK_FULL"), frame.header
            assert frame.header["digest"] == "0" * 64
        else:
            assert frame.header["code"] == "BAD_FDS", frame.header
    for number in (fd, *extra):
        os.close(number)
    assert_works(shared_daemon)


@pytest.mark.parametrize("how", ["unknown", "greeting", "left"])
def test_t20_descriptors_of_frames_that_nobody_can_answer_are_closed(shared_daemon: Host, how: str) -> None:
    """The refusal would be larger than a frame may be; or its sender goes in the moment in which a frame is begun."""
    assert_works(shared_daemon)
    before = descriptors(shared_daemon)
    fds = tuple(wire.memfd("test") for _ in range(4))
    for _ in range(20):
        client = RawClient(shared_daemon, greet=how == "left")
        if how == "unknown":
            client.send({"op": "zz", "key": "x" * 65_500}, fds=fds)
        elif how == "greeting":
            client.send({"op": "hello", "protocol": "x" * 65_500}, fds=fds)
        else:
            client.send_raw(wire.encode({"op": "ping"}) + wire.encode({"op": "put", "digest": "0" * 64, "role": "code"}, b"", 4), fds)
        client.close()
    wait_until(lambda: descriptors(shared_daemon) <= before, 5, lambda: f"{descriptors(shared_daemon)} > {before}")
    wire.close_all(fds)
    assert_works(shared_daemon)
    assert "Traceback" not in shared_daemon.log()
    assert "never awaited" not in shared_daemon.log()


@pytest.mark.parametrize(("role", "digest", "size"), [("arguments", "zz", 10), ("context", "zz", 10), ("context", "0" * 64, 10), ("context", "0" * 64, (1 << 20) + 1), ("nothing", "0" * 64, 10)])
def test_t20_descriptors_of_content_that_is_refused_are_closed(shared_daemon: Host, role: str, digest: str, size: int) -> None:
    assert_works(shared_daemon)
    before = descriptors(shared_daemon)
    with raw(shared_daemon) as client:
        fd = wire.memfd("test", bytes(size))
        for _ in range(20):
            client.send({"op": "put", "digest": digest, "role": role}, fds=(fd,))
            assert client.until("refused").header["about"] == "put"
        os.close(fd)
    wait_until(lambda: descriptors(shared_daemon) <= before, 5, lambda: f"{descriptors(shared_daemon)} > {before}")


async def test_t20_what_lies_behind_the_last_frame_of_a_connection_is_closed_once_and_not_handled() -> None:
    """A descriptor's number is somebody else's as soon as it is closed."""
    mine, theirs = socket.socketpair()
    handled: list[str] = []
    others: list[int] = []

    async def turn_away() -> None:
        transport.refuse_and_close("VERSION_MISMATCH", "no")

    def handle(frame: wire.Frame) -> Any:
        handled.append(frame.op)
        return turn_away()

    def on_closed() -> None:
        others.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(4))

    fds = tuple(wire.memfd("test") for _ in range(2))
    wire.send(mine, wire.encode({"op": "hello"}))
    wire.send(mine, wire.encode({"op": "put"}, b"", 2), fds)
    transport = Transport(theirs, Limits(), handle, lambda frame, error: None, lambda: None, on_closed)
    while not others:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)

    assert handled == ["hello"]
    for fd in (*others, *fds):
        os.close(fd)  # each is still ours
    mine.close()


@pytest.mark.parametrize("size", [10, 200_000], ids=["inline", "file"])
def test_content_whose_digest_lies_is_refused(shared_daemon: Host, size: int) -> None:
    data, claimed = os.urandom(size), hashlib.sha256(b"something else").hexdigest()
    with raw(shared_daemon) as client:
        if size <= wire.INLINE_BYTES:
            client.send({"op": "put", "digest": claimed, "role": "code"}, data)
        else:
            fd = wire.memfd("test", data)
            client.send({"op": "put", "digest": claimed, "role": "code"}, fds=(fd,))
            os.close(fd)
        frame = client.until("refused")
        assert (frame.header["code"], frame.header["digest"]) == ("BAD_DIGEST", claimed)
        key = client.submit(prepare(work, 1), code=claimed)
        frame = client.until("refused", "accepted")
        assert (frame.op, frame.header.get("key"), frame.header.get("code")) == ("refused", key, "MISSING_CONTENT")


def test_t40_surroundings_go_with_who_brought_them_whoever_has_called_with_them(daemon: Host) -> None:
    """A caller's surroundings go with who brought them, whoever has called with them meanwhile (docs/decisions/0104)."""
    call = prepare(work, 1)
    with raw(daemon) as other:
        with raw(daemon) as owner:
            for upload in call.uploads:
                owner.upload(upload)
            owner.ping()
            for body in (call, call):
                other.send({**body.common, "calls": [secrets.token_hex(16)], "sizes": [len(body.body)]}, body.body)
                assert other.until("done", "refused").header["status"] == "COMPLETED"
        wait_until(lambda: not [path for path in daemon.state.glob("remoted/secrets/**/*") if path.is_file()], 10, daemon.log)
        other.send({**call.common, "calls": [secrets.token_hex(16)], "sizes": [len(call.body)]}, call.body)
        refused = other.until("done", "refused").header
        assert (refused["op"], refused.get("code")) == ("refused", "MISSING_CONTENT")
        other.submit(call)
        assert other.until("done", "refused").header["status"] == "COMPLETED"


# -- T18: slow and greedy clients ----------------------------------------------------------------------------


def many_words(path: str) -> bytes:
    note(path)
    return bytes(60_000)


def print_and_wait(path: str) -> None:
    print("said once")
    while not os.path.exists(path):
        time.sleep(0.01)


def test_f22_what_a_job_printed_is_told_once_however_late_its_outcome(late: Host) -> None:
    """An outcome that finds no room is told later, alone: its output was told when there was room for it."""
    gate, marks = late.project / "gate", late.project / "marks"
    with raw(late) as client, raw(late) as other:
        client.submit(prepare(print_and_wait, str(gate), detach=False))
        frames = [client.until("output")]
        job = frames[0].header["id"]
        results = [client.submit(prepare(many_words, str(marks), detach=False)) for _ in range(20)]
        wait_until(lambda: marks.exists() and marks.read_text().count("ran") == len(results), 20, late.log)
        other.send({"op": "watch", "id": job, "output": False})
        gate.touch()
        assert other.until("done").header["id"] == job
        ended: set[str] = set()
        while len(ended) < len(results) + 1:
            frames.append(client.until("output", "done"))
            if frames[-1].op == "done":
                assert frames[-1].header["status"] == "COMPLETED"
                ended.add(frames[-1].header["id"])
    assert job in ended
    assert [frame.body for frame in frames if frame.op == "output"] == [b"said once\n"]


def test_t18_a_client_that_never_reads_makes_the_daemon_stop_reading_it(shared_daemon: Host) -> None:
    """Each frame has an answer; who takes no answers may send no more, and the memory stays flat."""
    assert_works(shared_daemon)
    before = resident_bytes(shared_daemon)
    with raw(shared_daemon) as client:
        client.sock.settimeout(2)
        frame = wire.encode({"op": "x" * 40, "key": "k" * 60_000}) * 4
        with contextlib.suppress(TimeoutError, OSError):
            for _ in range(2000):
                client.sock.sendall(frame)
        assert resident_bytes(shared_daemon) - before < 3 * FLAT_BYTES
        assert_works(shared_daemon)


def test_t18_every_call_of_a_frame_counts_against_its_users_limit(bare_host: Host) -> None:
    """Those beyond it are refused, each by its key, and the others run."""
    bare_host.config.write_text("[limits]\nqueued_jobs_per_uid = 5\n", encoding="utf-8")
    daemon = bare_host.start()
    call = prepare(work, 1)
    with raw(daemon) as client:
        for upload in call.uploads:
            client.upload(upload)
        keys = [f"{number:032}" for number in range(20)]
        frame = wire.CallsFrame(call.common)
        assert all(frame.add(key, call.body) for key in keys)
        client.send_raw(b"".join(frame.frames()))
        told = [client.until("accepted", "refused") for _ in keys]
        assert {found.header["key"] for found in told} == set(keys)
        assert [found.header["code"] for found in told if found.op == "refused"] == ["OVER_LIMIT"] * 15


def last(data: bytes) -> None:
    time.sleep(600)


@pytest.mark.parametrize("direct", [False, True], ids=["job", "direct"])
def test_t18_arguments_that_lie_in_memory_have_a_limit_which_is_named(bare_host: Host, direct: bool) -> None:
    bare_host.config.write_text("[limits]\narguments_bytes_per_uid = 100000\n", encoding="utf-8")
    daemon = bare_host.start()
    call = prepare(last, bytes(60_000), direct=direct)
    with raw(daemon) as client:
        client.submit(call)
        client.until("accepted")
        client.submit(call)
        assert "arguments_bytes_per_uid is 100000" in client.until("refused").header["message"]


def test_t18_small_contents_fill_no_memory(shared_daemon: Host) -> None:
    """They are rows; the newest of each user lie in memory too."""
    before = resident_bytes(shared_daemon)
    with raw(shared_daemon) as client:
        for number in range(2000):
            data = number.to_bytes(4, "big") * 15_000
            client.send({"op": "put", "digest": hashlib.sha256(data).hexdigest(), "role": "code"}, data)
        client.ping()
        assert resident_bytes(shared_daemon) - before < 3 * FLAT_BYTES
    assert_works(shared_daemon)


def test_t18_kinds_of_workers_fill_no_memory_and_who_waits_for_the_first_is_served(bare_host: Host) -> None:
    """Each value of a PYTHON... variable is another kind; how its workers are started is forgotten, and said again by who waits."""
    daemon = bare_host.start()
    call = prepare(work, 1)
    surroundings = json.loads(next(bytes(upload.data) for upload in call.uploads if upload.role == "context" and isinstance(upload.data, bytes)))
    with raw(daemon) as client:
        running = [client.submit(prepare(last, number)) for number in (b"1", b"2", b"3")]
        busy = [client.until("accepted").header["id"] for _ in running]
        before = resident_bytes(daemon)
        waiting = [_submit_kind(client, call, surroundings, number) for number in range(150)]
        client.ping()
        assert resident_bytes(daemon) - before < 4 * FLAT_BYTES
        for job in (*waiting[1:], *busy):
            client.send({"op": "cancel", "id": job})
        while (done := client.until("done")).header["id"] != waiting[0]:
            pass
        assert done.header["status"] == "COMPLETED"


def _submit_kind(client: RawClient, call: Outgoing, surroundings: dict[str, Any], number: int) -> str:
    """Its id."""
    large = {f"PYTHON_TEST_{part}": f"{number}-{part}" + "x" * 100_000 for part in range(9)}
    document = json.dumps({**surroundings, "environ": {**surroundings["environ"], **large}}).encode()
    digest = hashlib.sha256(document).hexdigest()
    client.upload(Upload(digest, "context", document))
    client.submit(call, context=digest)
    return str(client.until("accepted").header["id"])


# -- T61 -----------------------------------------------------------------------------------------------------


def test_t61_the_same_key_again_is_the_same_job(shared_daemon: Host) -> None:
    marks = shared_daemon.project / "t61"
    call = prepare(note, str(marks))
    with raw(shared_daemon) as client:
        key = client.submit(call)
        first = client.until("accepted").header["id"]
        client.until("done")
    with raw(shared_daemon) as client:
        client.submit(call, key=key)
        assert client.until("accepted").header["id"] == first
        assert client.until("done").header["status"] == "COMPLETED"
    with raw(shared_daemon) as client:
        client.submit(call, key=key)
        client.submit(call, key=key)
        assert [client.until("accepted").header["id"] for _ in range(2)] == [first, first]
    assert marks.read_text(encoding="utf-8") == "ran\n"


def test_t61_a_known_key_among_new_ones_of_a_frame_runs_nothing_again(shared_daemon: Host) -> None:
    """The others are stored and run; the known one, twice in the frame, has its old outcome."""
    marks = shared_daemon.project / "t61-frame"
    call = prepare(note, str(marks))
    with raw(shared_daemon) as client:
        key = client.submit(call)
        first = client.until("accepted").header["id"]
        client.until("done")
        frame = wire.CallsFrame(call.common)
        keys = [f"new-{os.urandom(8).hex()}", key, key, f"new-{os.urandom(8).hex()}"]
        assert all(frame.add(each, call.body) for each in keys)
        client.send_raw(b"".join(frame.frames()))
        told = [client.until("accepted", "done") for _ in range(8)]
    accepted = [(found.header["key"], found.header["id"]) for found in told if found.op == "accepted"]
    assert sorted(each for each, _ in accepted) == sorted(keys)
    assert {job for each, job in accepted if each == key} == {first}
    assert [found.header["status"] for found in told if found.op == "done"] == ["COMPLETED"] * 4
    assert marks.read_text(encoding="utf-8") == "ran\n" * 3


def pour(path: str) -> bytes:
    with open(path, "a", encoding="utf-8") as file:
        file.write("begun\n")
    return bytes(1 << 20)


def nap(path: str) -> None:
    is_first = not os.path.exists(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write("begun\n")
    if not is_first:
        time.sleep(30)


def fail(path: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("begun\n")
    print("what the old job never said")
    raise ValueError(path)


@pytest.mark.parametrize("body", [note, nap, fail, pour])
def test_t61_who_calls_a_known_key_new_hears_of_the_old_job_and_nothing_of_the_other_is_kept(daemon: Host, body: Callable[..., Any]) -> None:
    """A client marks what it sends for the first time, and that may begin before it is stored; one that lies has his body run once more."""
    marks = daemon.project / "lied"
    old = prepare(note, str(marks), detach=False)
    new = prepare(body, str(daemon.project / "again"), detach=False, max_retries=1)
    with raw(daemon, greet=False) as client:
        client.send({"op": "hello", "protocol": wire.PROTOCOL, "started": 0, "folds": True, "client": "liar"})
        assert client.next().op == "welcome"
        key = client.submit(old)
        first = client.until("done").header
        client.submit(new)  # its content is there from now on, and a worker: what follows begins before it is stored
        client.until("done").close()
        before = descriptors(daemon)
        for _ in range(3):
            for _ in range(2):
                client.send({**new.common, "calls": [key], "sizes": [len(new.body)]}, new.body)
            assert [client.until("done").header["id"] for _ in range(2)] == [first["id"]] * 2
        time.sleep(0.5)  # what the store did not take is tried again by then
        assert descriptors(daemon) <= before
        client.submit(old)
        last = client.until("done").header
        assert last["status"] == "COMPLETED"
        assert last["id"] != first["id"]
    assert len((daemon.project / "again").read_text(encoding="utf-8").split()) > (1 + (body is fail)), "no body was faster than the store"
    assert marks.read_text(encoding="utf-8") == "ran\n" * 2
    daemon.stop()
    with sqlite3.connect(daemon.state / "remoted" / "remoted.sqlite3") as db:
        assert db.execute("SELECT count(*), count(ended_at) FROM jobs").fetchone() == (3, 3)
        assert db.execute("SELECT count(*) FROM attempts").fetchone() == (3 + (body is fail),)
    db.close()
    assert not any((daemon.state / "remoted" / "redo").read_bytes()[:4])


def test_t61_an_acknowledgement_lost_in_a_crash_gives_one_job(daemon: Host) -> None:
    """The client never read its acknowledgement; after the restart it sends the same key."""
    marks = daemon.project / "t61"
    call = prepare(note, str(marks))
    with raw(daemon) as client:
        key = client.submit(call)
        wait_until(marks.exists, 20)
        daemon.kill()
    daemon.start()
    with raw(daemon) as client:
        client.submit(call, key=key)
        client.submit(call, key=key)
        assert client.until("accepted").header["id"] == client.until("accepted").header["id"]
        done = client.until("done").header
        assert done["status"] == "COMPLETED", f"{done}\n{daemon.log()}"
    assert marks.read_text(encoding="utf-8") == "ran\n"
