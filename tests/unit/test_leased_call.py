"""A call on a lease, between the thread that waits for it and the one that sends it."""

from __future__ import annotations

import threading
from typing import Any

from remoted_client.connection import Connection, Upload
from remoted_client.lease import Lease
from remoted_client.lease_pool import LeasePool
from remoted_client.leased_call import LeasedCall
from remoted_client.payload import Payload


class Sending:
    """A pool whose thread notes where the call went only while somebody asks for the call back."""

    def __init__(self, lease: Lease | None) -> None:
        self.lease = lease

    def withdraw(self, call: LeasedCall) -> bool:
        if self.lease is not None:
            call.on_sent(self.lease)
        return self.lease is None

    def claim(self, call: LeasedCall, reader: object) -> Lease | None:
        return None

    def receive(self, call: LeasedCall) -> bool:
        return False

    def unclaim(self, lease: Lease, reader: object) -> None: ...
    def attend(self, call: LeasedCall) -> None: ...
    def take_back(self, segment: Any) -> None: ...


def a_call(pool: Sending) -> LeasedCall:
    return LeasedCall("f", pool, ("", "", "", 0), (), Payload(b""), is_plain=False, stream=False)


def test_f25_a_cancel_in_the_moment_of_sending_reaches_the_worker() -> None:
    """The body may begin before the thread that sent it has noted so."""
    lease = Lease(None, "client", 0.0)  # type: ignore[arg-type]
    sent: list[dict[str, Any]] = []

    call = a_call(Sending(lease))
    call.number = 1
    call.request_cancel(sent.append)

    assert sent == [{"op": "cancel", "id": lease.id, "number": 1}]


def test_f25_a_call_that_was_taken_back_is_not_stopped_anywhere() -> None:
    sent: list[dict[str, Any]] = []
    call = a_call(Sending(None))

    call.request_cancel(sent.append)

    assert not sent
    assert call.is_cancelled


def test_f06_a_line_that_breaks_while_a_call_is_submitted_waits_for_the_pool_without_what_the_pool_waits_for() -> None:
    """Else both wait for ever: who submits has the pool's lock and asks the line for a lease."""
    line = Connection()
    pool = LeasePool(line, Upload("1" * 64, "spec", b""), Upload("2" * 64, "context", b""), "f", 1, 1)
    line.pools[("", "")] = pool
    with pool._lock:
        for breaks in (line._rest, line._hand_over):
            breaking = threading.Thread(target=breaks, daemon=True)
            breaking.start()
            breaking.join(0.2)
            assert breaking.is_alive()
            asking = threading.Thread(target=line.send, args=({},), daemon=True)
            asking.start()
            asking.join(20)
            assert not asking.is_alive()
