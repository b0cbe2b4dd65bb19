"""The HTTP door with real objects behind it: store, queue, engine (no GPU, and no room for a worker).

``Daemon`` and ``exchange`` also serve the tests in ``tests/security``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from remoted import api
from remoted.access import Access, Peer
from remoted.api.openapi import describe
from remoted.api.routes import ROUTES
from remoted.attempts import AttemptEnd
from remoted.blobs import Blobs
from remoted.calls import Call, Request
from remoted.clock import Clock
from remoted.config import Config
from remoted.config_files import Reading
from remoted.contents import Contents
from remoted.direct import DirectCalls
from remoted.endpoints import Endpoints
from remoted.engine import Engine
from remoted.environments import Environments
from remoted.fdstore import FdStore
from remoted.gate import Gate
from remoted.gpu.locks import DeviceLocks
from remoted.gpu.nvml import Nvml
from remoted.instances import Instances
from remoted.jobs import Jobs
from remoted.lag import Lag
from remoted.limits import Limits
from remoted.paths import Paths
from remoted.redo import RedoLog
from remoted.scheduler.policy import Scheduler
from remoted.settings import Settings
from remoted.spawn import helper
from remoted.spawn.births import Births
from remoted.spec import parse_options
from remoted.spool import Spool
from remoted.store import Store
from remoted.supervisor import Supervisor
from remoted.tally import Tally
from remoted_client import wire

SPEC: dict[str, Any] = {
    "function": {"module": "app", "qualname": "train", "digest": "0" * 64},
    "pool": {
        "class": "CpuLiveServerless", "name": "demo", "load_balanced": False, "gpu": False, "workers_min": 0, "workers_max": 3,
        "idle_timeout_seconds": 60.0, "gpus": [], "gpu_count": None, "gpu_memory_bytes": None, "cpus": None, "memory_bytes": None,
        "volume": None, "image": None, "isolation": "subprocess", "ports": [], "execution_timeout_seconds": None, "cuda_min": None,
        "preload": [], "max_concurrency": 1, "preemptible": False, "keep_warm_seconds": 0.0, "isolated": False,
        "scaler_delay_seconds": None,
    },
    "max_retries": 0, "timeout_seconds": None, "python": list(sys.version_info[:3]), "executable": sys.executable,
}  # fmt: skip
SECRET = "swordfish-3141"


class Daemon:
    """A daemon without workers, in this event loop."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.limits = limits
        self.paths = Paths(state=folder / "state", sockets=folder / "run", config=folder / "config.toml")
        self.clock = Clock()
        self.tally = Tally()
        #: Whether running jobs should end too, each time that somebody asked it to stop.
        self.stops: list[bool] = []

    async def start(self, access: Access | None = None) -> None:
        self.paths.create()
        self.store = Store(self.paths.database)
        await self.store.open()
        blobs = Blobs(self.paths, self.limits.free_disk_reserve_bytes)
        self.contents = Contents(self.store, blobs, self.limits)
        environments = Environments(self.paths.environments, Config().environments, helper.run_helper, "uv")
        self.engine = Engine(
            Scheduler(4.0, workers_total=0), self.clock, self.limits, Nvml("/nonexistent/libnvidia-ml.so.1"), DeviceLocks(self.paths.state), 2.0, environments,
            Births(self.paths.runtime / "worker.pyz", self.paths.sockets, self.clock, self.limits, "f"), self.paths.sockets, Spool(self.paths.outcomes), Gate(self.paths.drain), FdStore(Supervisor({}), self.clock.boot_id()),
        )  # fmt: skip
        key = secrets.token_bytes(32)
        instances = Instances(self.engine, self.limits)
        self.jobs = Jobs(self.engine, self.contents, instances, self.clock, self.limits, key, self.store, RedoLog(self.paths.redo, self.clock.boot_id()), blobs, self.paths)
        self.direct = DirectCalls(self.engine, self.contents, instances, self.clock, self.limits, key, self.paths)
        self.jobs.others = self.direct.others = (self.jobs, self.direct)
        self.jobs.on_ended = self.direct.on_ended = self.tally.note_end
        self.services = api.Services(
            jobs=self.jobs, direct=self.direct, endpoints=Endpoints(self.direct, self.limits), engine=self.engine, environments=environments, settings=Settings(Reading(self.paths.config, (), Config(), self.limits)), limits=self.limits,
            paths=self.paths, clock=self.clock, started_at=self.clock.monotonic(), stop=self.stops.append, lag=Lag(), tally=self.tally,
        )  # fmt: skip
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.bind(os.fspath(self.paths.api_socket))
        self.sock.listen(1024)
        self.server = await api.serve(self.services, self.sock, access)

    async def stop(self) -> None:
        await self.server.close()
        self.sock.close()
        for runner in (self.jobs, self.direct):
            for call in list(runner.calls.values()):
                runner.cancel(call)
        await self.jobs.close()
        await self.engine.close()
        await self.store.close()

    async def submit(self, name: str = "train", uid: int | None = None, direct: bool = False) -> Call:
        """A call that waits: there is no room for a worker."""
        peer = Peer(os.geteuid() if uid is None else uid, 0, 1)
        environ = {"PATH": "/bin", "API_KEY": SECRET}
        context = {"environ": environ, "declared": {"TOKEN": SECRET}, "cwd": "/", "umask": 63, "sys_path": [], "argv": []}
        digests = {}
        for role, document in (("spec", SPEC), ("code", "c"), ("context", context)):
            data = json.dumps(document).encode()
            digests[role] = hashlib.sha256(data).hexdigest()
            await self.contents.put(peer.uid, digests[role], role, wire.Frame({}, data), self.clock.wall())
        request = Request(
            key=secrets.token_hex(16), spec=digests["spec"], code=digests["code"], modules="", context=digests["context"], arguments="",
            arguments_inline=SECRET.encode(), options=parse_options({"name": name}),
        )  # fmt: skip
        if direct:
            return self.direct.submit(peer, request, "")
        return self.jobs.calls[await self.jobs.submit(peer, request, "")]

    async def finish(self, call: Call) -> None:
        """Cancel a waiting call and see it stored."""
        self.jobs.cancel(call)
        await self.jobs.close()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(os.fspath(self.paths.api_socket))

    async def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
        """(status, document or bytes, headers) of one request on a connection of its own."""
        reader, writer = await self.connect()
        try:
            status, answer, found = await exchange(reader, writer, method, path, body, headers)
            is_json = found.get("content-type", "").startswith("application/json")
            return status, json.loads(answer) if is_json else answer, found
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes, dict[str, str]]:
    """One request and its answer on an open connection."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: remoted", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    if data:
        lines.append(f"Content-Length: {len(data)}")
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    return await read_answer(reader)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    status = int(head[0].split()[1])
    if headers.get("transfer-encoding") != "chunked":
        return status, await reader.readexactly(int(headers["content-length"])), headers
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return status, body, headers


@contextlib.asynccontextmanager
async def running(folder: Path, limits: Limits | None = None, access: Access | None = None) -> AsyncIterator[Daemon]:
    daemon = Daemon(folder, limits or Limits())
    await daemon.start(access)
    try:
        yield daemon
    finally:
        await daemon.stop()


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path) as daemon:
        yield daemon


# -- documents ---------------------------------------------------------------------------------------------


async def test_version_names_this_daemon(daemon: Daemon) -> None:
    status, document, _ = await daemon.ask("GET", "/v1/version")

    assert status == 200
    assert document["pid"] == os.getpid()
    assert document["protocol"] == wire.PROTOCOL


async def test_c04_status_shows_queue_with_position_and_reason(daemon: Daemon) -> None:
    first, second = await daemon.submit("first"), await daemon.submit("second")

    _, document, _ = await daemon.ask("GET", "/v1/status")

    assert [(job["id"], job["position"], job["state_reason"]) for job in document["queue"]] == [
        (first.id, 1, "WAITING_WORKER"),
        (second.id, 2, "WAITING_WORKER"),
    ]
    assert document["counts"]["queued"] == 2
    assert document["pools"][0]["name"] == "demo"
    assert document["pools"][0]["queued"] == 2
    assert document["gpus"] == []


async def test_direct_calls_are_in_the_status_too(daemon: Daemon) -> None:
    call = await daemon.submit(direct=True)

    _, document, _ = await daemon.ask("GET", "/v1/status")
    _, shown, _ = await daemon.ask("GET", f"/v1/jobs/{call.id[:10]}")

    assert [(job["id"], job["kind"]) for job in document["queue"]] == [(call.id, "direct")]
    assert shown["kind"] == "direct"


async def test_a_status_of_many_jobs_is_cut_and_counts_them_all(daemon: Daemon) -> None:
    for _ in range(250):
        await daemon.submit()

    _, document, _ = await daemon.ask("GET", "/v1/status")

    assert len(document["queue"]) == 200
    assert document["counts"]["queued"] == 250


async def test_jobs_are_listed_live_or_all_newest_first(daemon: Daemon) -> None:
    done, live = await daemon.submit("done"), await daemon.submit("live")
    await daemon.finish(done)

    _, waiting, _ = await daemon.ask("GET", "/v1/jobs")
    _, everything, _ = await daemon.ask("GET", "/v1/jobs?all=1")
    _, newest, _ = await daemon.ask("GET", "/v1/jobs?all=1&limit=1")

    assert [job["id"] for job in waiting["jobs"]] == [live.id]
    assert [job["status"] for job in everything["jobs"]] == ["IN_QUEUE", "CANCELLED"]
    assert [job["id"] for job in newest["jobs"]] == [live.id]


async def test_show_takes_the_beginning_of_an_id(daemon: Daemon) -> None:
    call = await daemon.submit("mine")

    status, document, _ = await daemon.ask("GET", f"/v1/jobs/{call.id[:12]}")

    assert status == 200
    assert (document["id"], document["name"], document["position"], document["attempt_list"]) == (call.id, "mine", 1, [])


async def test_an_ambiguous_beginning_is_refused(daemon: Daemon) -> None:
    for _ in range(17):  # sixteen hexadecimal digits: two of these begin alike
        await daemon.submit()
    beginnings = [call[0] for call in daemon.jobs.calls]
    twice = next(letter for letter in beginnings if beginnings.count(letter) > 1)

    status, document, _ = await daemon.ask("GET", f"/v1/jobs/{twice}")

    assert (status, document["error"]["code"]) == (409, "AMBIGUOUS")


async def test_no_answer_holds_arguments_or_values_of_variables(daemon: Daemon) -> None:
    call = await daemon.submit()
    paths = ["/v1/status", "/v1/jobs", f"/v1/jobs/{call.id}", "/v1/workers", "/v1/gpus", "/v1/config", "/v1/doctor", "/v1/environments"]

    for path in paths:
        status, document, _ = await daemon.ask("GET", path)
        assert status == 200, path
        assert SECRET not in json.dumps(document)
        assert sys.executable not in json.dumps(document)


async def test_config_shows_limits_in_force(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(connections_per_uid=7)) as daemon:
        _, document, _ = await daemon.ask("GET", "/v1/config")

    assert document["limits"]["connections_per_uid"] == 7


async def test_doctor_names_checks_and_advice(daemon: Daemon) -> None:
    _, document, _ = await daemon.ask("GET", "/v1/doctor")

    assert {"state", "gpus", "isolation", "disk", "configuration", "descriptors", "event loop", "database"} == {check["name"] for check in document["checks"]}
    assert all(check["ok"] or check["advice"] for check in document["checks"])
    assert "advisory" in next(check["detail"] for check in document["checks"] if check["name"] == "isolation")


async def test_openapi_lists_exactly_the_table(daemon: Daemon) -> None:
    _, document, _ = await daemon.ask("GET", "/v1/openapi.json")

    listed = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    assert listed == {(route.method, route.path) for route in ROUTES if not route.is_open}
    assert document == json.loads(json.dumps(describe(route for route in ROUTES if not route.is_open)))
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= set(document["components"]["schemas"])


# -- acting ------------------------------------------------------------------------------------------------


async def test_cancel_ends_a_waiting_job_and_says_so_only_once(daemon: Daemon) -> None:
    call = await daemon.submit()

    _, asked, _ = await daemon.ask("POST", f"/v1/jobs/{call.id}/cancel")
    await daemon.jobs.close()
    _, again, _ = await daemon.ask("POST", f"/v1/jobs/{call.id}/cancel", body={})

    assert asked["cancelling"] is True
    assert (again["cancelling"], again["status"]) == (False, "CANCELLED")


async def test_wait_answers_when_the_job_ends(daemon: Daemon) -> None:
    call = await daemon.submit()
    waiting = asyncio.create_task(daemon.ask("GET", f"/v1/jobs/{call.id}/wait?timeout=60"))
    await until(lambda: bool(call.watchers))

    daemon.jobs.cancel(call)

    status, document, _ = await waiting
    assert (status, document["status"]) == (200, "CANCELLED")
    assert not call.watchers


async def test_wait_answers_at_its_timeout(daemon: Daemon) -> None:
    call = await daemon.submit()

    _, document, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}/wait?timeout=0.01")

    assert document["status"] == "IN_QUEUE"


async def test_a_waiter_that_hangs_up_leaves_no_watcher(daemon: Daemon) -> None:
    call = await daemon.submit()
    _, writer = await daemon.connect()
    writer.write(f"GET /v1/jobs/{call.id}/wait?timeout=600 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await until(lambda: bool(call.watchers))

    writer.close()
    await writer.wait_closed()

    await until(lambda: not call.watchers)


async def test_result_of_a_live_job_is_refused_and_of_a_finished_one_is_bytes(daemon: Daemon) -> None:
    call = await daemon.submit()
    status, document, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}/result")
    assert (status, document["error"]["code"]) == (409, "NOT_FINISHED")

    await daemon.finish(call)

    status, payload, headers = await daemon.ask("GET", f"/v1/jobs/{call.id}/result")
    assert (status, payload, headers["x-remoted-status"], headers["x-remoted-kind"]) == (200, b"", "CANCELLED", "cancelled")


async def test_a_result_in_a_file_is_streamed_whole(daemon: Daemon) -> None:
    call = await daemon.submit()
    payload = os.urandom(3_000_000)
    daemon.jobs.attempt_ended(call, call.token, AttemptEnd("returned", payload=wire.memfd("result", payload), size=len(payload)))
    await daemon.jobs.close()

    status, found, headers = await daemon.ask("GET", f"/v1/jobs/{call.id}/result")

    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    assert found == payload


async def test_retry_makes_a_new_job_with_the_environment_given(daemon: Daemon) -> None:
    call = await daemon.submit("again")
    await daemon.finish(call)

    status, document, _ = await daemon.ask("POST", f"/v1/jobs/{call.id}/retry", body={"environ": {"PATH": "/bin", "API_KEY": "new"}})

    assert status == 200
    assert document["retry_of"] == call.id
    assert daemon.jobs.calls[document["id"]].name == "again"


# -- logs --------------------------------------------------------------------------------------------------


async def test_f22_logs_keep_streams_apart_and_bytes_intact(daemon: Daemon) -> None:
    call = await daemon.submit()
    daemon.jobs.add_output(call, 1, b"10%\r20%\r")
    daemon.jobs.add_output(call, 2, b"\x1b[31mwarn\xff\n")
    daemon.jobs.add_output(call, 1, b"100%\n")

    _, out, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}/logs?stream=stdout")
    _, err, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}/logs?stream=stderr")
    _, both, headers = await daemon.ask("GET", f"/v1/jobs/{call.id}/logs")
    _, rest, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}/logs?offset={5 + 8}")

    assert out == b"10%\r20%\r100%\n"
    assert err == b"\x1b[31mwarn\xff\n"
    assert headers["content-type"] == "application/x-remoted-log"
    assert both == call.log.path.read_bytes()
    assert rest == both[13:]


async def test_f22_where_another_attempt_begins_is_a_record_that_no_stream_has(daemon: Daemon) -> None:
    call = await daemon.submit()
    daemon.jobs.add_output(call, 1, b"once\n")
    daemon.jobs.divide_output(call, AttemptEnd("stale"))
    daemon.jobs.divide_output(call, AttemptEnd("raised"))
    daemon.jobs.add_output(call, 1, b"twice\n")

    _, out, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}/logs?stream=stdout")
    _, both, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}/logs")

    assert out == b"once\ntwice\n"
    assert both.count(b"\x03\0\0\0\x031 1") == 1
    assert both == call.log.path.read_bytes()


async def test_f22_followed_logs_come_live_and_end_with_the_job(daemon: Daemon) -> None:
    call = await daemon.submit()
    reader, writer = await daemon.connect()
    writer.write(f"GET /v1/jobs/{call.id}/logs?stream=stdout&follow=1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")

    daemon.jobs.add_output(call, 1, b"one\n")
    assert await reader.readexactly(9) == b"4\r\none\n\r\n"
    daemon.jobs.add_output(call, 2, b"not this\n")
    daemon.jobs.add_output(call, 1, b"two\n")
    assert await reader.readexactly(9) == b"4\r\ntwo\n\r\n"
    daemon.jobs.cancel(call)
    assert await reader.readexactly(5) == b"0\r\n\r\n"

    writer.close()
    await writer.wait_closed()
    assert not call.watchers


async def test_logs_of_an_unknown_job_are_refused_before_the_stream_begins(daemon: Daemon) -> None:
    status, document, _ = await daemon.ask("GET", f"/v1/jobs/{'0' * 32}/logs?follow=1")

    assert (status, document["error"]["code"]) == (404, "NOT_FOUND")


# -- shutting down -----------------------------------------------------------------------------------------


async def test_t57_open_streams_and_idle_connections_do_not_hold_the_end_up(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        call = await daemon.submit()
        idle = await daemon.connect()
        await exchange(*idle, "GET", "/v1/version")
        silent = await daemon.connect()
        follower = await daemon.connect()
        follower[1].write(f"GET /v1/jobs/{call.id}/logs?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await follower[0].readuntil(b"\r\n\r\n")

        await asyncio.wait_for(daemon.server.close(), 2.0)

        assert b"0\r\n\r\n" not in await follower[0].read()  # cut off, not ended
        for reader, writer in (idle, silent, follower):
            assert await reader.read() == b""
            writer.close()


async def until(condition: Any) -> None:
    """Turns of the loop, not time: the condition is reached by events already on their way."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never became true")
