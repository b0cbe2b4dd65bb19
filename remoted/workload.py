"""What one worker has to do: the attempts that have begun, and behind them those that it was given ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf

from remoted.attempts import AttemptListener
from remoted.model import AttemptToken, Reason


@dataclass(eq=False)
class Attempt:
    """An attempt of a call, or a lease: then what is stopped is one of its calls."""

    token: AttemptToken
    listener: AttemptListener
    #: Seconds since boot.
    started: float
    #: The how manyth call of its worker; 0 for a lease.
    position: int = 0
    #: Counted from its beginning.
    timeout_seconds: float | None = None
    stopped_by: Reason | None = None
    #: Is what is to be stopped still at it?
    is_running: Callable[[], bool] = lambda: True
    timers: list[asyncio.TimerHandle] = field(default_factory=list)

    def cancel_timers(self) -> None:
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()


class Workload:
    """In the order in which they came. What is ahead begins one by one, when everything that has begun is over."""

    def __init__(self) -> None:
        self._begun: dict[str, Attempt] = {}
        self._ahead: dict[str, Attempt] = {}

    def __bool__(self) -> bool:
        return bool(self._begun or self._ahead)

    def __iter__(self) -> Iterator[Attempt]:
        return iter([*self._begun.values(), *self._ahead.values()])

    def add(self, attempt: Attempt, ahead: bool) -> None:
        """``ahead``: it waits for those that are here; without any it begins like all others."""
        (self._ahead if ahead and (self._begun or self._ahead) else self._begun)[attempt.token] = attempt

    def find(self, token: object) -> Attempt | None:
        name = str(token)
        return self._begun.get(name) or self._ahead.get(name)

    def remove(self, token: str) -> Attempt | None:
        return self._begun.pop(token, None) or self._ahead.pop(token, None)

    @property
    def ahead(self) -> list[Attempt]:
        """What has not begun, the next one first."""
        return list(self._ahead.values())

    @property
    def ahead_count(self) -> int:
        return len(self._ahead)

    def is_ahead(self, attempt: Attempt) -> bool:
        return attempt.token in self._ahead

    @property
    def newest_begun(self) -> Attempt | None:
        """Whom output belongs to that names nobody."""
        return next(reversed(self._begun.values())) if self._begun else None

    @property
    def begun_since(self) -> float:
        """When the oldest that runs began, in seconds since boot; never if nothing runs."""
        return min((attempt.started for attempt in self._begun.values()), default=inf)

    def take_next(self) -> Attempt | None:
        """The one that begins now, if it is its turn."""
        if self._begun or not self._ahead:
            return None
        token = next(iter(self._ahead))
        self._begun[token] = self._ahead.pop(token)
        return self._begun[token]
