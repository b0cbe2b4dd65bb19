"""How late the event loop is: what everybody's calls wait for while somebody's keeps it busy (T58)."""

from __future__ import annotations

import asyncio
from collections import deque

_PERIOD_SECONDS = 0.5
_KEPT = 120


class Lag:
    """Seconds by which the loop was late for a timer, looked at twice a second, for the last minute."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque([0.0], maxlen=_KEPT)

    @property
    def newest_seconds(self) -> float:
        return self._seen[-1]

    @property
    def worst_seconds(self) -> float:
        """Of the last minute."""
        return max(self._seen)

    async def watch(self) -> None:
        """For as long as the daemon lives."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _PERIOD_SECONDS
            await asyncio.sleep(_PERIOD_SECONDS)
            self._seen.append(max(0.0, loop.time() - due))
