"""Who hears what the build of an environment prints: of each caller one waiting call, the same for as long as it waits."""

from __future__ import annotations

from collections.abc import Mapping

from remoted.scheduler.state import TicketId


class Hearers:
    """The chosen tickets, by environment and caller."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[str, str], TicketId] = {}

    def choose(self, environment: str, callers: Mapping[TicketId, str]) -> dict[str, TicketId]:
        """One of each caller's. ``callers``: who waits for this environment, and whose they are."""
        chosen: dict[str, TicketId] = {}
        for ticket_id, caller in callers.items():
            if caller not in chosen or self._chosen.get((environment, caller)) == ticket_id:
                chosen[caller] = ticket_id
        self._chosen |= {(environment, caller): ticket_id for caller, ticket_id in chosen.items()}
        return chosen

    def deaf(self, environment: str, callers: Mapping[TicketId, str]) -> dict[TicketId, TicketId]:
        """Who waits for a build without hearing it, and who hears it for them."""
        hearers = self.choose(environment, callers)
        return {ticket_id: hearers[caller] for ticket_id, caller in callers.items() if hearers[caller] != ticket_id}

    def forget(self, environment: str) -> None:
        """Its build is over."""
        self._chosen = {key: ticket for key, ticket in self._chosen.items() if key[0] != environment}
