"""What the daemon sent and the main thread has not taken yet."""

from __future__ import annotations

import asyncio
import queue
from typing import Any


class Inbox:
    """Filled by the channel's thread, emptied by the main thread between calls."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._arrived = asyncio.Event()
        self._loop_waits = False

    def put(self, item: Any) -> None:
        """From any thread."""
        self._items.put(item)
        if self._loop_waits:
            self._loop.call_soon_threadsafe(self._arrived.set)

    def get(self, uses_loop: bool) -> Any:
        """The next item. With ``uses_loop`` the loop meanwhile runs what warm objects left on it, which costs a wake-up."""
        return self._loop.run_until_complete(self._get()) if uses_loop else self._items.get()

    async def _get(self) -> Any:
        self._loop_waits = True
        try:
            while self._items.empty():
                self._arrived.clear()
                if self._items.empty():
                    await self._arrived.wait()
        finally:
            self._loop_waits = False
        return self._items.get()
