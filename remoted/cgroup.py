"""A control group for each worker: what it may use, what it ran into, and the end of every process in it at once.

Groups are made below the daemon's own place: in the unified hierarchy, and in those of version 1 for the controllers
that are still there. ``cgroup.kill`` (Linux 5.14) needs the unified one only, which hybrid hosts have too. A controller
that is nowhere is said in ``missing``, and what it would have limited is not. Blocking, and quick but for ``end_all``.

Called by the engine for workers and by stewards' keeper for builds; only names made by the daemon become paths here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from remoted import bpf

log = logging.getLogger(__name__)
CONTROLLERS = ("memory", "pids", "cpu")
#: Where the kernel says what a controller allows, in both versions.
_ALLOWED = {"memory": ("memory.max", "memory.limit_in_bytes"), "pids": ("pids.max",), "cpu": ("cpu.max", "cpu.cfs_quota_us")}
#: Version 1 has no word for no limit of memory, only what no host has.
_MORE_THAN_ANY = 1 << 60
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_PERIOD_MICROSECONDS = 100_000
#: The leaf for the daemon itself: version 2 allows no process beside groups.
_OWN_LEAF = "daemon"
_KILL_SECONDS = 4.0
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 0.25
_FREEZE_ROUNDS = 1000
_FREEZE_PAUSE_SECONDS = 0.001


class NotStill(OSError):
    """Somebody in the group is in a system call that nothing interrupts."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the processes of a group may use together; None is what the host has."""

    memory_bytes: int | None = None
    cpus: float | None = None
    tasks: int | None = None

    def settings(self) -> Iterator[tuple[str, str]]:
        """File and content, of both versions; memory before memory and swap, which must not be less."""
        if self.memory_bytes is not None:
            yield from (("memory.max", str(self.memory_bytes)), ("memory.swap.max", "0"), ("memory.oom.group", "1"))
            yield from (("memory.limit_in_bytes", str(self.memory_bytes)), ("memory.memsw.limit_in_bytes", str(self.memory_bytes)))
        if self.cpus is not None:
            quota = max(1000, int(self.cpus * _PERIOD_MICROSECONDS))
            yield from (("cpu.max", f"{quota} {_PERIOD_MICROSECONDS}"), ("cpu.cfs_period_us", str(_PERIOD_MICROSECONDS)), ("cpu.cfs_quota_us", str(quota)))
        if self.tasks is not None:
            yield ("pids.max", str(self.tasks))


class Group:
    """One group: a folder in each hierarchy that takes part."""

    def __init__(self, name: str, folders: tuple[Path, ...]) -> None:
        self.name = name
        #: The program that decides what is opened inside; -1 if nobody does.
        self.device_program = -1
        self._folders = folders

    @property
    def doors(self) -> tuple[str, ...]:
        """The files through which a process enters."""
        return tuple(os.fspath(folder / "cgroup.procs") for folder in self._folders)

    @property
    def launcher(self) -> tuple[str, ...]:
        """The program, if any, by which its first process is started."""
        return ()

    @property
    def oom_group_files(self) -> tuple[str, ...]:
        """What its first process has to set, still as root, so that want of memory ends all of it and not one process: ``make`` does."""
        return ()

    def make(self, bounds: Bounds) -> None:
        """Raises OSError."""
        for folder in self._folders:
            _make(folder)
        for name, value in bounds.settings():
            for folder in self._folders:
                if (folder / name).exists():
                    _write(folder / name, value)

    def unbounded(self, bounds: Bounds) -> frozenset[str]:
        """The controllers that should bound those inside and do not: by what the kernel has here, not by what it was asked for."""
        asked = {name.partition(".")[0] for name, _ in bounds.settings()} if self.pids() else set()
        return frozenset(name for name in asked if not any(_is_bound(_read(folder / file)) for folder in self._folders for file in _ALLOWED[name]))

    def take_in(self, pid: int) -> None:
        """Move a process here. Raises OSError. The caller makes sure that the number cannot become somebody else's meanwhile."""
        for door in self.doors:
            _write(Path(door), str(pid))

    @property
    def device_rules(self) -> tuple[str, int] | None:
        """Where the program is attached, and its descriptor."""
        point = unified()
        if self.device_program < 0 or point is None:
            return None
        return next(((os.fspath(folder), self.device_program) for folder in self._folders if folder.is_relative_to(point)), None)

    def keep_rules(self) -> None:
        """Attach it. Raises OSError."""
        if rules := self.device_rules:
            bpf.attach_to_group(Path(rules[0]), rules[1])

    @property
    def can_freeze(self) -> bool:
        """Can everybody in it be held still (cgroup.freeze, Linux 5.2)?"""
        return any((folder / "cgroup.freeze").exists() for folder in self._folders)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Nobody inside runs while the block does: not even to wait for a child, whose number stays its own. Raises OSError."""
        [folder] = [folder for folder in self._folders if (folder / "cgroup.freeze").exists()]
        _write(folder / "cgroup.freeze", "1")
        try:
            _await_frozen(folder)
            yield
        finally:
            _write(folder / "cgroup.freeze", "0")

    def pids(self) -> list[int]:
        """Everybody inside at this moment."""
        found: set[int] = set()
        for folder in self._folders:
            with contextlib.suppress(OSError):
                found.update(map(int, (folder / "cgroup.procs").read_text(encoding="ascii").split()))
        return sorted(found)

    def kill(self) -> bool:
        """KILL everybody inside; True if nobody was. Quick: who waits for their end is ``end``, or ``end_all``."""
        if not self._is_populated():
            return True
        self._kill_once()
        return False

    async def end(self) -> bool:
        """Everybody inside dies; False if somebody cannot yet (a driver or a file system holds him). No thread waits for that: those of the loop are everybody's."""
        for pause in _pauses():
            if await asyncio.to_thread(self.kill):
                return True
            await asyncio.sleep(pause)
        return await asyncio.to_thread(self.kill)

    def _kill_once(self) -> None:
        for folder in self._folders:
            if (folder / "cgroup.kill").exists():
                _write(folder / "cgroup.kill", "1")  # atomic: nobody forks past it
                return
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_populated(self) -> bool:
        """By the kernel's own word where there is one: the dead who are not reaped do not count."""
        for folder in self._folders:
            if (text := _read(folder / "cgroup.events")) and "populated 0" not in text:
                return True
        return bool(self.pids())

    @property
    def refusals_file(self) -> str:
        """Counts how often a process or thread was not made because of the limit; "" if nobody counts."""
        return next((os.fspath(folder / "pids.events") for folder in self._folders if (folder / "pids.events").exists()), "")

    def refusals(self) -> int:
        """How often that was."""
        return self._count("pids.events", "max")

    def tasks(self) -> int:
        """How many processes and threads are in it now; 0 if nobody counts."""
        return next((int(text) for folder in self._folders if (text := _read(folder / "pids.current"))), 0)

    def memory_kills(self) -> int:
        """How many processes of it the kernel has killed for want of memory."""
        return self._count("memory.events", "oom_kill") or self._count("memory.oom_control", "oom_kill")

    def watch_memory(self) -> int:
        """A descriptor that can be read once memory is wanting here or above: version 1 then kills one process and not all. -1 where nobody has to look."""
        for folder in self._folders:
            if (folder / "memory.oom_control").exists() and (folder / "cgroup.event_control").exists():
                return _register(folder / "memory.oom_control", folder / "cgroup.event_control")
        return -1

    def _count(self, name: str, word: str) -> int:
        for folder in self._folders:
            for line in _read(folder / name).splitlines():
                if line.startswith(f"{word} "):
                    return int(line.split()[1])
        return 0

    def remove(self) -> None:
        """Of an empty group; one that is not stays."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


class Groups(Protocol):
    """Where groups come from: here, or from systemd (``remoted.scopes``)."""

    #: Decides which devices are opened in every group that is made; -1 if nothing does.
    device_program: int

    @property
    def controllers(self) -> frozenset[str]: ...
    @property
    def missing(self) -> tuple[str, ...]: ...
    def group(self, name: str) -> Group: ...
    def make(self, name: str, bounds: Bounds) -> Group: ...
    def sweep(self, keep: set[str]) -> None: ...
    def close(self) -> None: ...


class Cgroups:
    """The daemon's own place in the hierarchies."""

    def __init__(self, bases: tuple[Path, ...], controllers: frozenset[str]) -> None:
        self._bases = bases
        self.controllers = controllers
        self.device_program = -1

    @property
    def missing(self) -> tuple[str, ...]:
        """Controllers that nothing can be limited by here."""
        return tuple(name for name in CONTROLLERS if name not in self.controllers)

    def group(self, name: str) -> Group:
        if not _NAME.fullmatch(name):
            raise ValueError(f"cannot use {name[:80]!r} as the name of a group")
        return Group(name, tuple(base / name for base in self._bases))

    def make(self, name: str, bounds: Bounds) -> Group:
        """A new group. Raises OSError."""
        group = self.group(name)
        group.device_program = self.device_program
        group.make(bounds)
        return group

    def sweep(self, keep: set[str]) -> None:
        """End what earlier daemons' workers have left, but for those that are kept."""
        found = {path.name for base in self._bases for path in base.iterdir() if path.is_dir()}
        end_all([self.group(name) for name in found - keep if _NAME.fullmatch(name)])

    def close(self) -> None:
        """The place itself, if nobody is left in it."""
        for base in self._bases:
            with contextlib.suppress(OSError):
                base.rmdir()


def end_all(groups: Iterable[Group]) -> None:
    """Everybody in them dies, all at once, and the empty ones go; blocking. Who cannot die costs one wait, not one each: the next daemon starts behind it."""
    left = list(groups)
    pause = threading.Event()
    for seconds in _pauses():
        for group in [group for group in left if group.kill()]:
            left.remove(group)
            group.remove()
        if not left:
            return
        pause.wait(seconds)
    log.error("processes in %s do not die", ", ".join(group.name for group in left))


def _pauses() -> Iterator[float]:
    """Short ones first: most are dead at the second look."""
    pause, waited = _PAUSE_SECONDS, 0.0
    while waited < _KILL_SECONDS:
        yield pause
        waited += pause
        pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.3)


def find(name: str, total: Bounds) -> Cgroups | None:
    """A place called ``name`` below our own, with what all workers may use together; None where nothing can be made."""
    bases: list[Path] = []
    controllers: set[str] = set()
    for parent, offered in _hierarchies():
        base = parent / name
        try:
            _make(base)
            usable = _enable(parent, base) if "" in offered else offered
        except OSError:
            continue
        bases.append(base)
        controllers |= usable & set(CONTROLLERS)
    if not bases:
        return None
    with contextlib.suppress(OSError):  # a limit of all is a second line; each worker has its own
        Group(name, tuple(bases)).make(total)
    return Cgroups(tuple(bases), frozenset(controllers))


def _hierarchies() -> Iterator[tuple[Path, set[str]]]:
    """(our own folder, controllers); the unified one, marked by "", comes first."""
    own = own_paths()
    for point, offered in mounts().items():
        yield _below(point, next((path for name, path in own.items() if name in offered), "/")), offered


@lru_cache(maxsize=1)
def unified() -> Path | None:
    """Where the unified hierarchy is mounted, if it is."""
    return next((point for point, offered in mounts().items() if "" in offered), None)


def own_folder() -> Path | None:
    """Our own group in the unified hierarchy."""
    return next((folder for folder, offered in _hierarchies() if "" in offered), None)


def own_paths() -> dict[str, str]:
    """Our own group by controller; "" is the unified hierarchy."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, names, path = line.split(":", 2)
        found |= dict.fromkeys(names.split(","), path)
    return found


def mounts() -> dict[Path, set[str]]:
    """Where hierarchies are mounted, and their controllers; the unified one, marked by "", comes first."""
    lines = [line.split(" ") for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    found: dict[Path, set[str]] = {}
    for _, point, kind, options, *_ in sorted(lines, key=lambda mount: mount[2] != "cgroup2"):
        offered = {""} if kind == "cgroup2" else set(options.split(",")) & set(CONTROLLERS)
        if kind in ("cgroup", "cgroup2") and offered:
            found[Path(point)] = offered
    return found


def _below(point: Path, path: str) -> Path:
    """In a container our own path may be that of another namespace: then the top is ours."""
    folder = point / path.lstrip("/")
    return folder if folder.is_dir() else point


def _enable(parent: Path, base: Path) -> set[str]:
    """Hand the controllers of version 2 down to the groups below ``base``; which of them arrived."""
    offered = set(_read(parent / "cgroup.controllers").split()) & set(CONTROLLERS)
    if offered:
        _make_room(parent)
    for folder in (parent, base):
        for controller in sorted(offered):
            with contextlib.suppress(OSError):
                _write(folder / "cgroup.subtree_control", f"+{controller}")
    return set(_read(base / "cgroup.subtree_control").split())


def _make_room(parent: Path) -> None:
    """Version 2 hands controllers down only where no process sits; alone in our group, we can move into a leaf."""
    if (parent / "cgroup.type").exists() and _read(parent / "cgroup.procs").split() == [str(os.getpid())]:
        leaf = parent / _OWN_LEAF
        with contextlib.suppress(OSError):
            leaf.mkdir(exist_ok=True)
            _write(leaf / "cgroup.procs", str(os.getpid()))


def _register(control: Path, door: Path) -> int:
    """As version 1 tells of events. Raises OSError."""
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        fd = os.open(control, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _write(door, f"{event} {fd}")
        finally:
            os.close(fd)
    except OSError:
        os.close(event)
        raise
    return event


def _await_frozen(folder: Path) -> None:
    """Whoever is in a system call that cannot be interrupted is waited for."""
    pause = threading.Event()
    for _ in range(_FREEZE_ROUNDS):
        if "frozen 1" in _read(folder / "cgroup.events"):
            return
        pause.wait(_FREEZE_PAUSE_SECONDS)
    raise NotStill(f"its processes in {folder.name} do not hold still")


def _is_bound(text: str) -> bool:
    """Is there a number, and one that means something?"""
    word = text.partition(" ")[0].strip()
    return word not in ("", "max", "-1") and int(word) < _MORE_THAN_ANY


def _make(folder: Path) -> None:
    """Readable by everybody, whatever our umask: programs look up what their own group may use."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        if error.errno != errno.ENODEV:  # the group has gone
            raise
    finally:
        os.close(fd)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
