"""A worker that is taken over is as hostile as any: what it says counts for what the store says it has (T34, T56, decision 0040)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from remoted import channel
from remoted.adopted import AdoptedWorker, FoundLease
from remoted.attempts import AttemptEnd
from remoted.cgroup import Bounds
from remoted.clock import Clock
from remoted.direct import _client_of
from remoted.errors import BadRequest
from remoted.fdstore import About, Entry, Handles
from remoted.leases import _make_page, is_page
from remoted.limits import Limits
from remoted.model import AttemptToken, Uid, WorkerId
from remoted.pipes import Unread
from remoted.progress import Progress
from remoted.scheduler.state import Need, PoolPolicy
from remoted.spawn import reaper
from remoted.spawn.memory import MemoryKills
from remoted.spool import Spool
from remoted.workload import Attempt
from remoted_client import wire

NAME = WorkerId("w12ab-3")
DONE = {"op": "done", "kind": "returned", "error_type": "", "message": "", "traceback": "", "exit_code": None}


class Heard:
    """An attempt's listener."""

    def __init__(self) -> None:
        self.ends: list[AttemptEnd] = []
        self.printed: list[bytes] = []

    def on_begin(self) -> None: ...
    def on_lasting(self) -> None: ...
    def on_item(self, number: int, payload: bytes | int, size: int) -> None: ...
    def on_mark(self, number: int) -> None: ...

    def on_output(self, stream: int, said: bytes | Unread) -> None:
        self.printed.append(said if isinstance(said, bytes) else said.data)

    def on_end(self, end: AttemptEnd) -> None:
        self.ends.append(end)


class Impostor:
    """The other end of the channel, in the hands of this test; a process that does nothing; and what the daemon has of both."""

    def __init__(self, folder: Path, begun: int) -> None:
        self.spool = Spool(folder)
        page = Progress(self.spool.progress_path(NAME))
        os.pwrite(page.fd, wire.PROGRESS_PAGE.pack(begun, 0), 0)
        os.close(page.fd)
        self.process = subprocess.Popen(["sleep", "600"])
        ours, self.sock = channel.pair()
        self.sock.setblocking(False)
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
        self.outputs = [writing for _, writing in pipes]
        handles = Handles(ours.detach(), os.pidfd_open(self.process.pid), pipes[0][0], pipes[1][0])
        need = Need(Uid(os.getuid()), (os.getuid(), "LiveLoadBalancer", "p"), "kind", concurrency=2)
        about = About(NAME, self.process.pid, reaper.started_at(self.process.pid), 0.0, need, PoolPolicy(), (), Bounds(), (3, 11, 0), "3.0", "", "")
        self.dead = asyncio.Event()
        self.entry = Entry(about, handles)
        self.heard: dict[str, Heard] = {}

    def adopt(self) -> None:
        self.worker = AdoptedWorker(self.entry, self.spool, Clock(), Limits(), MemoryKills(), None, lambda worker: self.dead.set())

    def has(self, token: str, position: int) -> Heard:
        listener = self.heard[token] = Heard()
        self.worker.reclaim(Attempt(AttemptToken(token), listener, 0.0, position), 0.0)
        return listener

    async def ask(self) -> str:
        """The nonce of the daemon's question."""
        self.worker.ask()
        return str((await self.hear("adopt"))["nonce"])

    async def hear(self, op: str) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        while True:
            header = wire.parse_header((data := await loop.sock_recv(self.sock, wire.MESSAGE_BYTES))[12 : 12 + int.from_bytes(data[4:8], "big")])
            if header["op"] == op:
                return header

    def say(self, header: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        wire.send(self.sock, wire.encode(header, b"", len(fds)), fds)

    async def turn(self) -> None:
        """Everything that was said has been heard: the daemon answers an unknown outcome."""
        self.say({**DONE, "attempt": "of nobody"})
        assert (await self.hear("ack"))["attempts"][-1] == "of nobody"

    async def end(self) -> None:
        self.process.kill()
        await asyncio.wait_for(self.dead.wait(), 10)
        self.process.wait()
        self.sock.close()
        wire.close_all(self.outputs)


@contextlib.asynccontextmanager
async def impostor(folder: Path, begun: int = 0) -> AsyncIterator[Impostor]:
    made = Impostor(folder, begun)
    try:
        made.adopt()
        yield made
    finally:
        await made.end()


async def test_t34_an_adopted_worker_answers_for_its_own_attempts_only(tmp_path: Path) -> None:
    async with impostor(tmp_path) as them:
        mine = them.has("mine", 1)
        nonce = await them.ask()
        them.say({**DONE, "attempt": "another's"})
        assert (await them.hear("ack"))["attempts"] == ["another's"], "it may forget what nobody here asked for"

        them.say({"op": "hello", "nonce": nonce, "running": ["mine", "another's"], "waiting": []})

        assert await them.hear("cancel") == {"op": "cancel", "attempt": "another's", "why": "CALLER_GONE"}
        assert not them.worker.runs_for_nobody, "it runs mine as well"
        assert await them.worker.answer()
        assert mine.ends == []


async def test_t56_an_outcome_that_is_repeated_counts_once_and_is_kept_until_it_is_committed(tmp_path: Path) -> None:
    async with impostor(tmp_path, begun=1) as them:
        mine = them.has("mine", 1)
        nonce = await them.ask()
        them.say({**DONE, "attempt": "mine"})
        them.say({**DONE, "attempt": "mine"})
        them.say({"op": "hello", "nonce": nonce, "running": [], "waiting": []})
        them.say({**DONE, "attempt": "of nobody"})

        assert (await them.hear("ack"))["attempts"] == ["of nobody"], "mine is not committed yet"
        assert [end.kind for end in mine.ends] == ["returned"]
        them.worker.acknowledge(AttemptToken("mine"))
        assert (await them.hear("ack"))["attempts"] == ["mine"]


async def test_t56_what_it_does_not_know_waits_again_unless_its_page_says_that_it_began(tmp_path: Path) -> None:
    async with impostor(tmp_path, begun=2) as them:
        begun, first, second = them.has("begun", 2), them.has("first", 3), them.has("second", 4)
        nonce = await them.ask()

        them.say({"op": "hello", "nonce": nonce, "running": [], "waiting": []})
        await them.turn()

        assert [end.reason.value for end in begun.ends if end.reason] == ["LOST"]
        assert [end.kind for end in (*first.ends, *second.ends)] == ["unbegun", "unbegun"]


async def test_t34_an_answer_to_another_daemons_question_is_none(tmp_path: Path) -> None:
    """It may lie unread in the channel since that one died, and says nothing about now."""
    async with impostor(tmp_path) as them:
        mine = them.has("mine", 1)
        await them.ask()

        them.say({"op": "hello", "nonce": "an older one", "running": [], "waiting": []})
        await them.turn()

        assert mine.ends == []
        assert not them.worker._answered.done()


@pytest.mark.parametrize("more", [{"running": 7}, {"running": {}, "waiting": 1.5}])
async def test_t34_an_answer_that_breaks_the_protocol_costs_the_worker_its_life(tmp_path: Path, more: dict[str, Any]) -> None:
    async with impostor(tmp_path) as them:
        mine = them.has("mine", 1)
        nonce = await them.ask()

        them.say({"op": "hello", "nonce": nonce, **more})

        await asyncio.wait_for(them.dead.wait(), 10)
        assert [end.kind for end in mine.ends] == ["unbegun"]


async def test_t34_leases_beyond_its_pools_concurrency_are_closed(tmp_path: Path) -> None:
    async with impostor(tmp_path) as them:
        nonce = await them.ask()
        null = os.memfd_create("nothing")
        before = len(os.listdir("/proc/self/fd"))
        for number in range(50):
            them.say({"op": "leased", "nonce": nonce, "attempt": str(number), "lease": "x", "spec": "y"}, (null, null))
            them.say({"op": "leased", "nonce": nonce, "attempt": "0", "lease": "x", "spec": "y"}, (null, null))
            them.say({"op": "leased", "nonce": nonce, "attempt": "z"}, (null,))
        await them.turn()
        assert list(them.worker.leases) == ["0", "1"]
        assert len(os.listdir("/proc/self/fd")) == before + 4

        them.say({"op": "lease_ended", "attempt": "0"})
        await them.turn()
        assert list(them.worker.leases) == ["1"]
        them.worker.refuse(them.worker.leases.pop("1"))
        assert (await them.hear("revoke"))["attempt"] == "1"
        assert len(os.listdir("/proc/self/fd")) == before
        os.close(null)


async def test_c09_what_was_printed_without_a_daemon_belongs_to_what_runs(tmp_path: Path) -> None:
    async with impostor(tmp_path, begun=1) as them:
        mine = them.has("mine", 1)
        os.write(them.outputs[0], b"while nobody looked\n")
        nonce = await them.ask()
        them.say({"op": "hello", "nonce": nonce, "running": ["mine"], "waiting": []})
        await them.turn()
        assert b"".join(mine.printed) == b"while nobody looked\n"


async def test_t34_a_page_with_a_mad_number_is_no_reason_to_believe_it(tmp_path: Path) -> None:
    them = Impostor(tmp_path, begun=(1 << 64) - 1)
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(ValueError, match="page"):
        them.adopt()

    assert len(os.listdir("/proc/self/fd")) == before, "the entry's descriptors are the caller's to close"
    wire.close_all(them.entry.handles)
    them.dead.set()
    await them.end()


def test_t34_a_leases_page_must_be_memory_that_nobody_can_cut_off(tmp_path: Path) -> None:
    """Reading it must neither block nor fail: not a pipe, not a file on a file system that hangs."""
    sealed = _make_page()
    unsealed = wire.memfd("page", bytes(wire.LEASE_PAGE_BYTES))
    file = os.open(tmp_path / "page", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, wire.LEASE_PAGE_BYTES)
    reading, writing = os.pipe()

    assert [is_page(fd) for fd in (sealed, unsealed, file, reading)] == [True, False, False, False]

    ours, theirs = socket.socketpair()
    good = FoundLease(AttemptToken("t"), "l", "s", ours.fileno(), sealed)
    assert _client_of(good, Uid(os.getuid())).pid == os.getpid()
    for lease, uid in ((good._replace(page=file), os.getuid()), (good._replace(connection=reading), os.getuid()), (good, 12345)):
        with pytest.raises(BadRequest):
            _client_of(lease, Uid(uid))
    wire.close_all((sealed, unsealed, file, reading, writing))
    ours.close()
    theirs.close()


async def test_c10_the_log_says_why_a_worker_is_killed_that_closed_its_channel_and_went_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with impostor(tmp_path, begun=1) as them:
        mine = them.has("mine", 1)
        await them.ask()

        them.sock.close()
        await asyncio.wait_for(them.dead.wait(), 20)

        why = "the worker closed its channel, and it did not end after that"
        assert f"worker {NAME} (pid {them.process.pid}) is killed: {why}" in caplog.text
        assert [end.message for end in mine.ends] == [f"the worker was killed by signal 9 (SIGKILL): {why}"]


async def test_c10_a_worker_that_ends_when_it_closes_its_channel_is_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with impostor(tmp_path) as them:
        await them.ask()

        them.sock.close()
        them.process.terminate()
        await asyncio.wait_for(them.dead.wait(), 20)

    assert "is killed" not in caplog.text
