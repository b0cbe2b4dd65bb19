"""What a process holds in memory, and how much of it costs nothing because it is another's as well.

Forked processes share the pages of their fork server until one of them writes (copy-on-write). ``smaps_rollup`` (proc(5))
counts such pages as shared and dirty: pages of a file that nobody has changed are clean, and the runtime maps no memory
with others that it writes. To read it the kernel walks the process's page tables, so a huge one is not asked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from remoted.apart import Apart

_HUGE_BYTES = 4 << 30
#: A status must answer within 100 ms; whoever comes later than this goes without.
_PATIENCE_SECONDS = 0.04
_DEADLINE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. ``shared``: copy-on-write with a fork server and its other workers; ``private``: freed if it ended."""

    resident: int
    shared: int
    private: int


class Footprints:
    """What is known of each user's processes in a moment: they can make who asks for it wait (``apart``)."""

    def __init__(self) -> None:
        self._apart = Apart(_DEADLINE_SECONDS)

    async def of(self, uid: int, pids: Iterable[int]) -> dict[int, Footprint]:
        """Of as many as can be read in a moment."""
        return await self._apart.do(uid, partial(_measure_all, list(pids))) or {}


def _measure_all(pids: Iterable[int]) -> dict[int, Footprint]:
    until = time.monotonic() + _PATIENCE_SECONDS
    found = {}
    for pid in pids:
        if time.monotonic() > until:
            break
        footprint = _measure(pid)
        if footprint is not None:
            found[pid] = footprint
    return found


def _measure(pid: int) -> Footprint | None:
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > _HUGE_BYTES:
            return None
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        counts = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        return Footprint(counts["Rss"], counts["Shared_Dirty"], counts["Private_Clean"] + counts["Private_Dirty"])
    except (OSError, KeyError, ValueError, IndexError):
        return None
