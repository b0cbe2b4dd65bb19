"""T03, T29: whether somebody has an account is asked of a service that may hang, and never on the event loop."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from remoted.accounts import Accounts
from remoted.errors import Forbidden, OverLimit


def known_are(*uids: int, asked: list[int] | None = None):  # type: ignore[no-untyped-def]
    def look_up(uid: int) -> object:
        if asked is not None:
            asked.append(uid)
        if uid not in uids:
            raise KeyError(uid)
        return object()

    return look_up


async def test_t03_who_has_no_account_is_refused_with_the_way_out() -> None:
    accounts = Accounts(everybody=False, look_up=known_are(1000))

    await accounts.require(1000)
    with pytest.raises(Forbidden, match="allow_unknown_uids"):
        await accounts.require(60001)


async def test_t03_everybody_is_served_where_that_is_allowed() -> None:
    asked: list[int] = []
    await Accounts(everybody=True, look_up=known_are(asked=asked)).require(60001)

    assert asked == []


async def test_t29_answers_are_remembered() -> None:
    asked: list[int] = []
    accounts = Accounts(everybody=False, look_up=known_are(1000, asked=asked))
    await asyncio.gather(*(accounts.require(1000) for _ in range(10)))
    await accounts.require(1000)

    assert asked == [1000]


async def test_t29_a_name_service_that_hangs_keeps_nobody_else_waiting() -> None:
    """The loop goes on, who is known is served, and who is asked for hears why there is no answer."""
    hanging = threading.Event()

    def look_up(uid: int) -> object:
        if uid == 60001:
            hanging.wait()
        return object()

    accounts = Accounts(everybody=False, look_up=look_up, deadline_seconds=0.05)
    stuck = asyncio.create_task(accounts.require(60001))
    await accounts.require(1000)
    assert not stuck.done()
    with pytest.raises(OverLimit, match="name service"):
        await stuck
    hanging.set()


async def test_t03_the_name_of_an_account_is_told_and_asked_for_anew() -> None:
    names = {1000: "carl"}

    def look_up(uid: int) -> object:
        return SimpleNamespace(pw_name=names[uid])

    accounts = Accounts(everybody=False, look_up=look_up)

    assert await accounts.require(1000) == "carl"
    names[1000] = "dora"
    assert await accounts.require(1000) == "carl"
    assert await accounts.require(1000, anew=True) == "dora"
    del names[1000]
    with pytest.raises(Forbidden):
        await accounts.require(1000, anew=True)
