"""How fast one user may ask (T18): a token bucket for each uid."""

from __future__ import annotations

from collections.abc import Callable

from remoted.clock import Clock

_USERS_MOST = 4096


class Rate:
    """So many a second, and after a pause a second's worth at once. ``most`` is asked each time; 0 is no limit."""

    def __init__(self, most: Callable[[], int], clock: Clock) -> None:
        self._most = most
        self._clock = clock
        #: What a user had left, and when.
        self._left: dict[int, tuple[float, float]] = {}

    def admit(self, uid: int) -> float:
        """Take one. If there is none nothing is taken, and this is how many seconds it lasts until there is."""
        most = self._most()
        if not most:
            return 0.0
        left = self._fill(uid, most)
        if left >= 1.0:
            self._note(uid, left - 1.0)
            return 0.0
        return (1.0 - left) / most

    def owe(self, uid: int, count: int) -> float:
        """Take so many in any case. How many seconds the user has to wait for that."""
        most = self._most()
        if not most:
            return 0.0
        left = self._fill(uid, most) - count
        self._note(uid, left)
        return max(0.0, -left / most)

    def _fill(self, uid: int, most: int) -> float:
        left, then = self._left.get(uid, (float(most), 0.0))
        return min(float(most), left + (self._clock.monotonic() - then) * most)

    def _note(self, uid: int, left: float) -> None:
        if uid not in self._left and len(self._left) >= _USERS_MOST:
            self._left.clear()  # whole buckets, for once
        self._left[uid] = left, self._clock.monotonic()
