"""What the daemon sent and the main thread has not taken yet."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

from .loop import WarmLoop

if TYPE_CHECKING:
    import asyncio


class Inbox:
    """Filled by the channel's thread, emptied by the main thread between calls."""

    def __init__(self, loop: WarmLoop) -> None:
        self._loop = loop
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        #: Of the loop, while that waits for an item.
        self._arrived: asyncio.Event | None = None

    def put(self, item: Any) -> None:
        """From any thread."""
        self._items.put(item)
        arrived = self._arrived
        if arrived is not None:
            self._loop.get().call_soon_threadsafe(arrived.set)

    def get(self) -> Any:
        """The next item. A loop that is in use meanwhile runs what warm objects left on it, which costs a wake-up."""
        return self._loop.run(self._get()) if self._loop.is_used else self._items.get()

    async def _get(self) -> Any:
        import asyncio

        self._arrived = arrived = asyncio.Event()
        try:
            while self._items.empty():
                arrived.clear()
                if self._items.empty():
                    await arrived.wait()
        finally:
            self._arrived = None
        return self._items.get()
