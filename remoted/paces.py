"""How long the bodies of each function take, as far as it was seen: what decides how far a worker may run ahead."""

from __future__ import annotations

from collections import OrderedDict

_KEPT = 1000
#: Of a new duration in the average. A slower one counts at once.
_WEIGHT = 0.2


class Paces:
    """Seconds by digest of the code, the most recently used functions of the daemon's users."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[str, float] = OrderedDict()

    def note(self, code: str, seconds: float) -> None:
        """A body has ended, however."""
        known = self._seconds.pop(code, seconds)
        self._seconds[code] = max(seconds * _WEIGHT + known * (1 - _WEIGHT), seconds / 4)
        if len(self._seconds) > _KEPT:
            self._seconds.popitem(last=False)

    def expected(self, code: str) -> float:
        """Infinite for a function that has not ended yet."""
        return self._seconds.get(code, float("inf"))
