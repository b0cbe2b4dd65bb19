"""Pools whose workers die again and again: no more of them are started but for somebody who waits (SURFACE C05).

Only ``workers_min`` can loop: everybody else's attempts are counted, so each pays for its own starts.
"""

from __future__ import annotations

from collections import deque

from remoted.scheduler.state import PoolKey

#: With so many in memory, those that are over go.
_POOLS_MOST = 1024


class Crashes:
    """Unexpected ends of workers, by pool; ``count`` of them within ``seconds`` are a loop."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count, self._seconds = count, seconds
        self._times: dict[PoolKey, deque[float]] = {}

    def note(self, pool: PoolKey, now: float) -> None:
        """A worker of it ended that nobody had told to."""
        if len(self._times) >= _POOLS_MOST:
            self._times = {known: times for known, times in self._times.items() if times[-1] + self._seconds > now}
        self._times.setdefault(pool, deque(maxlen=self._count)).append(now)

    def paused_until(self, pool: PoolKey, now: float) -> float | None:
        """When its workers are worth another try; None at once."""
        times = self._times.get(pool)
        if times is None:
            return None
        if times[-1] + self._seconds <= now:
            del self._times[pool]
            return None
        return times[0] + self._seconds if len(times) == self._count and times[0] + self._seconds > now else None
