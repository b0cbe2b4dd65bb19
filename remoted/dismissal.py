"""The end of many workers when the daemon ends: at once, and not for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from remoted.workers import Worker

log = logging.getLogger(__name__)
#: A worker has a second to leave; a body that listens to nothing is dead moments after KILL.
_SECONDS = 5.0


async def end_workers(workers: Iterable[Worker]) -> None:
    """Who runs something is killed. Who cannot die (a driver or a file system holds him) is left to the next daemon, which sweeps his group: nobody can put off an administrator's restart."""
    ending = {asyncio.ensure_future(worker.end("the daemon stops", grace_seconds=0.0 if worker.has_attempts else 1.0)): worker for worker in workers}
    if not ending:
        return
    done, late = await asyncio.wait(ending, timeout=_SECONDS)
    for task in late:
        log.error("worker %s (pid %d) does not die: it is left", ending[task].id, ending[task].pid)
        task.cancel()
    for task in done:
        if (error := task.exception()) is not None:
            log.error("cannot end worker %s", ending[task].id, exc_info=error)
