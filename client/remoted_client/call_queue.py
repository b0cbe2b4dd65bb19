"""Calls that wait for a lease: in one line whatever any worker may run, in one more the calls of each instance."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remoted_client.home import Home
    from remoted_client.leased_call import LeasedCall


class CallQueue(dict["Home | None", "deque[LeasedCall]"]):
    """By the home of their instance, None where there is none; no line is empty. Its pool's lock is held."""

    def add(self, call: LeasedCall) -> None:
        call.queued_at = time.monotonic()
        self.setdefault(call.home, deque()).append(call)

    def put_back(self, call: LeasedCall) -> None:
        """It has waited before."""
        call.queued_at = call.queued_at or time.monotonic()
        self.setdefault(call.home, deque()).appendleft(call)

    def take(self, worker: str) -> LeasedCall | None:
        """Whoever waits longest of those that this worker may run."""
        heads = [line[0] for home, line in self.items() if home is None or home.worker == worker]
        if not heads:
            return None
        first = heads[0] if len(heads) == 1 else min(heads, key=lambda call: call.queued_at)
        self.take_out(first)
        return first

    def take_out(self, call: LeasedCall) -> bool:
        """False: it does not wait here."""
        line = self.get(call.home)
        if line is None:
            return False
        if line[0] is call:
            line.popleft()
        elif call in line:
            line.remove(call)
        else:
            return False
        if not line:
            del self[call.home]
        return True

    def calls(self) -> list[LeasedCall]:
        """All of them, in order of arrival."""
        return sorted((call for line in self.values() for call in line), key=lambda call: call.queued_at)

    def take_all(self, calls: list[LeasedCall]) -> list[LeasedCall]:
        """These do not wait any more."""
        for call in calls:
            self.take_out(call)
        return calls

    def take_before(self, home: Home | None, moment: float) -> list[LeasedCall]:
        """Of one line, those that were here at that moment; at least the first."""
        line = self.get(home, ())
        return self.take_all([call for call in line if call.queued_at <= moment] or list(line)[:1])

    def take_of(self, instance: str) -> list[LeasedCall]:
        return self.take_all([call for home, line in self.items() if home is not None and home.id == instance for call in line])

    def settle(self, instance: str, worker: str, drops: int) -> None:
        """The daemon has said where it lives."""
        for home in self:
            if home is not None and home.id == instance:
                home.settle(worker, drops)
