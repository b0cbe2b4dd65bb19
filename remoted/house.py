"""The rules of a daemon's house: whom it serves and as whom it runs what they bring. A user's own, or the system's.

The system's daemon is root, so before it reads or imports anything else it makes sure that what it reads is root's.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from remoted.access import Access, Identity
from remoted.accounts import Accounts
from remoted.config import Config
from remoted.errors import StartupError
from remoted.spawn.becoming import Becoming
from remoted.trust import require_trusted

_PR_SET_DUMPABLE = 4


@dataclass(frozen=True, slots=True)
class House:
    """``mode``: the word for it in answers."""

    mode: str
    access: Access
    accounts: Accounts
    no_new_privileges: bool = True

    @property
    def is_shared(self) -> bool:
        return self.access.serves_everybody

    def become(self, identity: Identity) -> Becoming:
        """How a process is started as somebody else here."""
        return Becoming(identity, self.no_new_privileges)


def own() -> House:
    """A user's own daemon: everything in it is that user's."""
    return House("user", Access(os.geteuid()), Accounts())


def system(config: Config) -> House:
    """Everybody's daemon; it becomes its callers to run what they bring."""
    access = Access(os.geteuid(), serves_everybody=True, runs_root=config.users.allow_root)
    return House("system", access, Accounts(everybody=config.users.allow_unknown_uids), config.workers.no_new_privileges)


def prepare(config: Path) -> None:
    """Of a process that serves everybody: root, traced by nobody, leaving no core, reading only what is root's. Raises StartupError."""
    if os.geteuid() != 0:
        raise StartupError("cannot serve everybody: only root can become other users; `remoted --user` starts a daemon of your own")
    require_trusted([sys.executable, config, *(entry for entry in sys.path if entry)])
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # no other uid may trace it anyway; no core is written either (T41)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir("/")
    os.umask(0o077)
