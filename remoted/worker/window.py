"""How much of a stream may be on its way: so many items, and so many bytes (SURFACE F21)."""

from __future__ import annotations

import threading
from collections import deque


class Window:
    """Filled by the body, emptied by what the caller has read. One item always fits, however large."""

    def __init__(self, items: int, size: int) -> None:
        self._items, self._bytes = items, size
        self._sizes: deque[int] = deque()
        self._used = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        """Wait until an item of ``size`` bytes fits. False when no more is wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._sizes or (len(self._sizes) < self._items and self._used + size <= self._bytes))
            self._sizes.append(size)
            self._used += size
            return not self._closed

    def give_back(self, items: int) -> None:
        """The caller has read the oldest ``items``."""
        with self._changed:
            for _ in range(min(items, len(self._sizes))):
                self._used -= self._sizes.popleft()
            self._changed.notify_all()

    def close(self) -> None:
        """The caller wants no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
