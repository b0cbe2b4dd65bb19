"""Threads in which payloads become files: apart from the loop's own, which are few, and of one user some at a time.

A memfd of nothing but a hole may have any size, and to read it takes as long as if it were full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

_THREADS = 32
_OF_ONE_USER = 2
_T = TypeVar("_T")


class Copying:
    """Users do not wait for one another as long as there are threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "copy")
        self._turns: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    async def do(self, uid: int, work: Callable[[], _T]) -> _T:
        """Once it is this user's turn."""
        turn = self._turns.setdefault(uid, asyncio.Semaphore(_OF_ONE_USER))
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
