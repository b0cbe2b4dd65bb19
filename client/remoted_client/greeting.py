"""What a client says first on a connection."""

from __future__ import annotations

import functools
import sys

from remoted_client import wire


def hello(name: str) -> bytes:
    """``name``: what the process calls itself to its other connections; "" on those. It may hear of a call's end alone that it was accepted."""
    header = {"op": "hello", "protocol": wire.PROTOCOL, "python": list(sys.version_info[:3]), "started": _start_ticks(), "client": name, "folds": True}
    return wire.encode(header)


@functools.cache
def _start_ticks() -> int:
    """When this process began, in clock ticks since boot (proc(5) field 22): with the pid it is unmistakable."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        return int(file.read().rsplit(")", 1)[1].split()[19])
