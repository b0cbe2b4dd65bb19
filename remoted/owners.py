"""Whoever waits for a worker: the use cases, as the engine sees them."""

from __future__ import annotations

from typing import Protocol

from remoted.cradle import WorkerPlan
from remoted.model import DeviceUuid, Reason
from remoted.scheduler.events import Assign
from remoted.scheduler.state import TicketId
from remoted.workers import Worker


class TicketOwner(Protocol):
    """The use case that waits for a worker."""

    #: Is what it brings stored, so that it can wait however long?
    keeps_outcomes: bool

    def on_assigned(self, ticket_id: TicketId, worker: Worker, devices: tuple[DeviceUuid, ...], how: Assign) -> None: ...
    def on_unplaceable(self, ticket_id: TicketId, reason: Reason, message: str, detail: str) -> None: ...
    def on_build_output(self, ticket_id: TicketId, data: bytes) -> None: ...
    def caller_of(self, ticket_id: TicketId) -> str: ...
    def plan_of(self, ticket_id: TicketId) -> WorkerPlan | None: ...
    def on_waiting(self, ticket_id: TicketId, reason: Reason) -> None: ...
