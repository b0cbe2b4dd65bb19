"""How a program is started as somebody else: what the daemon executes (``entry``), and the orders that it hands over.

The daemon itself never names a user's path to the kernel: its ``execve`` is of its own interpreter, with an empty
environment, in ``/``. So nothing that a user can prepare (a folder that hangs, an interpreter behind a FUSE mount, a
variable of the loader) acts on a process of root's (MECHANISMS 1).
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from remoted.access import Identity
from remoted.cgroup import Group
from remoted_client import wire

_ENTRY = os.fspath(Path(__file__).with_name("entry.py"))
#: -I: no variable and no folder of the caller's is looked at; -S: no site folder either; -B: root writes nothing there.
_PYTHON = (sys.executable, "-I", "-S", "-B")
_UMASK = 0o022
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
#: A core of a body would hold what its caller sent (T25).
_NO_CORE = (resource.RLIMIT_CORE, 0, 0)


@dataclass(frozen=True, slots=True)
class Becoming:
    """Who a process shall be and what it shall not be able to do."""

    identity: Identity
    no_new_privileges: bool = True
    #: ``cgroup.procs`` files that it enters while it is still root.
    cgroups: tuple[str, ...] = ()
    #: ``memory.oom.group`` files that it sets then, where they are: want of memory ends the whole group.
    oom_groups: tuple[str, ...] = ()
    #: A group's folder and the descriptor of the program that says which devices are opened in it: attached by root too.
    device_rules: tuple[str, int] | None = None
    #: A program that executes the rest of its command line, in a place that it makes for it.
    launcher: tuple[str, ...] = ()

    def inside(self, group: Group | None) -> Becoming:
        """The same in a group of its own."""
        if group is None:
            return replace(self, cgroups=(), oom_groups=(), launcher=(), device_rules=None)
        return replace(self, cgroups=group.doors, oom_groups=group.oom_group_files, launcher=group.launcher, device_rules=group.device_rules)


def command(becoming: Becoming, argv: tuple[str, ...], environ: Mapping[str, str], keep: tuple[int, ...]) -> tuple[tuple[str, ...], int]:
    """(what to execute, the descriptor of the orders). The descriptor is the caller's to close."""
    identity = becoming.identity
    orders = {
        "uid": identity.uid,
        "gid": identity.gid,
        "groups": list(identity.groups),
        "no_new_privileges": becoming.no_new_privileges,
        "cgroups": list(becoming.cgroups),
        "oom_groups": list(becoming.oom_groups),
        "device_rules": becoming.device_rules,
        "limits": [_NO_CORE, *identity.limits],
        "keep": list(keep),
        "umask": _UMASK,
        "cwd": "/",
        "argv": list(argv),
        "environ": dict(environ),
    }
    fd = wire.memfd("remoted-orders", json.dumps(orders).encode())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return (*becoming.launcher, *_PYTHON, _ENTRY, str(fd)), fd
