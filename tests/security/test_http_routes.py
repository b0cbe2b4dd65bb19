"""Routes of functions against clients, workers and other users that mean no good (T01, T09, T10, T12 to T17, T34)."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from remoted.access import Peer
from remoted.api.answering import BadAnswer, Part
from remoted.attempts import Content
from remoted.calls import Call, Request
from remoted.endpoints import Endpoint
from remoted.errors import BadRequest, Conflict, OverLimit
from remoted.limits import Limits
from remoted.spec import parse_options
from remoted_client import wire
from tests.faults.rawclient import RawClient
from tests.harness import Host
from tests.integration.test_api import SPEC, Daemon, read_answer, running

ME = Peer(os.geteuid(), os.getegid(), os.getpid())
LIMITS = Limits(http_body_deadline_seconds=0.2, http_body_bytes=4096, pool_busy_seconds=0.2, routes_per_uid=3)
DESCRIPTION = b'{"operation": {}, "components": {}}'


class Script:
    """Who serves the routes."""

    def __init__(self, pid: int = 77) -> None:
        self.pid = pid
        self.served: list[int] = []

    def on_output(self, stream: int, data: bytes) -> None:
        pass

    def on_served(self, endpoint: Endpoint, status: int, seconds: float, call: Call | None) -> None:
        self.served.append(status)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path, LIMITS) as daemon:
        yield daemon


async def request(daemon: Daemon, uid: int, **pool: Any) -> Request:
    """Everything that calls of a function need, stored for its user."""
    spec = {**SPEC, "pool": {**SPEC["pool"], "class": "CpuLiveLoadBalancer", "load_balanced": True, **pool}}
    context = {"environ": {}, "declared": {}, "cwd": "/", "umask": 63, "sys_path": [], "argv": []}
    digests = {}
    for role, document in (("spec", spec), ("code", "c"), ("context", context)):
        data = json.dumps(document).encode()
        digests[role] = hashlib.sha256(data).hexdigest()
        await daemon.contents.put(uid, digests[role], role, wire.Frame({}, data), daemon.clock.wall())
    return Request(key="k" * 8, modules="", arguments="", arguments_inline=b"", options=parse_options({}), **digests)


async def route(daemon: Daemon, path: str = "/x", method: str = "POST", peer: Peer = ME, owner: Script | None = None) -> Script:
    owner = owner or Script()
    daemon.services.endpoints.add(peer, method, path, await request(daemon, peer.uid), DESCRIPTION, owner)
    return owner


async def test_t10_another_users_route_answers_exactly_as_an_unknown_one(daemon: Daemon) -> None:
    await route(daemon, "/theirs", peer=Peer(ME.uid + 1, 1, 1))

    theirs, unknown = [await daemon.ask("POST", path, {}) for path in ("/f/theirs", "/f/nobodys")]
    assert theirs[:2] == unknown[:2]
    assert theirs[0] == 404
    assert (await daemon.ask("GET", "/f/theirs"))[0] == 404, "nor does another method tell"
    assert (await daemon.ask("GET", "/v1/endpoints"))[1] == {"endpoints": []}
    assert (await daemon.ask("GET", "/v1/endpoints/openapi.json"))[1]["paths"] == {}
    await route(daemon, "/theirs")
    assert len(daemon.services.endpoints) == 2, "and everybody may have the same path"


async def test_t01_the_header_that_names_a_process_only_takes_routes_away(daemon: Daemon) -> None:
    await route(daemon, "/mine", "GET")
    await route(daemon, "/theirs", "GET", peer=Peer(ME.uid + 1, 1, 1), owner=Script(88))

    assert (await daemon.ask("GET", "/f/mine", headers={"X-Remoted-Process": "77"}))[0] == 503
    assert (await daemon.ask("GET", "/f/mine", headers={"X-Remoted-Process": "78"}))[0] == 404
    assert (await daemon.ask("GET", "/f/theirs", headers={"X-Remoted-Process": "88"}))[0] == 404
    assert (await daemon.ask("GET", "/f/mine", headers={"X-Remoted-Process": "-1"}))[0] == 400


async def test_t09_no_route_of_a_function_hides_one_of_the_daemons(daemon: Daemon) -> None:
    for path in ("/v1/version", "/../v1/version", "/"):
        await route(daemon, path, "GET")

    assert (await daemon.ask("GET", "/v1/version"))[1]["pid"] == os.getpid()
    assert (await daemon.ask("GET", "/"))[0] == 404
    assert (await daemon.ask("GET", "/f"))[0] == 404
    assert (await daemon.ask("OPTIONS", "/f/x"))[0] == 405


async def test_t12_a_body_that_does_not_come_is_408_and_nothing_is_called(daemon: Daemon) -> None:
    await route(daemon)
    reader, writer = await daemon.connect()
    writer.write(b"POST /f/x HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")

    assert (await read_answer(reader))[0] == 408
    assert not daemon.direct.calls
    writer.close()


async def test_t15_too_large_a_body_is_413_before_it_is_read(daemon: Daemon) -> None:
    await route(daemon)
    reader, writer = await daemon.connect()
    writer.write(b"POST /f/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000000\r\n\r\n")

    assert (await read_answer(reader))[0] == 413
    writer.close()


async def test_t16_a_compressed_body_reaches_no_function(daemon: Daemon) -> None:
    await route(daemon)

    assert (await daemon.ask("POST", "/f/x", gzip.compress(b"{}"), {"Content-Encoding": "gzip"}))[0] == 415
    assert not daemon.direct.calls


@pytest.mark.parametrize("body", [b'{"a": 1, "a": 2}', b"NaN", b'"\\ud800"', b"[" * 1000, b"\x00", b"{} {}"])
async def test_t17_a_strange_body_reaches_no_function(daemon: Daemon, body: bytes) -> None:
    owner = await route(daemon)
    status, document, _ = await daemon.ask("POST", "/f/x", body)

    assert (status, document["detail"][0]["loc"], owner.served) == (422, ["body"], [422])
    assert not daemon.direct.calls


async def test_a_body_where_a_method_takes_none_is_refused(daemon: Daemon) -> None:
    await route(daemon, method="GET")

    assert (await daemon.ask("GET", "/f/x", b"{}"))[0] == 400


async def test_a_pool_without_room_is_503_and_says_when_to_come_again(daemon: Daemon) -> None:
    owner = await route(daemon)
    status, document, headers = await daemon.ask("POST", "/f/x", {})

    assert (status, document["error"]["code"], headers["retry-after"]) == (503, "POOL_BUSY", "1")
    assert owner.served == [503]
    assert not daemon.direct.calls


async def test_a_client_that_leaves_while_its_call_waits_takes_it_along(daemon: Daemon) -> None:
    owner = await route(daemon)
    _, writer = await daemon.connect()
    writer.write(b"POST /f/x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    while not daemon.direct.calls:
        await asyncio.sleep(0)
    writer.close()
    while daemon.direct.calls:
        await asyncio.sleep(0.001)

    assert owner.served in ([499], [503])


async def test_a_daemon_that_is_being_stopped_is_503(daemon: Daemon) -> None:
    await route(daemon)
    daemon.engine.freeze()

    assert (await daemon.ask("POST", "/f/x", {}))[0] == 503


async def test_what_cannot_be_registered_is_refused(daemon: Daemon) -> None:
    good, endpoints, owner = await request(daemon, ME.uid), daemon.services.endpoints, Script()
    for method, path in (("get", "/x"), ("HEAD", "/x"), ("GET", "x"), ("GET", "/" + "x" * 200), ("GET", "/\n")):
        with pytest.raises(BadRequest, match="cannot register"):
            endpoints.add(ME, method, path, good, DESCRIPTION, owner)
    for description in (b"", b"[]", b"{}", b'{"operation": 1, "components": {}}', b"[" * 60_000):
        with pytest.raises(BadRequest, match="description"):
            endpoints.add(ME, "GET", "/x", good, description, owner)
    with pytest.raises(BadRequest, match="queue class"):
        endpoints.add(ME, "GET", "/x", await request(daemon, ME.uid, load_balanced=False), DESCRIPTION, owner)
    with pytest.raises(BadRequest, match="send it again"):
        endpoints.add(Peer(ME.uid + 1, 1, 1), "GET", "/x", good, DESCRIPTION, owner)
    endpoints.add(ME, "GET", "/{a}", good, DESCRIPTION, owner)
    with pytest.raises(Conflict, match="this process serves GET /"):
        endpoints.add(ME, "GET", "/{b}", good, DESCRIPTION, owner)
    for path in ("/1", "/2"):
        endpoints.add(ME, "GET", path, good, DESCRIPTION, owner)
    with pytest.raises(OverLimit, match="routes_per_uid is 3"):
        endpoints.add(ME, "GET", "/3", good, DESCRIPTION, owner)


async def test_what_a_route_needs_is_kept_for_as_long_as_it_is_there(daemon: Daemon) -> None:
    await route(daemon, method="GET")
    endpoint = daemon.services.endpoints.of(ME)[0]
    await daemon.contents.forget_unused(daemon.clock.wall() + 1)
    assert (await daemon.ask("GET", "/f/x"))[1]["error"]["code"] == "POOL_BUSY", "it could be called"

    daemon.contents.release(ME.uid, endpoint.request.context)  # as the connection does that has sent it
    daemon.services.endpoints.drop(endpoint)
    await daemon.contents.forget_unused(daemon.clock.wall() + 1)
    assert not daemon.contents.has(ME.uid, endpoint.request.code)
    assert not daemon.contents.has(ME.uid, endpoint.request.context)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"{}\n", b"[]\n", b'{"status": 200, "type": "application/json"}', b'{"status": 200, "type": "text/html"}\n', b"\xff\n",
        b'{"status": true, "type": "application/json"}\n', b'{"status": 101, "type": "application/json"}\n', b'{"status": "200", "type": "application/json"}\n',
        b'{"status": 302, "type": "application/json"}\n', b'{"status": 200, "type": ["application/json"]}\n', b'{"status": 200, "type": "a\\r\\nb"}\n',
        b"[" * 2000 + b"\n", b" " * 2000 + b"\n",
    ],
)  # fmt: skip
def test_t34_a_workers_answer_is_believed_in_nothing_but_its_bytes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "answer").write_bytes(data)
    for content in (Content("", data), Content("", None, os.fspath(tmp_path / "answer"))):
        part = Part(content)
        with pytest.raises(BadAnswer):
            part.head()
        part.close()


def test_t17_a_route_frame_with_bad_fields_is_refused_and_the_connection_goes_on(shared_daemon: Host) -> None:
    client = RawClient(shared_daemon)
    good = {"op": "route", "key": "12345678", "method": "GET", "path": "/x", "spec": "0" * 64, "code": "", "modules": "", "context": "0" * 64}
    for changed in ({"method": None}, {"path": 7}, {"spec": {}}, {"options": []}, {"key": None}, {"context": "../../etc/passwd"}):
        client.send({**good, **changed})
        assert client.until("refused").header["about"] == "route"
    client.send({"op": "route"})
    assert client.until("refused").header["code"] == "BAD_REQUEST"
    client.send({"op": "ping"})
    assert client.until("pong")
    client.sock.close()
