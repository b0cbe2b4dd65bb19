"""What the daemon counts as it goes, for ``/metrics``: numbers by words of its own and by uid, never by anybody's names.

Whatever is counted here stays small however many jobs, users and hostile peers come: words are the daemon's, and uids
beyond the first few thousand are counted together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import accumulate

from remoted.endings import Ending
from remoted.model import Status

#: Upper bounds in seconds, from a warm call to a long training.
_SECONDS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 600.0, 3600.0, 86_400.0)
_COMMIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_UIDS_MOST = 4096
#: Stands for every uid that came later.
OTHERS = -1


class Histogram:
    """How many took up to so long."""

    def __init__(self, bounds: tuple[float, ...] = _SECONDS) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def note(self, seconds: float) -> None:
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    @property
    def cumulative(self) -> list[int]:
        """One number for each bound, and the last one for all."""
        return list(accumulate(self._counts))


def commit_histogram() -> Histogram:
    return Histogram(_COMMIT_SECONDS)


class Tally:
    """One daemon's counters since it started."""

    def __init__(self) -> None:
        #: By kind, status and reason.
        self.ended: Counter[tuple[str, Status, str]] = Counter()
        self.ended_of: Counter[tuple[int, Status]] = Counter()
        self.queue_seconds: dict[str, Histogram] = {}
        self.run_seconds: dict[str, Histogram] = {}
        self.refused: Counter[str] = Counter()
        #: Who is connected, by door.
        self.connections: dict[str, Counter[int]] = {"api": Counter(), "data": Counter()}
        self._uids: set[int] = set()

    def note_end(self, ending: Ending) -> None:
        self.ended[(ending.kind, ending.status, ending.reason)] += 1
        self.ended_of[(self._uid(ending.uid), ending.status)] += 1
        if ending.kind not in self.queue_seconds:
            self.queue_seconds[ending.kind], self.run_seconds[ending.kind] = Histogram(), Histogram()
        self.queue_seconds[ending.kind].note(ending.queue_seconds)
        self.run_seconds[ending.kind].note(ending.run_seconds)

    def note_refusal(self, code: str) -> None:
        self.refused[code] += 1

    def _uid(self, uid: int) -> int:
        if uid in self._uids or len(self._uids) < _UIDS_MOST:
            self._uids.add(uid)
            return uid
        return OTHERS
