"""Who used how much: seconds of GPUs and CPUs by user and hour, by the daemon's clock.

An attempt is charged when it ends, in the transaction that stores its end; what ran without a row (direct calls, leases) is
charged within a minute. Charged is what was held, not what was computed: a worker's GPUs while a call ran there, and the CPUs that
the call had reserved, or one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from remoted.store import Statements

HOUR_SECONDS = 3600
#: Shown is a week; a little more is kept.
_KEPT_HOURS = 8 * 24


class Span(NamedTuple):
    """One attempt or lease of one user's, in Unix seconds."""

    uid: int
    start: float
    end: float
    gpus: int
    cpus: float

    def hours(self) -> Iterator[tuple[int, float]]:
        """(hour since 1970, seconds of it). A clock that went backwards charges nothing, one that leapt no more than is kept."""
        start = max(self.start, self.end - _KEPT_HOURS * HOUR_SECONDS)
        while start < self.end:
            hour = int(start // HOUR_SECONDS)
            end = min(self.end, float((hour + 1) * HOUR_SECONDS))
            yield hour, end - start
            start = end

    def seconds_since(self, moment: float) -> float:
        return max(0.0, self.end - max(self.start, moment))


class Totals(NamedTuple):
    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0


_NOTHING = Totals()


def totals(db: Statements, now: float, seconds: float) -> dict[int, Totals]:
    """By user, of so many seconds until now: of whole hours, the one in which that began included."""
    rows = db.all("get_usage", since=int((now - seconds) // HOUR_SECONDS))
    return {row["uid"]: Totals(row["gpu_seconds"], row["cpu_seconds"]) for row in rows}


def forget_old(db: Statements, now: float) -> None:
    db.run("delete_usage", before=int(now // HOUR_SECONDS) - _KEPT_HOURS)


class Pending:
    """What has no row of its own waits here for the next transaction."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Totals] = {}

    def add(self, span: Span) -> None:
        for hour, seconds in span.hours():
            gpu_seconds, cpu_seconds = self._found.get((span.uid, hour), _NOTHING)
            self._found[span.uid, hour] = Totals(gpu_seconds + seconds * span.gpus, cpu_seconds + seconds * span.cpus)

    def take(self) -> dict[tuple[int, int], Totals]:
        """By uid and hour; nothing is left here."""
        found, self._found = self._found, {}
        return found


def charge_all(db: Statements, found: dict[tuple[int, int], Totals]) -> None:
    for (uid, hour), used in found.items():
        db.run("add_usage", uid=uid, hour=hour, gpu_seconds=used.gpu_seconds, cpu_seconds=used.cpu_seconds)
