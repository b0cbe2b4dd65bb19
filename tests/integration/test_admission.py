"""What is remembered of a request that calls have in common, and what is not (docs/decisions/0104)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from remoted.access import Peer
from remoted.accounts import Accounts
from remoted.calls import Call, Request
from remoted.data.callers import Runners
from remoted.data.connection import Connection
from remoted.errors import BadRequest, Conflict
from remoted.gate import Drain
from remoted.rates import Rate
from remoted.spec import parse_options
from remoted_client import wire
from tests.integration.test_api import SPEC, Daemon, running

ME = Peer(os.geteuid(), 0, 1)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path) as daemon:
        yield daemon


class Caller:
    """Of a daemon in this event loop: what one connection does, without the socket."""

    def __init__(self, daemon: Daemon, spec: dict[str, Any] = SPEC) -> None:
        self._daemon = daemon
        self._spec = spec

    async def bring(self) -> Request:
        """Its content, of which the surroundings are held until ``leave``."""
        context = {"environ": {"PATH": "/bin"}, "declared": {"TOKEN": "3141"}, "cwd": "/", "umask": 63, "sys_path": [], "argv": []}
        digests = {}
        for role, document in (("spec", self._spec), ("code", "c"), ("context", context)):
            data = json.dumps(document).encode()
            digests[role] = hashlib.sha256(data).hexdigest()
            await self._daemon.contents.put(ME.uid, digests[role], role, wire.Frame({}, data), 0.0)
        self.request = Request(key="", spec=digests["spec"], code=digests["code"], modules="", context=digests["context"], arguments="", arguments_inline=None, options=parse_options({}))
        return self.request

    def leave(self) -> None:
        self._daemon.contents.release(ME.uid, self.request.context)

    def call(self) -> Call:
        jobs, key = self._daemon.jobs, secrets.token_hex(16)
        jobs.accept(jobs.admit(ME, self.request), [(key, b"")], "", lambda key, found: None)
        return next(call for call in jobs.calls.values() if call.key == key)


async def test_calls_that_have_a_request_in_common_are_admitted_together(daemon: Daemon) -> None:
    caller = Caller(daemon)
    await caller.bring()
    first, second = caller.call(), caller.call()

    assert first.admitted is second.admitted
    assert first.submitted_at < second.submitted_at
    caller.leave()


async def test_t40_surroundings_are_forgotten_with_the_last_call_that_needs_them(daemon: Daemon) -> None:
    """Also where their connection ended before another one's last call."""
    caller = Caller(daemon)
    request = await caller.bring()
    first = caller.call()
    caller.leave()
    second = caller.call()
    for call in (first, second):
        assert daemon.contents.has(ME.uid, request.context)
        await daemon.finish(call)
    assert not daemon.contents.has(ME.uid, request.context)
    assert not daemon.jobs._newest
    with pytest.raises(BadRequest, match="send it again"):
        caller.call()


async def test_t40_of_one_call_alone_nothing_is_remembered(daemon: Daemon) -> None:
    """Its arguments are its own: it has no request in common with others (a retry, a direct call, an HTTP request)."""
    await daemon.submit()
    await daemon.submit(direct=True)

    assert not daemon.jobs._newest
    assert not daemon.direct._newest


async def test_c04_a_drain_that_refuses_is_said_before_anything_is_done_for_the_call(daemon: Daemon) -> None:
    caller = Caller(daemon, {**SPEC, "pool": {**SPEC["pool"], "workers_min": 1, "keep_warm_seconds": 600.0}})
    await caller.bring()
    daemon.engine.gate.close(Drain(0.0, refuses=True, why=""))
    with pytest.raises(Conflict, match="cannot take new work"):
        caller.call()
    assert not daemon.engine.scheduler.held_until

    daemon.engine.gate.open()
    call = caller.call()
    assert daemon.engine.scheduler.held_until
    daemon.engine.gate.close(Drain(0.0, refuses=True, why=""))
    with pytest.raises(Conflict, match="cannot take new work"):
        caller.call()
    await daemon.finish(call)
    caller.leave()


@pytest.mark.parametrize("is_early", [False, True], ids=["while-it-waits-for-room", "before-it-is-read"])
async def test_t40_surroundings_go_with_a_connection_that_ends_while_they_come(daemon: Daemon, is_early: bool) -> None:
    """Much of its user's is on the way to the disk, so the connection is not read on."""
    mine, theirs = socket.socketpair()
    gone: list[Connection] = []
    accounts, rate = Accounts(), Rate(lambda: 0, daemon.clock)
    connection = Connection(theirs, ME, Runners(daemon.jobs, daemon.direct, daemon.services.endpoints), {}, daemon.limits, accounts, daemon.tally, rate, gone.append)
    data = b"{}"
    digest = hashlib.sha256(data).hexdigest()
    daemon.contents.backlog.enter(ME.uid, 9 << 20)
    mine.sendall(wire.encode({"op": "hello", "protocol": wire.PROTOCOL}) + wire.encode({"op": "put", "digest": digest, "role": "context"}, data))
    while not is_early and not (daemon.contents.has(ME.uid, digest) and await asyncio.to_thread(lambda: list((daemon.paths.state / "secrets").rglob(digest)))):
        await asyncio.sleep(0)
    mine.close()
    while not gone:
        await asyncio.sleep(0)
    daemon.contents.backlog.leave(ME.uid, 9 << 20)
    while daemon.contents.has(ME.uid, digest):
        await asyncio.sleep(0)

    assert gone == [connection]
    assert not list((daemon.paths.state / "secrets").rglob(digest))


async def _abandon(daemon: Daemon, putting: asyncio.Future[None]) -> None:
    """Until what it has begun is over."""
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    while daemon.contents._storing:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("is_inline", [False, True], ids=["file", "inline"])
async def test_t40_surroundings_that_nobody_waits_for_any_more_leave_no_file(daemon: Daemon, is_inline: bool) -> None:
    """Their connection ends while a thread writes them."""
    data = secrets.token_bytes(1 << 16)
    digest = hashlib.sha256(data).hexdigest()
    frame = wire.Frame({}, data) if is_inline else wire.Frame({}, b"", (wire.memfd("test", data),))
    putting = asyncio.ensure_future(daemon.contents.put(ME.uid, digest, "context", frame, 0.0))
    while not daemon.contents._holders[(ME.uid, digest)]:
        await asyncio.sleep(0)
    await _abandon(daemon, putting)
    await asyncio.sleep(0)

    assert not daemon.contents.has(ME.uid, digest)
    assert not daemon.contents._holders[(ME.uid, digest)]
    assert not list((daemon.paths.state / "secrets").rglob(f"{digest}*"))


async def test_content_that_nobody_waits_for_any_more_is_stored_all_the_same(daemon: Daemon) -> None:
    """A file without a row would be nobody's, and would stay."""
    data = secrets.token_bytes(1 << 16)
    digest = hashlib.sha256(data).hexdigest()
    putting = asyncio.ensure_future(daemon.contents.put(ME.uid, digest, "arguments", wire.Frame({}, b"", (wire.memfd("test", data),)), 0.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await _abandon(daemon, putting)

    assert daemon.contents.has(ME.uid, digest)
    assert await daemon.store.submit(lambda db: db.one("get_content", uid=ME.uid, digest=digest))
