"""Attempts that are over and of which the scheduler has not been told: while nobody waits that can wait for whoever called (docs/decisions/0104)."""

from __future__ import annotations

from collections.abc import Callable

from remoted.scheduler.state import TicketId


class Spent:
    """``tell`` takes a ticket out (``discard``), and may ask for the others to be told."""

    def __init__(self, tell: Callable[[TicketId], None]) -> None:
        self._tell = tell
        self._tickets: dict[TicketId, None] = {}
        self._is_telling = False

    def add(self, ticket_id: TicketId) -> None:
        self._tickets[ticket_id] = None

    def discard(self, ticket_id: TicketId) -> None:
        self._tickets.pop(ticket_id, None)

    def tell(self) -> None:
        """Of all of them, one after the other: there may be thousands, and each telling is an event itself."""
        if self._is_telling:
            return
        self._is_telling = True
        try:
            while self._tickets:
                self._tell(next(iter(self._tickets)))
        finally:
            self._is_telling = False
