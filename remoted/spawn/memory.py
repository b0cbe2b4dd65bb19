"""Was it the kernel, for want of memory? Counters of its kills, as near to a process and to the moment as they exist.

A kill leaves no trace in the dead process itself: it is an ordinary SIGKILL. But its memory cgroup counts such kills
(v2: memory.events, v1: memory.oom_control), and so does the host. The counts are sampled every second while there are
workers, and each kill explains one death, so somebody else's want of memory is no excuse for the rest of the day. A kill
is counted a moment before its process is dead, so the last look may have seen it: the one before has not.
"""

from __future__ import annotations

import re
from pathlib import Path

_HOST = Path("/proc/vmstat")
_ROOT = Path("/sys/fs/cgroup")
_KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
SAMPLE_SECONDS = 1.0
PROBABLY = "probably the kernel was out of memory (it killed a process for that at this moment)"


class MemoryKills:
    """What was counted at the last two looks."""

    def __init__(self) -> None:
        self._before: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}

    def sample(self, pids: list[int]) -> None:
        """Look at the host and at the cgroups of these processes."""
        self._before, self._counts = self._counts, {file: _count(file) for file in {_HOST, *map(counter_of, pids)}}

    def explain(self, counter: Path) -> bool:
        """Has the kernel killed somebody there since the last look but one? One kill explains one death."""
        looks = [look for look in (self._before, self._counts) if counter in look]
        if not looks:  # it came into this cgroup after the last look
            counter = _HOST
            looks = [look for look in (self._before, self._counts) if counter in look]
        if not looks or _count(counter) <= looks[0][counter]:
            return False
        for file in {counter, _HOST}:
            for look in (self._before, self._counts):
                if file in look and look[file] < _count(file):
                    look[file] += 1
        return True


def counter_of(pid: int) -> Path:
    """The file that counts the kills in the process's own memory cgroup; the host's where that is the root or unknown."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return _HOST
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            file = _ROOT / "memory" / path.lstrip("/") / "memory.oom_control"
        elif not controllers:
            file = _ROOT / path.lstrip("/") / "memory.events"
        else:
            continue
        if path != "/" and file.exists():
            return file
    return _HOST


def _count(file: Path) -> int:
    try:
        found = _KILLS.search(file.read_text(encoding="ascii"))
    except OSError:
        return 0  # the cgroup is gone
    return int(found[1]) if found else 0
