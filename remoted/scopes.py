"""Workers' groups as scopes of systemd's: made by ``systemd-run`` at birth, outliving the daemon, ended one by one or all at once.

systemd owns the hierarchy; what we read and the one word that we write (``cgroup.kill``) go to folders that it made. Each
scope is below ``remoted-workers.slice``: stopping the daemon's unit leaves it alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from remoted.cgroup import CONTROLLERS, Bounds, Group, end_all, mounts, own_paths

SLICE = "remoted-workers.slice"
_RUN = "/usr/bin/systemd-run"
#: org.freedesktop.systemd1(5): name, mode, properties, and no auxiliary units.
_MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_START_UNIT = ("/usr/bin/busctl", "--quiet", "call", *_MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))")
_ASK_SECONDS = 5.0
_PAUSE_SECONDS = 0.002
_MICROSECONDS = 1_000_000
#: Its own hierarchy of version 1, without a controller.
_SYSTEMD = "name=systemd"
#: A dash in a slice's name is a level (systemd.slice(5)).
_PLACE = Path("remoted.slice") / SLICE
#: At a shutdown scopes are ended when the daemon has let go of them: what runs is then lost with the host, and not "killed" one by one.
_DAEMON = "remoted.service"
_SCOPE = re.compile(r"remoted-(?P<name>[a-z0-9][a-z0-9-]{0,62})\.scope")


class Scope(Group):
    """Exists from the birth of its first process to the death of its last."""

    def __init__(self, name: str, bases: dict[Path, set[str]], bounds: Bounds, kills: _Kills) -> None:
        self._controllers = {base / f"remoted-{name}.scope": offered for base, offered in bases.items()}
        super().__init__(name, tuple(self._controllers))
        self._bounds = bounds
        self._kills = kills

    @property
    def doors(self) -> tuple[str, ...]:
        """systemd lets it in."""
        return ()

    @property
    def launcher(self) -> tuple[str, ...]:
        """Replaces itself with what is executed. No path and no variable of a user's is in it."""
        options = (f"--slice={SLICE}", f"--unit=remoted-{self.name}.scope", f"--description=remoted worker {self.name}", f"--property=Before={_DAEMON}")
        return (_RUN, "--scope", "--collect", "--quiet", *options, *_properties(self._bounds), "--")

    def take_in(self, pid: int) -> None:
        """Ask systemd for the scope around it, and wait until it is there. Raises OSError."""
        description = ("Description", "s", f"remoted worker {self.name}")
        properties = [description, ("Slice", "s", SLICE), ("CollectMode", "s", "inactive-or-failed"), ("Before", "as", "1", _DAEMON), ("PIDs", "au", "1", str(pid)), *_typed_properties(self._bounds)]
        words = [word for found in properties for word in found]
        asked = (*_START_UNIT, f"remoted-{self.name}.scope", "fail", str(len(properties)), *words, "0")
        done = subprocess.run(asked, env={"PATH": "/usr/bin:/bin"}, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
        if done.returncode:
            raise OSError(f"systemd makes no scope for worker {self.name}: {done.stderr.strip()[-300:]}")
        pause, until = threading.Event(), time.monotonic() + _ASK_SECONDS
        while pid not in self.pids():
            if time.monotonic() > until:
                raise OSError(f"systemd did not move worker {self.name} into its scope")
            pause.wait(_PAUSE_SECONDS)
        for file in map(Path, self.oom_group_files):
            if file.exists():
                file.write_text("1", encoding="ascii")

    @property
    def refusals_file(self) -> str:
        """Where it will be: it is asked for before there is anybody in the scope."""
        return next((os.fspath(folder / "pids.events") for folder, offered in self._controllers.items() if "pids" in offered), "")

    @property
    def oom_group_files(self) -> tuple[str, ...]:
        """systemd-run has no word for it before version 253, and version 1 no such file."""
        found = [folder for folder, offered in self._controllers.items() if {"", "memory"} <= offered]
        return tuple(os.fspath(folder / "memory.oom.group") for folder in found) if self._bounds.memory_bytes is not None else ()

    def memory_kills(self) -> int:
        """By its own count, else by that of all: systemd removes a scope, and its count, as soon as nobody is in it."""
        own = super().memory_kills()
        if not own and any(folder.exists() for folder in self._controllers):
            return 0
        is_new = self._kills.take()
        return own or int(is_new)

    def remove(self) -> None:
        """systemd does, when it is empty."""


class _Kills:
    """How many processes of all scopes the kernel has killed for want of memory; each new count explains one death."""

    def __init__(self, bases: Iterable[Path]) -> None:
        self._all = Group("all", tuple(bases))
        self._seen = self._all.memory_kills()

    def take(self) -> bool:
        """Is there one that explains no death yet?"""
        before, self._seen = self._seen, self._all.memory_kills()
        return self._seen > before


class Scopes:
    """All of them; stands where ``Cgroups`` stands on hosts without systemd."""

    def __init__(self) -> None:
        self._bases = {point / _PLACE: offered for point, offered in managed(mounts(), own_paths())}
        self._kills = _Kills(self._bases)
        self.device_program = -1
        self.controllers = frozenset(set().union(*self._bases.values()) & set(CONTROLLERS))

    @property
    def missing(self) -> tuple[str, ...]:
        """Controllers that systemd has not got here either: what they would have limited is not."""
        return tuple(name for name in CONTROLLERS if name not in self.controllers)

    def group(self, name: str) -> Scope:
        return self.make(name, Bounds())

    def make(self, name: str, bounds: Bounds) -> Scope:
        """Nothing is made before the first process comes."""
        scope = Scope(name, self._bases, bounds, self._kills)
        scope.device_program = self.device_program
        return scope

    def sweep(self, keep: set[str]) -> None:
        """End what earlier daemons' workers have left, but for those that are kept."""
        found = {match["name"] for base in self._bases if base.is_dir() for path in base.iterdir() if (match := _SCOPE.fullmatch(path.name))}
        end_all([self.group(name) for name in found - keep])

    def close(self) -> None:
        """The slice is systemd's."""


def is_running() -> bool:
    """Is systemd this host's init (sd_booted(3)), and can it be asked?"""
    return Path("/run/systemd/system").is_dir() and os.access(_RUN, os.X_OK)


def managed(mounted: Mapping[Path, set[str]], own: Mapping[str, str]) -> Iterator[tuple[Path, set[str]]]:
    """Where systemd makes groups, and with which controllers. Of version 1 that is where it has made our own: what a container sees and may not write in is not."""
    for point, offered in mounted.items():
        if "" in offered:
            yield point, offered | _unified_controllers(point)
        elif here := {name for name in offered if own.get(name) == own.get(_SYSTEMD)}:
            yield point, here


def _unified_controllers(point: Path) -> set[str]:
    """Those that version 2 has here, if ``point`` is of version 2."""
    file = point / "cgroup.controllers"
    return set(file.read_text(encoding="ascii").split()) if file.exists() else set()


def _properties(bounds: Bounds) -> Iterator[str]:
    if bounds.memory_bytes is not None:
        yield from ("--property", f"MemoryMax={bounds.memory_bytes}", "--property", "MemorySwapMax=0")
    if bounds.cpus is not None:
        yield from ("--property", f"CPUQuota={max(1, round(bounds.cpus * 100))}%")
    if bounds.tasks is not None:
        yield from ("--property", f"TasksMax={bounds.tasks}")


def _typed_properties(bounds: Bounds) -> Iterator[tuple[str, str, str]]:
    """The same as D-Bus has them."""
    if bounds.memory_bytes is not None:
        yield from (("MemoryMax", "t", str(bounds.memory_bytes)), ("MemorySwapMax", "t", "0"))
    if bounds.cpus is not None:
        yield ("CPUQuotaPerSecUSec", "t", str(max(_MICROSECONDS // 100, round(bounds.cpus * _MICROSECONDS))))
    if bounds.tasks is not None:
        yield ("TasksMax", "t", str(bounds.tasks))
