"""Everything that a worker has started, and the worker: found and ended together (MECHANISMS 5).

In a cgroup nobody gets out of it and one word ends all. Without one daemon and worker are subreapers, and the family is
found by walking: what cleared its environment and left the session is known only if it was seen before.

Between two calls nothing is ended: pools and engines of warm instances live. After a stop that the worker survives
whatever is younger than the attempt ends; when the worker ends, everything does, before anybody hears of it (promise 9).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Mapping

import psutil

from remoted.cgroup import Bounds, Group, Groups
from remoted.spawn import reaper
from remoted.spawn.orphans import end_orphans

log = logging.getLogger(__name__)
_ROUNDS = 20
#: Want of memory is told before somebody is killed for it; if nobody is by then, there was some after all.
_KILL_ROUNDS = 200
_PAUSE_SECONDS = 0.01
#: Nobody can be a child of process 0: what has no marks of a worker's is found by its group alone.
_NO_SESSION = 0


class Family:
    """``name``: the worker's id. ``group`` is made before the worker is, where there are groups."""

    def __init__(self, name: str, group: Group | None = None, bounds: Bounds | None = None, uid: int | None = None) -> None:
        """``uid``: whose it is, where the daemon serves several."""
        self.name = name
        self._uid = uid
        self.pid = _NO_SESSION
        self.group = group
        self._bounds = bounds or Bounds()
        #: What hung below the worker when it was last signalled.
        self._seen: list[psutil.Process] = []
        self._memory_event = -1
        self._looking: asyncio.Task[None] | None = None

    @property
    def bounds(self) -> Bounds:
        """What it may use together, where there are groups."""
        return self._bounds

    @property
    def has_group(self) -> bool:
        return self.group is not None

    @property
    def refusals_file(self) -> str:
        """What counts the processes and threads that were not made for want of permission; "" if nobody counts."""
        return self.group.refusals_file if self.group and self._bounds.tasks else ""

    def pids(self) -> set[int]:
        """Everybody of it at this moment."""
        if self.group is not None:
            return set(self.group.pids())
        return {self.pid, *(process.pid for process in reaper.descendants(self.pid))} if self.pid else set()

    def count_older(self, than: float, children: Mapping[int, list[int]]) -> int:
        """How many of it live beside the worker that began before then (seconds since boot). ``children``: a look at the host."""
        if not self.pid:
            return 0
        pids = self.group.pids() if self.group is not None else reaper.tree(self.pid, children)
        began = [reaper.living_since(pid) for pid in pids if pid != self.pid]
        return sum(moment is not None and moment < than for moment in began)

    @property
    def is_full(self) -> bool:
        """Was it refused a process or thread, and is more than half of what it may have still there? Blocking, and quick."""
        most = self._bounds.tasks
        return self.group is not None and bool(most) and self.group.refusals() > 0 and self.group.tasks() * 2 > (most or 0)

    def begin(self, pid: int) -> None:
        """Its worker is there. From now on all of it ends where the kernel ends one process of it for want of memory; version 2 sees to that itself."""
        self.pid = pid
        if self.group is None:
            return
        try:
            self._memory_event = self.group.watch_memory()
        except OSError as error:
            log.warning("worker %s: for want of memory one process of it may end alone: %s", self.name, error)
        if self._memory_event >= 0:
            asyncio.get_running_loop().add_reader(self._memory_event, self._memory_wants)
            if self.group.memory_kills():  # while no daemon was there
                self._looking = asyncio.get_running_loop().create_task(self._end_after_kill())

    def _memory_wants(self) -> None:
        os.eventfd_read(self._memory_event)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._end_after_kill())

    async def _end_after_kill(self) -> None:
        for _ in range(_KILL_ROUNDS):
            if self.group is None or self._memory_event < 0:
                return
            if self.group.memory_kills():
                await self.end()
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    async def look(self) -> None:
        """Before the worker is signalled: its orphans are not found later."""
        if self.group is None and self.pid:
            self._seen += await asyncio.to_thread(reaper.descendants, self.pid)

    async def end_younger(self, since: float) -> None:
        """The worker survived a stop; what was started since then (seconds since boot) does not."""
        if self.group is not None:
            await asyncio.to_thread(self._end_younger_in, self.group, since)
        else:
            await asyncio.to_thread(reaper.kill_descendants, self.pid, since)
        await self._end_orphans(since)

    def _end_younger_in(self, group: Group, since: float) -> None:
        """The worker itself is older than any of its attempts."""
        pause = threading.Event()
        for _ in range(_ROUNDS):
            young = [pid for pid in group.pids() if pid != self.pid and reaper.started_at(pid) >= since]
            if not young:
                return
            for pid in young:
                _kill(pid, since)
            pause.wait(_PAUSE_SECONDS)

    async def end(self) -> None:
        """The worker is to die at once, and whatever hangs on it first."""
        if self.group is not None:
            await self.group.end()
        else:
            await asyncio.to_thread(reaper.kill_descendants, self.pid)

    async def bury(self) -> None:
        """The worker is dead and reaped: so is everybody else when this returns."""
        if self.group is not None and not await self.group.end():
            log.error("processes of worker %s do not die: %s", self.name, self.group.pids())
        await self._end_orphans()
        if self._seen:
            await asyncio.to_thread(reaper.kill_all, self._seen)
        self.forget()

    async def _end_orphans(self, since: float = 0.0) -> None:
        """Nobody leaves a group, so there the dead are collected and no environment is read: of others' workers it can last for ever."""
        if self.group is not None:
            await asyncio.to_thread(reaper.collect_strays, self.pid)
        else:
            await end_orphans(self.name, self.pid, self._uid, since)

    def forget(self) -> None:
        """Nothing of it lives: its group goes."""
        if self._memory_event >= 0:
            asyncio.get_running_loop().remove_reader(self._memory_event)
            os.close(self._memory_event)
            self._memory_event = -1
        if self.group is not None:
            self.group.remove()

    def explain_kill(self) -> str:
        """Why the kernel killed its worker, if it was for the memory of its group."""
        if self.group is None or not self.group.memory_kills():
            return ""
        limit = self._bounds.memory_bytes
        size = f"{limit / (1 << 30):.3g} GiB" if limit else "they may use"
        return f"its processes needed more memory than {size} (memory_gb of its config, else worker_memory_bytes of [limits])"


def count_leftovers(asked: list[tuple[Family, float]]) -> dict[str, int]:
    """By worker: what lives of its family and is older than the moment beside it. One look for all; blocking."""
    children = reaper.children_by_parent() if any(not family.has_group for family, _ in asked) else {}
    return {family.name: family.count_older(than, children) for family, than in asked}


def adopted(name: str, pid: int, groups: Groups | None, uid: int | None, bounds: Bounds | None = None) -> Family:
    """That of a worker of the last daemon's."""
    family = Family(name, groups.group(name) if groups is not None else None, bounds, uid)
    family.begin(pid)
    return family


def _kill(pid: int, since: float) -> None:
    """By pidfd, after a second look: the number may be somebody else's by now (T07)."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if reaper.started_at(pid) >= since:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
