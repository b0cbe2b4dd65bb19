"""What clients have sent that is on its way into the database: its line is everybody's, so of one user there is never much in it."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

#: Of one user; the database takes as much in some ten milliseconds.
_BYTES_MOST = 8 << 20


class Backlog:
    """By user. Who has too much in the line is not asked for more."""

    def __init__(self) -> None:
        self._bytes: Counter[int] = Counter()
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}

    def enter(self, uid: int, size: int) -> None:
        self._bytes[uid] += size

    def leave(self, uid: int, size: int) -> None:
        """It is stored, or refused. One who waits may go on, and all when nothing is left: connections are many."""
        self._bytes[uid] -= size
        if self._bytes[uid] <= _BYTES_MOST and uid in self._waiting:
            self._wake(uid)
        if not self._bytes[uid]:
            del self._bytes[uid]

    def _wake(self, uid: int) -> None:
        waiting = self._waiting[uid]
        while waiting:
            first = waiting.popleft()
            if not first.done():
                first.set_result(None)
                if self._bytes[uid]:
                    break
        if not waiting:
            del self._waiting[uid]

    def room(self, uid: int) -> asyncio.Future[None] | None:
        """To wait for; None if there is room."""
        if self._bytes[uid] <= _BYTES_MOST:
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(future)
        return future
