"""Before anything of the user's is called: is this process who it shall be, and nothing more?

The program that became the user has made sure of it already (``remoted/spawn/entry.py``); this looks once more from
inside, so that a launcher that is broken one day is noticed at the first worker. A mismatch ends the worker with 70.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

_NOT_BECOME = 70


def require(expected: Mapping[str, Any]) -> None:
    """Ends the process unless ids, groups, capabilities and NoNewPrivs are as expected."""
    found = _facts()
    wanted = {
        "uids": (expected["uid"],) * 3,
        "gids": (expected["gid"],) * 3,
        "groups": sorted(expected["groups"]),
        "capabilities": found["capabilities"] if expected["uid"] == 0 else 0,
        "no_new_privileges": bool(expected["no_new_privileges"]),
    }
    wrong = [f"{name} are {found[name]} and should be {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if wrong:
        sys.stderr.write(f"remoted: this worker is not who it should be: {'; '.join(wrong)}\n")
        sys.stderr.flush()
        os._exit(_NOT_BECOME)


def _facts() -> dict[str, Any]:
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        status = dict(line.rstrip("\n").split(":", 1) for line in file if ":" in line)
    return {
        "uids": os.getresuid(),
        "gids": os.getresgid(),
        "groups": sorted(os.getgroups()),
        "capabilities": int(status["CapPrm"], 16) | int(status["CapEff"], 16) | int(status["CapAmb"], 16),
        "no_new_privileges": status.get("NoNewPrivs", "").strip() == "1",
    }
