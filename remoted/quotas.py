"""What each user has on the daemon's disk, and what is refused because it would be too much (T44).

It is measured now and then (``room``), and what comes meanwhile is added; what is deleted counts until the next look. Nobody may
have more than the limit, nor, where the disk is smaller than that, more than would be left free for everybody else.
In a user's own daemon it is only counted: there is nobody else.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping

from remoted.errors import OverLimit
from remoted.limits import Limits, size_text

#: What the row of a job takes beside what it holds.
ROW_BYTES = 1024
_CROWDED = 0.9
_NEARLY_FULL = 0.95


class Quotas:
    """``free``: what the disk still has, without its reserve; ``place``: which disk. Use from the event loop; ``room_for`` from anywhere."""

    def __init__(self, limits: Limits, free: Callable[[], int], place: str) -> None:
        self._limits = limits
        self._free = free
        self._place = place
        self._measured: dict[int, int] = {}
        self._since: Counter[int] = Counter()
        #: Who was refused for want of disk. A full disk as such is no reason to forget anything.
        self._refused: set[int] = set()
        #: Are there others to be protected? Set by the composition root.
        self.is_enforced = False
        #: Somebody needs room: set, and cleared by who makes some.
        self.wanted = asyncio.Event()

    def used(self, uid: int) -> int:
        return self._measured.get(uid, 0) + self._since[uid]

    def left(self, uid: int) -> int | None:
        """How much more may be stored; None is anything."""
        return min(self._limits.stored_bytes(uid) - self.used(uid), (self._free() - self.used(uid)) // 2) if self.is_enforced else None

    def users(self) -> dict[int, int]:
        """What each has."""
        return {uid: self.used(uid) for uid in {*self._measured, *self._since}}

    def take(self, uid: int, size: int) -> None:
        """It is about to be stored. Raises OverLimit."""
        if problem := self.refusal(uid, size):
            raise problem
        self.add(uid, size)

    def add(self, uid: int, size: int) -> None:
        """It is stored, whatever the limit says."""
        self._since[uid] += size
        if self.used(uid) > self._limits.stored_bytes(uid) * _NEARLY_FULL:
            self.wanted.set()

    def refusal(self, uid: int, size: int, beside: int = 0) -> OverLimit | None:
        """Why that much more of this user is not stored, ``beside`` what comes with it and is not counted yet."""
        if not self.is_enforced:
            return None
        used, most = self.used(uid) + beside, self._limits.stored_bytes(uid)
        if used + size > most:
            self.wanted.set()
            name = "stored_bytes_per_uid" if self._limits.share(uid).stored_bytes is None else "stored_bytes"
            return OverLimit("OVER_LIMIT", f"cannot store {size} bytes: you have {used} bytes here, and your limit {name} is {most}; what is old is forgotten in a moment, else ask your administrator for more")
        free = self._free()
        if size > free - used - size:
            self._refused.add(uid)
            self.wanted.set()
            return disk_full(size, self._place, free, self._limits.free_disk_reserve_bytes, used)
        return None

    def measured(self, found: Mapping[int, int], counted: Mapping[int, int]) -> None:
        """What was found by a look; ``counted``: what had come when it began, and is in it."""
        self._measured = dict(found)
        self._since.subtract(counted)
        self._since = Counter({uid: size for uid, size in self._since.items() if size > 0})

    def counted(self) -> dict[int, int]:
        """What has come since the last look."""
        return dict(self._since)

    def excess(self) -> dict[int, int]:
        """Of those who have hardly any room left: how much has to go."""
        found = {uid: self.used(uid) - self._comfortable(uid) for uid in self._measured}
        return {uid: size for uid, size in found.items() if size > 0}

    def _comfortable(self, uid: int) -> int:
        most = int(self._limits.stored_bytes(uid) * _CROWDED)
        return min(most, (self.used(uid) + self._free()) // 2) if uid in self._refused else most

    def satisfied(self) -> None:
        """All has gone that could go."""
        self._refused.clear()


class Held:
    """Arguments of live calls in memory, by user."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._bytes: Counter[int] = Counter()

    def refusal(self, uid: int, size: int) -> OverLimit | None:
        """Why no more is taken."""
        most = self._limits.arguments_bytes_per_uid
        if not size or self._bytes[uid] + size <= most:
            return None
        return OverLimit("OVER_LIMIT", f"cannot keep the arguments of another call in memory: the limit arguments_bytes_per_uid is {most}; wait for some calls to end")

    def add(self, uid: int, size: int) -> None:
        """Negative: they are needed no more."""
        self._bytes[uid] += size
        if not self._bytes[uid]:
            del self._bytes[uid]


def disk_full(size: int, place: str, free: int, reserve: int, used: int = 0) -> OverLimit:
    """``free``: beside the reserve, negative where that is broken into; ``used``: by the user who is refused."""
    left = f"the disk that holds {place} has {size_text(max(0, free + reserve))} left, of which {size_text(reserve)} are kept in reserve"
    if free < size:
        return OverLimit("DISK_FULL", f"cannot store {size} bytes: {left}; free some space there, or ask your administrator to")
    return OverLimit("DISK_FULL", f"cannot store {size} bytes: {left}, and you have {size_text(used)} there: nobody may have more than is left free for everybody else; what is old of yours is forgotten in a moment, else free some space there")


def too_many_jobs(limits: Limits, uid: int) -> OverLimit:
    """Why no other job of this user is queued."""
    name = "queued_jobs_per_uid" if limits.share(uid).queued_jobs is None else "queued_jobs"
    return OverLimit("OVER_LIMIT", f"cannot queue another job: your limit {name} is {limits.queued_jobs(uid)}; wait for some to end")
