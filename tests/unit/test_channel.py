"""The daemon's end of a worker's channel when the other end goes."""

from __future__ import annotations

import asyncio

from remoted import channel
from remoted_client import wire


async def test_what_a_worker_said_is_heard_although_it_died_with_messages_unread() -> None:
    """The kernel tells ECONNRESET first, and only then what had been sent before."""
    ours, theirs = channel.pair()
    heard: list[str] = []
    closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    end = channel.Channel(ours, lambda frame: heard.append(frame.op), closed.set_result)
    for number in range(100):
        end.send({"op": f"order {number}"})
        theirs.send(wire.encode({"op": f"word {number}"}))
    theirs.close()

    await asyncio.wait_for(closed, 10)

    assert heard == [f"word {number}" for number in range(100)]


async def test_what_it_said_is_heard_before_a_failed_send_is_told() -> None:
    ours, theirs = channel.pair()
    heard: list[str] = []
    closed: list[str] = []
    end = channel.Channel(ours, lambda frame: heard.append(frame.op), closed.append)
    theirs.send(wire.encode({"op": "last word"}))
    theirs.close()

    end.send({"op": "order"})

    assert heard == ["last word"]
    assert len(closed) == 1
