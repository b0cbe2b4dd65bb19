"""How much of a stream may be on its way: so many items, and so many bytes (SURFACE F21)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


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
            self._changed.wait_for(lambda: self.has_room(size))
            self._sizes.append(size)
            self._used += size
            return not self._closed

    def has_room(self, size: int) -> bool:
        """Or nobody wants any."""
        return self._closed or not self._sizes or (len(self._sizes) < self._items and self._used + size <= self._bytes)

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


class LeasedWindow(Window):
    """Of a call on a lease: what its caller has read is told on the lease, where the body's own thread hears it."""

    def __init__(self, items: int, size: int, hear: Callable[[bool], None], hang_up: Callable[[], None]) -> None:
        """``hear`` reads what the caller has sent, and waits for something if it is told to; ``hang_up`` ends such a wait."""
        super().__init__(items, size)
        self._hear = hear
        self._hang_up = hang_up

    def take(self, size: int) -> bool:
        self._hear(False)
        while not self.has_room(size):
            self._hear(True)
        return super().take(size)

    def leave(self) -> None:
        """The caller has said that it wants no more, or is gone."""
        super().close()

    def close(self) -> None:
        """From another thread: the call is to end."""
        super().close()
        self._hang_up()
