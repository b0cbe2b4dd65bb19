"""T44: room on the disk is made of what is old, of who wants it only."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from remoted.attempts import AttemptEnd
from remoted.model import Reason, Status
from remoted.room import Room
from remoted_client import wire
from tests.integration.test_api import Daemon, running

ALICE, BOB = 12345, 12346
RESULT_BYTES = 100_000


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path) as daemon:
        daemon.contents.quotas.is_enforced = True
        daemon.limits.stored_bytes_per_uid = 10 * RESULT_BYTES
        yield daemon


async def result_of(daemon: Daemon, uid: int) -> str:
    """A job that has returned, with a file of its own for what it gave; "" if that was refused."""
    call = await daemon.submit(uid=uid)
    call.token, call.attempts = call.id, 1  # type: ignore[assignment]
    payload = wire.memfd("result")
    os.truncate(payload, RESULT_BYTES)
    daemon.jobs.attempt_ended(call, call.token, AttemptEnd("returned", payload=payload, size=RESULT_BYTES))
    await daemon.jobs.close()
    if call.status is Status.COMPLETED:
        return call.id
    assert call.reason is Reason.RESULT_LOST
    assert "stored_bytes_per_uid" in call.error
    return ""


def kept(daemon: Daemon, job: str) -> bool:
    return (daemon.paths.outcomes / f"{job}.result").exists()


async def test_t44_the_oldest_results_of_who_is_near_the_limit_go_and_nobody_elses(daemon: Daemon) -> None:
    room = Room(daemon.jobs.records, daemon.contents, daemon.paths, daemon.clock, daemon.limits)
    bobs = await result_of(daemon, BOB)
    alices = [await result_of(daemon, ALICE) for _ in range(12)]
    taken = [job for job in alices if job]
    assert len(taken) < len(alices), "some were refused"

    await room.wanted(0.0)
    await room.make()

    assert [kept(daemon, taken[0]), kept(daemon, taken[-1]), kept(daemon, bobs)] == [False, True, True]
    assert await result_of(daemon, ALICE)


async def test_t44_what_was_measured_is_what_was_counted(daemon: Daemon) -> None:
    """So that nobody gains or loses room by a look."""
    room = Room(daemon.jobs.records, daemon.contents, daemon.paths, daemon.clock, daemon.limits)
    await room.measure()
    for _ in range(3):
        await result_of(daemon, ALICE)
    before = daemon.contents.quotas.used(ALICE)

    await room.measure()

    assert before == pytest.approx(daemon.contents.quotas.used(ALICE), rel=0.05)
