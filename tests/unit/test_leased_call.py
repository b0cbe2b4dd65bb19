"""A call on a lease, between the thread that waits for it and the one that sends it."""

from __future__ import annotations

from typing import Any

from remoted_client.lease import Lease
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
