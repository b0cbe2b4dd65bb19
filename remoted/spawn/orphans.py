"""The end of what a dead process has left below the daemon, where no group holds it together: found by a mark in the environment.

Who reads an environment waits for that process's memory map, which its user can hold for ever (T64). So where there are several
users only processes of the same one are looked into, apart from everybody, and not for long.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from functools import partial

from remoted.apart import Apart
from remoted.spawn import reaper

log = logging.getLogger(__name__)
_apart = Apart(deadline_seconds=5.0)
#: One look at a time: what hangs keeps its user's next ones from beginning.
_turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)


async def end_orphans(mark: str, session: int, uid: int | None, since: float = 0.0) -> None:
    """KILL what has this mark and is younger than ``since`` (seconds since boot). ``uid``: whose it is; None where the daemon has one user only."""
    if uid is None:
        await asyncio.to_thread(reaper.kill_orphans, mark, session, since)
        return
    async with _turns[uid]:
        if await _apart.do(uid, partial(reaper.kill_orphans, mark, session, since, of=uid)) is None:
            log.warning("what %s has left of uid %d is not looked for: one of its processes cannot be looked at", mark.rstrip("."), uid)
    await asyncio.to_thread(reaper.collect_strays, session)
