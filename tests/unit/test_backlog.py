"""The database's line and how much of one user's is in it."""

from __future__ import annotations

import asyncio

from remoted.backlog import Backlog

MUCH = 1 << 30


def _two_wait(backlog: Backlog) -> tuple[asyncio.Future[None], asyncio.Future[None]]:
    """Of user 1, behind all that may be there and one byte more."""
    backlog.enter(1, MUCH)
    backlog.enter(1, 1)
    first, second = backlog.room(1), backlog.room(1)
    assert first is not None
    assert second is not None
    return first, second


async def test_t18_who_fills_the_databases_line_waits_and_nobody_else_does() -> None:
    backlog = Backlog()
    first, second = _two_wait(backlog)
    assert backlog.room(2) is None
    backlog.leave(1, MUCH)
    assert (first.done(), second.done()) == (True, False)
    backlog.leave(1, 1)
    assert second.done()
    assert backlog.room(1) is None


async def test_one_who_went_away_meanwhile_keeps_nobody_waiting() -> None:
    backlog = Backlog()
    first, second = _two_wait(backlog)
    first.cancel()
    backlog.leave(1, MUCH)
    assert second.done()
