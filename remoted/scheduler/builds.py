"""Environments: which are ready, and which are being made."""

from __future__ import annotations

from remoted.scheduler.events import Build, Step
from remoted.scheduler.state import Lane, Need


class Builds:
    """Asks for each environment once, until it is ready or has failed."""

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self._asked: set[str] = set()

    def lacks(self, need: Need) -> bool:
        return need.environment is not None and need.environment not in self.ready

    def ask_for(self, lane: Lane, step: Step) -> None:
        environment = lane.need.environment
        if environment is not None and environment not in self._asked:
            self._asked.add(environment)
            step.decisions.append(Build(environment, lane.tickets.head[1].id))

    def succeed(self, environment: str) -> None:
        self.ready.add(environment)
        self._asked.discard(environment)

    def fail(self, environment: str) -> None:
        """The next ticket that needs it asks again."""
        self._asked.discard(environment)
