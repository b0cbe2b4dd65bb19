"""Workers' groups as scopes of systemd's: made by ``systemd-run`` at birth, outliving the daemon, ended one by one or all at once.

systemd owns the hierarchy; what we read and the one word that we write (``cgroup.kill``) go to folders that it made. Each
scope is below ``remoted-workers.slice``: stopping the daemon's unit leaves it alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from remoted.cgroup import CONTROLLERS, Bounds, Group, mounts

SLICE = "remoted-workers.slice"
_RUN = "/usr/bin/systemd-run"
#: A dash in a slice's name is a level (systemd.slice(5)).
_PLACE = Path("remoted.slice") / SLICE
_SCOPE = re.compile(r"remoted-(?P<name>[a-z0-9][a-z0-9-]{0,62})\.scope")


class Scope(Group):
    """Exists from the birth of its first process to the death of its last."""

    def __init__(self, name: str, folders: tuple[Path, ...], bounds: Bounds) -> None:
        super().__init__(name, folders)
        self._bounds = bounds

    @property
    def doors(self) -> tuple[str, ...]:
        """systemd lets it in."""
        return ()

    @property
    def launcher(self) -> tuple[str, ...]:
        """Replaces itself with what is executed. No path and no variable of a user's is in it."""
        options = (f"--slice={SLICE}", f"--unit=remoted-{self.name}.scope", f"--description=remoted worker {self.name}")
        return (_RUN, "--scope", "--collect", "--quiet", *options, *_properties(self._bounds), "--")

    def remove(self) -> None:
        """systemd does, when it is empty."""


class Scopes:
    """All of them; stands where ``Cgroups`` stands on hosts without systemd."""

    def __init__(self) -> None:
        found = mounts()
        self._bases = tuple(point / _PLACE for point in found)
        unified = Path("/sys/fs/cgroup/cgroup.controllers")
        offered = set(unified.read_text(encoding="ascii").split()) if unified.exists() else set().union(*found.values())
        self.controllers = frozenset(offered & set(CONTROLLERS))

    @property
    def missing(self) -> tuple[str, ...]:
        """Controllers that systemd has not got either: what they would have limited is not."""
        return tuple(name for name in CONTROLLERS if name not in self.controllers)

    def group(self, name: str) -> Scope:
        return self.make(name, Bounds())

    def make(self, name: str, bounds: Bounds) -> Scope:
        """Nothing is made before the first process comes."""
        return Scope(name, tuple(base / f"remoted-{name}.scope" for base in self._bases), bounds)

    def sweep(self, keep: set[str]) -> None:
        """End what earlier daemons' workers have left, but for those that are kept."""
        found = {match["name"] for base in self._bases if base.is_dir() for path in base.iterdir() if (match := _SCOPE.fullmatch(path.name))}
        for name in found - keep:
            self.group(name).kill()

    def close(self) -> None:
        """The slice is systemd's."""


def is_running() -> bool:
    """Is systemd this host's init (sd_booted(3)), and can it be asked?"""
    return Path("/run/systemd/system").is_dir() and os.access(_RUN, os.X_OK)


def _properties(bounds: Bounds) -> Iterator[str]:
    if bounds.memory_bytes is not None:
        yield from ("--property", f"MemoryMax={bounds.memory_bytes}", "--property", "MemorySwapMax=0")
    if bounds.cpus is not None:
        yield from ("--property", f"CPUQuota={max(1, round(bounds.cpus * 100))}%")
    if bounds.tasks is not None:
        yield from ("--property", f"TasksMax={bounds.tasks}")
