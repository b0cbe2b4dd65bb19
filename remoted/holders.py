"""How many processes use each pool's config: while one does, and some time after, its ``workers_min`` holds (MECHANISMS 6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf

from remoted.clock import Clock
from remoted.scheduler.events import PoolHeld
from remoted.scheduler.state import PoolKey


class Holders:
    """Tells the scheduler until when each pool is held."""

    def __init__(self, tell: Callable[[PoolHeld], None], clock: Clock) -> None:
        self._tell = tell
        self._clock = clock
        self._count: Counter[PoolKey] = Counter()

    def hold(self, pool: PoolKey, seconds: float) -> None:
        """Its config is used now, and keeps its ``workers_min`` so long, or for as long as a process holds it."""
        if not self._count[pool]:
            self._tell(PoolHeld(pool, self._clock.monotonic() + seconds))

    def keep(self, pool: PoolKey) -> None:
        """A process that uses its config holds it until ``let_go``."""
        self._count[pool] += 1
        self._tell(PoolHeld(pool, inf))

    def let_go(self, pool: PoolKey, seconds: float) -> None:
        """The process is gone; the last one's pool is held for a while longer."""
        self._count[pool] -= 1
        if not self._count[pool]:
            del self._count[pool]
            self.hold(pool, seconds)
