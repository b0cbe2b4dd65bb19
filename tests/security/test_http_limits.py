"""The HTTP door against clients that are slow, many, huge, compressed or malformed (T01, T02, T10, T12 to T17)."""

from __future__ import annotations

import array
import asyncio
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from remoted import api
from remoted.access import Access, Peer
from remoted.api.guard import Door
from remoted.limits import Limits
from remoted.peers import peer_of
from remoted.tally import Tally
from tests.integration.test_api import Daemon, exchange, read_answer, running

IMPATIENT = Limits(http_head_deadline_seconds=0.2, http_body_deadline_seconds=0.2, connections_per_uid=16, http_body_bytes=4096)
#: A whole machine under load may be late by this much.
LATE_SECONDS = 5.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: two users")
needs_passrights = pytest.mark.skipif(tuple(map(int, os.uname().release.split(".")[:2])) < (6, 16), reason="NEEDS Linux 6.16: SO_PASSRIGHTS")


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path, IMPATIENT) as daemon:
        yield daemon


async def _ended(reader: asyncio.StreamReader) -> bytes:
    """What was still said before the connection was closed."""
    try:
        return await asyncio.wait_for(reader.read(), LATE_SECONDS)
    except ConnectionResetError:
        return b""


# -- slow --------------------------------------------------------------------------------------------------


async def test_t12_silent_half_head_and_missing_body_are_all_closed(daemon: Daemon) -> None:
    silent, half, bodyless = [await daemon.connect() for _ in range(3)]
    half[1].write(b"GET /v1/version HTTP/1.1\r\nHost: rem")
    bodyless[1].write(b"POST /v1/jobs/00/retry HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")

    assert await _ended(silent[0]) == b""
    assert await _ended(half[0]) == b""
    answer = await _ended(bodyless[0])
    assert b"408" in answer.split(b"\r\n")[0]
    assert b"TOO_SLOW" in answer
    assert b"http_body_deadline_seconds" in answer
    for _, writer in (silent, half, bodyless):
        writer.close()


async def test_t12_trickling_does_not_lengthen_the_deadline_of_a_head(daemon: Daemon) -> None:
    reader, writer = await daemon.connect()

    async def trickle() -> None:
        for byte in b"GET /v1/version HTTP/1.1\r\n" + b"X-Slow: yes\r\n" * 1000:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0.01)

    trickling = asyncio.create_task(trickle())
    assert await _ended(reader) == b""
    trickling.cancel()
    await asyncio.gather(trickling, return_exceptions=True)
    writer.close()


async def test_t12_an_idle_connection_is_kept_only_shortly(daemon: Daemon) -> None:
    reader, writer = await daemon.connect()
    assert (await exchange(reader, writer, "GET", "/v1/version"))[0] == 200
    assert (await exchange(reader, writer, "GET", "/v1/version"))[0] == 200

    assert await _ended(reader) == b""
    writer.close()


async def test_t12_a_long_answer_is_not_cut_by_the_deadline_of_a_head(daemon: Daemon) -> None:
    call = await daemon.submit()
    status, document, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}/wait?timeout=0.6")

    assert (status, document["status"]) == (200, "IN_QUEUE")


# -- many --------------------------------------------------------------------------------------------------


async def test_t13_a_flood_leaves_an_open_connection_alone_and_is_told_the_limit(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(connections_per_uid=16)) as daemon:
        mine = await daemon.connect()
        await exchange(*mine, "GET", "/v1/version")

        flood = [await daemon.connect() for _ in range(400)]
        turned_away = 0
        for reader, _ in flood[16:]:
            status, body, _ = await read_answer(reader)
            assert (status, json.loads(body)["error"]["code"]) == (429, "OVER_LIMIT")
            assert b"connections_per_uid is 16" in body
            turned_away += 1
        status, _, _ = await exchange(*mine, "GET", "/v1/status")

        assert (status, turned_away) == (200, 384)
        for _, writer in [*flood, mine]:
            writer.close()


async def test_t18_requests_beyond_a_users_rate_are_refused_by_name(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(requests_per_second_per_uid=5)) as daemon:
        answers = [await daemon.ask("GET", "/v1/version") for _ in range(5)]
        refused = []
        while not refused:
            answer = await daemon.ask("GET", "/v1/version")
            refused += [answer] if answer[0] != 200 else []

        assert [status for status, _, _ in answers] == [200] * 5
        status, document, headers = refused[0]
        assert (status, document["error"]["code"], headers["retry-after"]) == (429, "OVER_LIMIT", "1")
        assert "requests_per_second_per_uid is 5" in document["error"]["message"]


async def test_t13_a_place_is_free_again_when_its_connection_ends(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(connections_per_uid=2)) as daemon:
        for _ in range(10):
            status, _, _ = await daemon.ask("GET", "/v1/version")
            assert status == 200


async def test_t13_the_global_cap_holds_for_everybody_together(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(connections_per_uid=9, connections_total=1)) as daemon:
        call = await daemon.submit()
        followed, following = await daemon.connect()
        following.write(f"GET /v1/jobs/{call.id}/logs?follow=true HTTP/1.1\r\nHost: remoted\r\n\r\n".encode())
        await followed.readuntil(b"\r\n\r\n")

        reader, writer = await daemon.connect()
        status, body, _ = await read_answer(reader)

        assert (status, b"connections_total is 1" in body) == (429, True)
        for opened in (following, writer):
            opened.close()


async def test_t13_who_asks_for_nothing_makes_room_for_who_does(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(connections_per_uid=9, connections_total=1)) as daemon:
        idle, writer = await daemon.connect()
        await exchange(idle, writer, "GET", "/v1/version")

        assert (await daemon.ask("GET", "/v1/version"))[0] == 200
        assert await _ended(idle) == b""
        writer.close()


FLOOD = """
import socket, sys
held = []
for _ in range(400):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    held.append(sock)
print("flooded", flush=True)
sys.stdin.read()
"""
ASK = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
try:
    sock.sendall(b"GET /v1/version HTTP/1.1\\r\\nHost: x\\r\\nX-Remote-User: root\\r\\n\\r\\n")
except BrokenPipeError:
    pass
answer = b""
while True:
    try:
        data = sock.recv(65536)
    except ConnectionResetError:
        break
    if not data:
        break
    answer += data
print(answer.decode(), end="")
"""


@pytest.fixture
def public_socket() -> Iterator[socket.socket]:
    """A listening socket that every user of this machine reaches."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.join(folder, "api.sock"))
        os.chmod(sock.getsockname(), 0o666)
        sock.listen(1024)
        yield sock
    shutil.rmtree(folder)


async def _as_user(uid: int, program: str, sock: socket.socket) -> asyncio.subprocess.Process:
    python = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else os.path.realpath(sys.executable)
    return await asyncio.create_subprocess_exec(
        python, "-I", "-S", "-c", program, sock.getsockname(),
        user=uid, group=uid, extra_groups=[], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@needs_root
async def test_t13_one_users_flood_does_not_lock_another_out(tmp_path: Path, public_socket: socket.socket) -> None:
    async with running(tmp_path) as daemon:
        server = await api.serve(daemon.services, public_socket, Access(60001))
        flooder = await _as_user(60001, FLOOD, public_socket)
        assert flooder.stdin is not None
        assert flooder.stdout is not None
        assert await flooder.stdout.readline() == b"flooded\n"

        reader, writer = await asyncio.open_unix_connection(public_socket.getsockname())
        status, _, _ = await asyncio.wait_for(exchange(reader, writer, "GET", "/v1/status"), LATE_SECONDS)

        assert status == 200
        writer.close()
        flooder.stdin.close()
        await flooder.wait()
        await server.close()


@needs_root
async def test_t01_another_users_connection_is_refused_whatever_it_says(tmp_path: Path, public_socket: socket.socket) -> None:
    async with running(tmp_path) as daemon:
        server = await api.serve(daemon.services, public_socket, Access(60001))

        stranger = await _as_user(60002, ASK, public_socket)
        answer, _ = await stranger.communicate()

        assert answer.startswith(b"HTTP/1.1 403 ")
        assert b"FORBIDDEN" in answer
        await server.close()


@needs_passrights
async def test_t20_who_passes_a_descriptor_to_the_api_cannot(daemon: Daemon) -> None:
    """Not even before the connection is accepted: nothing lies in a queue whose end could hang the daemon."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(daemon.paths.api_socket))
        with pytest.raises(PermissionError):
            sock.sendmsg([b"GET /v1/version HTTP/1.1\r\n"], rights)
        reader, writer = await asyncio.open_unix_connection(sock=sock.dup())
        assert (await exchange(reader, writer, "GET", "/v1/version"))[0] == 200
        with pytest.raises(PermissionError):
            sock.sendmsg([b"GET /v1/version HTTP/1.1\r\n"], rights)
        writer.close()


# -- huge --------------------------------------------------------------------------------------------------


async def test_t15_a_content_length_of_a_hundred_terabytes_is_refused_before_it_is_read(daemon: Daemon) -> None:
    reader, writer = await daemon.connect()
    writer.write(b"POST /v1/jobs/00/retry HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000000\r\n\r\n")

    status, body, _ = await read_answer(reader)

    assert (status, json.loads(body)["error"]["code"]) == (413, "TOO_LARGE")
    assert await _ended(reader) == b""
    writer.close()


async def test_t15_a_chunked_body_without_an_end_is_cut_at_the_cap(daemon: Daemon) -> None:
    reader, writer = await daemon.connect()
    writer.write(b"POST /v1/jobs/00/retry HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    writer.write(b"400\r\n" + b"x" * 0x400 + b"\r\n")
    for _ in range(8):
        writer.write(b"400\r\n" + b"x" * 0x400 + b"\r\n")

    status, body, _ = await read_answer(reader)

    assert (status, json.loads(body)["error"]["code"]) == (413, "TOO_LARGE")
    assert await _ended(reader) == b""
    writer.close()


async def test_t15_a_body_where_none_belongs_is_refused_and_not_read_as_the_next_request(daemon: Daemon) -> None:
    reader, writer = await daemon.connect()
    smuggled = b"POST /v1/jobs/00/cancel HTTP/1.1\r\nHost: x\r\n\r\n"
    writer.write(b"GET /v1/version HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (len(smuggled) + 5) + smuggled)

    status, body, _ = await read_answer(reader)

    assert (status, json.loads(body)["error"]["code"]) == (400, "BAD_BODY")
    assert await _ended(reader) == b""
    writer.close()


async def test_t16_a_compressed_body_is_refused_unopened(daemon: Daemon) -> None:
    bomb = gzip.compress(b" " * 1_000_000)

    status, document, _ = await daemon.ask("POST", "/v1/jobs/00/retry", bomb[:4096], {"Content-Encoding": "gzip"})

    assert (status, document["error"]["code"]) == (415, "UNSUPPORTED_ENCODING")


# -- malformed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "BAD_JSON"),
        (b"\xff", "BAD_JSON"),
        (b'{"environ": {}, "environ": {}}', "BAD_JSON"),
        (b'{"environ": NaN}', "BAD_JSON"),
        (b'{"environ": 1e999}', "BAD_JSON"),
        (b'{"environ": ' + b"9" * 4000 + b"}", "BAD_BODY"),
        (b'{"environ": {"A": "\\ud800"}}', "BAD_JSON"),
        (b'{"environ": {"A": "\\u0000"}}', "BAD_BODY"),
        (b'{"environ": {"A=B": "c"}}', "BAD_BODY"),
        (b'{"environ": {"A": 1}}', "BAD_BODY"),
        (b'{"uid": 0}', "BAD_BODY"),
        (b"[]", "BAD_BODY"),
        (b"null", "BAD_BODY"),
        (b"[" * 17 + b"]" * 17, "BAD_JSON"),
        (b"[" * 2000 + b"]" * 2000, "BAD_JSON"),
        (b'{"environ":' * 300 + b"1" + b"}" * 300, "BAD_JSON"),
    ],
)
async def test_t17_a_strange_body_is_refused(daemon: Daemon, body: bytes, code: str) -> None:
    status, document, _ = await daemon.ask("POST", "/v1/jobs/00/retry", body)

    assert (status, document["error"]["code"]) == (400, code)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "NO_ROUTE"),
        ("GET", "/v1/jobs/", 404, "NOT_FOUND"),
        ("GET", "/v1/jobs/a/b/c", 404, "NO_ROUTE"),
        ("GET", "/v1/../v1/secret", 404, "NO_ROUTE"),
        ("GET", "/v1/jobs/%2e%2e%2fetc", 404, "NOT_FOUND"),
        ("GET", "/v1/jobs/*", 404, "NOT_FOUND"),
        ("DELETE", "/v1/jobs/00", 405, "WRONG_METHOD"),
        ("HEAD", "/v1/version", 405, "WRONG_METHOD"),
        ("OPTIONS", "/v1/status", 405, "WRONG_METHOD"),
        ("GET", "/v1/status?uid=0", 400, "BAD_QUERY"),
        ("GET", "/v1/jobs?limit=0", 400, "BAD_QUERY"),
        ("GET", "/v1/jobs?limit=1&limit=2", 400, "BAD_QUERY"),
        ("GET", "/v1/jobs?limit=1&uid=0", 400, "BAD_QUERY"),
        ("GET", "/v1/jobs/00/logs?stream=../x", 400, "BAD_QUERY"),
        ("GET", "/v1/jobs/00/wait?timeout=nan", 400, "BAD_QUERY"),
    ],
)
async def test_what_is_not_in_the_table_is_refused(daemon: Daemon, method: str, path: str, status: int, code: str) -> None:
    reader, writer = await daemon.connect()
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await _ended(reader)
    writer.close()

    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert method == "HEAD" or json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == code
    assert (status == 405) == (b"\r\nAllow: " in answer)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /v1/version HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /v1/version HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/version HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /v1/version HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(100)) + b"\r\n",
    ],
)
async def test_what_is_not_http_is_refused_in_the_same_shape_without_a_traceback(daemon: Daemon, data: bytes) -> None:
    reader, writer = await daemon.connect()
    writer.write(data)

    answer = await _ended(reader)

    writer.close()
    assert answer.split(b" ")[1] == b"400"
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "BAD_REQUEST"
    assert b"Traceback" not in answer


async def test_a_broken_handler_answers_internal_and_the_door_lives_on(daemon: Daemon) -> None:
    broken = daemon.engine.scheduler.workers
    daemon.engine.scheduler.workers = None  # type: ignore[assignment]

    status, document, _ = await daemon.ask("GET", "/v1/workers")
    assert (status, document["error"]["code"]) == (500, "INTERNAL")
    assert "None" not in document["error"]["message"]

    daemon.engine.scheduler.workers = broken
    assert (await daemon.ask("GET", "/v1/workers"))[0] == 200


# -- who asks ----------------------------------------------------------------------------------------------


async def test_t01_headers_and_the_clients_address_change_nothing(daemon: Daemon, tmp_path: Path) -> None:
    foreign = await daemon.submit(uid=os.geteuid() + 1)
    lies = {"X-Remote-User": str(foreign.uid), "X-Forwarded-For": f";uid={foreign.uid};", "Authorization": "Basic cm9vdDo="}
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(tmp_path / f"pid=1;uid={foreign.uid};"))
        sock.connect(os.fspath(daemon.paths.api_socket))
        reader, writer = await asyncio.open_unix_connection(sock=sock)

        status, body, _ = await exchange(reader, writer, "GET", f"/v1/jobs/{foreign.id}", headers=lies)
        _, listed, _ = await exchange(reader, writer, "GET", "/v1/jobs", headers=lies)

        assert status == 404
        assert json.loads(body)["error"]["code"] == "NOT_FOUND"
        assert json.loads(listed) == {"jobs": []}
        writer.close()


def test_t02_a_socket_without_credentials_is_closed() -> None:
    """SO_PEERCRED of a TCP socket is (0, -1, -1): a program that did not look would take that for a user."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        accepted, _ = server.accept()
        with pytest.raises((ValueError, OSError)):  # it has neither a uid to trust nor groups
            peer_of(accepted)

        assert Door(Limits(), Access(os.geteuid()), Tally()).admit(accepted) is None
        assert accepted.fileno() == -1


def test_t02_a_closed_socket_is_nobody() -> None:
    here, there = socket.socketpair()
    here.close()

    assert Door(Limits(), Access(os.geteuid()), Tally()).admit(here) is None
    there.close()


def test_t03_credentials_are_unsigned() -> None:
    assert Peer(2**32 - 2, 0, 1).uid == 4294967294
    with pytest.raises(ValueError, match="cannot trust"):
        Peer(2**32 - 1, 0, 1)


@pytest.mark.parametrize("suffix", ["", "/logs", "/logs?follow=1", "/result", "/wait", "/cancel", "/retry"])
async def test_t10_another_users_id_answers_exactly_as_an_unknown_one(daemon: Daemon, suffix: str) -> None:
    foreign = await daemon.submit(uid=os.geteuid() + 1)
    unknown = "0123456789abcdef" * 2
    method = "POST" if suffix in ("/cancel", "/retry") else "GET"

    answers = [await _raw(daemon, method, f"/v1/jobs/{job_id}{suffix}") for job_id in (foreign.id, unknown)]

    assert answers[0].replace(foreign.id.encode(), b"ID") == answers[1].replace(unknown.encode(), b"ID")
    assert answers[0].startswith(b"HTTP/1.1 404 ")
    assert foreign.id in daemon.jobs.calls


async def test_t10_lists_and_status_show_of_others_only_what_is_meant_for_all(daemon: Daemon) -> None:
    foreign = await daemon.submit("theirs", uid=os.geteuid() + 1)
    direct = await daemon.submit("theirs too", uid=os.geteuid() + 1, direct=True)

    for path in ("/v1/status", "/v1/jobs?all=1", "/v1/workers"):
        _, document, _ = await daemon.ask("GET", path)
        others = document.pop("others", [])
        text = json.dumps(document)
        assert foreign.id not in text
        assert direct.id not in text
        assert "theirs" not in text
        for call in others:  # the daemon's own user administers it, and may end what others run
            assert set(call) == {"uid", "name", "pool", "status", "gpus", "submitted_at", "started_at", "id", "worker", "pid"}
        assert [call["name"] for call in others] == (["theirs", "theirs too"] if path == "/v1/status" else [])
    _, status, _ = await daemon.ask("GET", "/v1/status")
    assert (status["pools"], status["counts"]["queued"]) == ([], 0)


async def _raw(daemon: Daemon, method: str, path: str) -> bytes:
    """Head and body, without the date."""
    reader, writer = await daemon.connect()
    status, body, headers = await exchange(reader, writer, method, path)
    writer.close()
    found: dict[str, Any] = {name: value for name, value in headers.items() if name != "date"}
    return f"HTTP/1.1 {status} {sorted(found.items())}\n".encode() + body
