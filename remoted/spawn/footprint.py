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
from pathlib import Path

_HUGE_BYTES = 4 << 30
#: A status must answer within 100 ms; whoever comes later than this goes without.
_PATIENCE_SECONDS = 0.04


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. ``shared``: copy-on-write with a fork server and its other workers; ``private``: freed if it ended."""

    resident: int
    shared: int
    private: int


def measure(pids: Iterable[int]) -> dict[int, Footprint]:
    """Of as many as can be read in a moment. Blocks for that long."""
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
