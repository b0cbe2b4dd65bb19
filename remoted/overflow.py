"""Who fills the daemon's disk through the files that are for when no daemon is there (``spool``) is ended (T44).

They cannot be limited: a descriptor of a file has no quota, and RLIMIT_FSIZE would meet the body's own files. But while a daemon is there
nothing honest is written into them, and without one no more than 64 MiB of output and the outcomes.
"""

from __future__ import annotations

import asyncio

from remoted.engine import Engine
from remoted.workers import Worker

_LOOK_SECONDS = 1.0
_IDLE_BYTES = 1 << 20
WHY = "it wrote into the files in which workers leave their outcomes when no daemon is there"


async def watch(engine: Engine) -> None:
    """For as long as the daemon lives."""
    ending: dict[Worker, asyncio.Task[None]] = {}
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        ending = {worker: task for worker, task in ending.items() if not task.done()}
        for worker in list(engine.workers.values()):
            if worker not in ending and engine.spool.taken_bytes(worker.id) > _IDLE_BYTES:
                ending[worker] = engine.spawn(worker.end(WHY, grace_seconds=0.0))
