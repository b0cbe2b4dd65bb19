"""What has to be stored although the disk is full: again and again, until the store takes it. An outcome is never dropped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from remoted.errors import StoreBroken, StoreError
from remoted.store import Statements, Store
from remoted.tasks import Tasks

log = logging.getLogger(__name__)
_AGAIN_SECONDS = 0.5
_PAUSE_SECONDS, _PAUSE_MOST_SECONDS = 0.2, 5.0


class Persisting:
    """One queue's. After a failed fsync nothing is tried again: nothing is told, no worker forgets, and the next daemon finds what it leaves."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tasks = Tasks("queue")
        #: What waits until the store may take it.
        self._waiting = 0

    def spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        """A task that is waited for at the end."""
        return self._tasks.spawn(coroutine)

    def again(self, error: Exception, store: Callable[..., None], *arguments: Any) -> None:
        """``store`` failed with this: it is called again soon."""
        if isinstance(error, StoreBroken):
            return
        log.error("%s; trying again in %.1f s", error, _AGAIN_SECONDS)
        self._waiting += 1
        asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._again, store, arguments)

    def _again(self, store: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._waiting -= 1
        store(*arguments)

    def store_now(self, operation: Callable[[Statements], None], then: Callable[[], None] = lambda: None) -> None:
        """In the store's line before whatever the job does next; again later if it is not taken. ``then``: once it is."""

        def stored(done: asyncio.Future[None]) -> None:
            if done.exception() is None:
                then()
            if isinstance(done.exception(), StoreError) and not isinstance(done.exception(), StoreBroken):
                self.spawn(self.store(operation))

        self._store.submit(operation).add_done_callback(stored)

    async def store(self, operation: Callable[[Statements], Any]) -> None:
        """Until it is stored. Raises StoreBroken."""
        pause = _PAUSE_SECONDS
        while True:
            try:
                await self._store.submit(operation)
            except StoreBroken:
                raise
            except StoreError as error:
                log.error("%s; trying again in %.1f s", error, pause)
                await asyncio.sleep(pause)
                pause = min(_PAUSE_MOST_SECONDS, pause * 2)
            else:
                return

    async def settle(self) -> None:
        """What was asked for before is stored."""
        with contextlib.suppress(StoreError):
            await self._store.submit(lambda db: None)

    async def close(self, until: float, is_busy: Callable[[], bool]) -> None:
        """All is stored, also what the others have in hand, or the loop's clock says that it is late."""
        loop = asyncio.get_running_loop()
        while (self._tasks or self._waiting or is_busy()) and loop.time() < until:
            await self.settle()
            if self._tasks:
                await self._tasks.wait(max(0.0, until - loop.time()))
            elif self._waiting:
                await asyncio.sleep(_AGAIN_SECONDS)
