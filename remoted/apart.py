"""Work that somebody can make last for ever, in a thread of its own: who asks for it has a deadline, and nobody else waits.

The threads of the loop are few and everybody's, so nothing may be done there that touches a user's process more than /proc/PID/stat
does: whoever reads its command line, environment or maps waits for its memory map, which a thread of that process can hold for as
long as it likes (mmap(2) of a file system that it serves itself).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeVar

_T = TypeVar("_T")


class Apart:
    """While work hangs, who asks for more with the same key goes without: as many threads can hang as there are keys."""

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._busy: set[Hashable] = set()

    async def do(self, key: Hashable, work: Callable[[], _T]) -> _T | None:
        """What it returns; None when it is not ready in time."""
        if key in self._busy:
            return None
        self._busy.add(key)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()
        threading.Thread(target=self._do, args=(key, work, loop, done), name="apart", daemon=True).start()
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            return await asyncio.wait_for(done, self._deadline_seconds)
        return None

    def _do(self, key: Hashable, work: Callable[[], _T], loop: asyncio.AbstractEventLoop, done: asyncio.Future[_T]) -> None:
        answer: Callable[[], None]
        try:
            found = work()
        except Exception as error:
            answer = partial(done.set_exception, error)
        else:
            answer = partial(done.set_result, found)
        self._busy.discard(key)
        with contextlib.suppress(RuntimeError):  # the loop is over
            loop.call_soon_threadsafe(lambda: None if done.done() else answer())
