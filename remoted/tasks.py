"""Tasks that nobody awaits: kept, for a loop holds them but weakly, and their failures told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Tasks:
    """``whose``: for the log."""

    def __init__(self, whose: str) -> None:
        self._whose = whose
        self._live: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._live)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._live.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._live.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the %s failed", self._whose, exc_info=task.exception())

    async def wait(self, seconds: float) -> None:
        """Until those that there are now have ended, but no longer than that."""
        await asyncio.wait(self._live, timeout=seconds)

    async def cancel(self) -> None:
        """All of them, and wait for their ends."""
        for task in list(self._live):
            task.cancel()
        await asyncio.gather(*self._live, return_exceptions=True)
