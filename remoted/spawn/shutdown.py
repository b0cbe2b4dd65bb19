"""Does the host go down? Asked when something has failed that this would explain, and never before.

From the moment in which somebody says ``systemctl reboot`` systemd makes no scope any more, and ends fork servers, builds and
workers beside the daemon, in no order. What fails then has failed for nobody's fault: it waits for the next boot.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

#: Not is-system-running: before version 254 that says "starting" of a host that goes down before it was up. Root is answered without D-Bus.
_ASK = ("/usr/bin/systemctl", "show", "--property=Job,ActiveState", "shutdown.target")
_SECONDS = 5.0


async def is_under_way() -> bool:
    """Is systemd this host's init, and does it shut down, or wait for that?"""
    return Path("/run/systemd/system").is_dir() and await asyncio.to_thread(_ask)


def _ask() -> bool:
    try:
        done = subprocess.run(_ASK, env={"PATH": "/usr/bin:/bin"}, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return says_so(done.stdout)


def says_so(text: str) -> bool:
    """A job of the target's is to start it, for nothing stops it."""
    found = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return found.get("Job", "") not in ("", "0") or found.get("ActiveState", "") == "active"
