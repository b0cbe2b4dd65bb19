"""What the daemon sent and the main thread has not taken yet."""

from __future__ import annotations

import queue
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from .link import Link
from .loop import WarmLoop

if TYPE_CHECKING:
    import asyncio


class Inbox:
    """Filled by who reads the channel, and by the threads of ``leases``; emptied by the main thread between calls."""

    def __init__(self, loop: WarmLoop, link: Link, leases: Sized) -> None:
        self._loop, self._link, self._leases = loop, link, leases
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
        """The next item. A loop that is in use meanwhile runs what warm objects left on it, which costs a wake-up.

        Where only the daemon gives any, this thread reads the channel itself: a call wakes one thread instead of two.
        """
        if self._loop.is_used:
            return self._loop.run(self._get())
        self._link.read_while(self._is_the_channels)
        return self._items.get()

    def _is_the_channels(self) -> bool:
        """Nothing is here, and nobody else can bring anything."""
        return self._items.empty() and not self._leases

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
