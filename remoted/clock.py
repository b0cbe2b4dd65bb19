"""Time as a dependency: the only module of the daemon that asks the system for it."""

from __future__ import annotations

import time
from pathlib import Path


class Clock:
    """The real clock. Deadlines use ``monotonic`` (T53: the wall clock may jump); ``wall`` is for display."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment of this boot."""
        return time.monotonic()

    def wall(self) -> float:
        """Unix seconds."""
        return time.time()

    def boottime(self) -> float:
        """Seconds since this boot, sleep included: the clock of process start times (proc(5), field 22)."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        """The kernel's id of this boot: a pid means something only together with it."""
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
