"""What changed since a lane was last tried. A lane that failed fails again until something it needs has changed."""

from __future__ import annotations

from remoted.scheduler.state import Lane, Pool, Turns


class Changes:
    """Numbered changes; each remembers the last one that may help some lane. Too many cost time, too few cost a turn."""

    def __init__(self) -> None:
        self.count = 0
        #: What explanations tell: grows when devices are lent or seen anew and when an environment is ready.
        self.facts = 0
        #: Turns at which a lane may have something to gain.
        self.open: set[Turns] = set(Turns)
        #: The last change of each.
        self.devices = 0
        self._cpus = 0
        self._everything = 0

    def in_pool(self, pool: Pool) -> None:
        """Its workers, its policy, or how many calls wait for a kind of it."""
        self.count += 1
        pool.changed = self.count
        self.open.update(pool.lanes)

    def in_cpus(self) -> None:
        self.count += 1
        self._cpus = self.count
        self.open.add(Turns.CPUS)
        self.open.add(Turns.DEVICES)

    def in_devices(self) -> None:
        self.count += 1
        self.devices = self.count
        self.open.add(Turns.DEVICES)

    def in_everything(self) -> None:
        self.count += 1
        self._everything = self.devices = self.count
        self.open.update(Turns)

    def concern(self, lane: Lane) -> bool:
        """May it be served now, although it failed when it was last tried?"""
        since = lane.failed_at
        if lane.kind.pool.changed > since or self._everything > since:
            return True
        return (self.devices > since and lane.turns is Turns.DEVICES) or (self._cpus > since and lane.cpus > 0)
