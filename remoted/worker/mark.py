"""The mark of a worker in the environment that its process was started with.

The daemon finds a worker's stray processes by a variable in ``/proc/PID/environ``, and that file shows the memory of the
last exec, whatever ``os.environ`` says since. A forked worker would show its fork server's mark, and so would every child
that it forks. So the fork server is started with room, and each worker writes its own name there.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

#: Behind the name in brackets, which may hold spaces: fields 50 and 51 of proc(5).
_ENV_START, _ENV_END = 47, 48


class Mark:
    """Where the value of one variable stands in memory."""

    def __init__(self, name: str) -> None:
        """Raises LookupError when the variable is not there."""
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
        start, end = int(fields[_ENV_START]), int(fields[_ENV_END])
        block = b"\0" + (ctypes.string_at(start, end - start) if 0 < start < end else b"")
        wanted = f"\0{name}=".encode()
        found = block.find(wanted)
        if found < 0:
            raise LookupError(f"{name} is not in the environment that this process was started with")
        self._address = start + found + len(wanted) - 1
        self._room = block.index(b"\0", found + len(wanted)) - found - len(wanted)

    def write(self, value: str) -> None:
        """From now on the value is this one. Raises ValueError when it does not fit."""
        data = value.encode()
        if len(data) > self._room:
            raise ValueError(f"a mark of {len(data)} bytes does not fit into {self._room}")
        ctypes.memmove(self._address, data.ljust(self._room, b"\0"), self._room)
