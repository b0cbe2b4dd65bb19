"""Room on the disk: what is old is forgotten, and of who has hardly any left, the oldest (T44).

First what can be sent again (content that no live call refers to), then results, the oldest first, until a tenth of the limit is free.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from remoted.clock import Clock
from remoted.contents import Contents
from remoted.limits import Limits
from remoted.paths import Paths
from remoted.records import Records

#: Content that was sent so long ago has found its calls.
_SENT_SECONDS = 60.0
#: After a look it is not looked for so many times as long as that took: who is always refused must not keep the daemon busy.
_REST = 9.0


class Room:
    """One for all users."""

    def __init__(self, records: Records, contents: Contents, paths: Paths, clock: Clock, limits: Limits) -> None:
        self._records = records
        self._contents = contents
        self._quotas = contents.quotas
        self._folders = (paths.logs, paths.secrets)
        self._clock = clock
        self._limits = limits
        self._rest_until = 0.0

    async def wanted(self, seconds: float) -> None:
        """Wait until somebody needs some, or so long."""
        try:
            await asyncio.wait_for(self._quotas.wanted.wait(), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            return
        await asyncio.sleep(max(0.0, self._rest_until - self._clock.monotonic()))
        self._quotas.wanted.clear()

    async def make(self) -> None:
        """Forget what is old; then look who is near his limit. Raises StoreError."""
        began = self._clock.monotonic()
        try:
            await self._make(self._clock.wall())
        finally:
            self._quotas.satisfied()
            now = self._clock.monotonic()
            self._rest_until = now + (now - began) * _REST

    async def _make(self, now: float) -> None:
        await self._records.expire()
        await self._contents.forget_unused(now - self._limits.content_seconds)
        await self.measure()
        if not (excess := self._quotas.excess()):
            return
        for uid in excess:
            await self._contents.forget_unused(now - _SENT_SECONDS, uid)
        await self.measure()
        for uid, size in self._quotas.excess().items():
            await self._records.forget_oldest(uid, size)
        await self.measure()

    async def measure(self) -> None:
        """What everybody has: by the store what it knows, and files by their owner."""
        counted = self._quotas.counted()
        found: Counter[int] = Counter(await self._records.kept_bytes())
        found.update(await asyncio.to_thread(_owned_bytes, self._folders))
        self._quotas.measured(found, counted)


def _owned_bytes(folders: tuple[Path, ...]) -> dict[int, int]:
    """Logs belong to whose they are; secrets lie in folders named by them."""
    found: Counter[int] = Counter()
    for folder in folders:
        for path in folder.iterdir():
            if path.name.isdecimal():
                for file in path.iterdir():
                    found[int(path.name)] += _status(file)[1]
            else:
                owner, size = _status(path)
                found[owner] += size
    return found


def _status(path: Path) -> tuple[int, int]:
    """Owner, and bytes on the disk; nothing of what has just been forgotten."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0, 0
    return status.st_uid, status.st_blocks * 512
