"""What the daemon sent and the main thread has not taken yet, readable from the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Inbox:
    """Filled by the channel's thread, emptied by the main thread between calls."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[Any] = deque()
        self._arrived = asyncio.Event()

    def put(self, item: Any) -> None:
        """From any thread."""
        self._items.append(item)
        self._loop.call_soon_threadsafe(self._arrived.set)

    async def get(self) -> Any:
        """The next item; meanwhile the loop runs what warm objects left on it."""
        while not self._items:
            self._arrived.clear()
            if self._items:
                break
            await self._arrived.wait()
        return self._items.popleft()
