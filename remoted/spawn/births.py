"""How a worker is born: forked from a fork server where that can be, else as a new interpreter, and then with the reason.

A start by fork takes milliseconds and shares what the server has imported; a plain start always works. So the servers here
are a convenience: whatever goes wrong with one is a reason to show and never a failed job.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from remoted import channel
from remoted.cgroup import Bounds, Group, Groups
from remoted.clock import Clock
from remoted.limits import Limits
from remoted.spawn import launch, reaper
from remoted.spawn.becoming import Becoming
from remoted.spawn.forkserver import ForkRefused, ForkServer, Recipe

log = logging.getLogger(__name__)
#: Another value in each worker: set after the fork, before anything has read it.
_OF_ONE_WORKER = frozenset({reaper.WORKER_VARIABLE, "CUDA_VISIBLE_DEVICES"})
#: What an interpreter reads while it starts. Without modules to import nothing else matters to a server, and pools with
#: other variables (``env=``) can share it.
_READ_AT_START = frozenset({"HOME", "LANG", "LANGUAGE", "TZ"})
_READ_AT_START_PREFIXES = ("PYTHON", "LD_", "LC_", "MALLOC_", "GLIBC_")


@dataclass(frozen=True, slots=True)
class Start:
    """A worker that is to be: whose, with which interpreter and variables, and what it will import anyway."""

    uid: int
    python: str
    environ: Mapping[str, str]
    preload: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    #: What an import may read beyond ``environ``: the server's, never the worker's, who gets its own with each call.
    import_environ: Mapping[str, str] = field(default_factory=dict)
    #: As whom, where that is not the daemon's own user.
    becoming: Becoming | None = None
    #: Where it lives, if it has a group of its own.
    group: Group | None = None

    @property
    def recipe(self) -> Recipe:
        """Of the server that can bear it."""
        is_bare = not self.preload and not self.hints
        visible = self.environ if is_bare else {**self.import_environ, **self.environ}
        environ = {name: value for name, value in visible.items() if name not in _OF_ONE_WORKER and (not is_bare or _is_read_at_start(name))}
        hints = tuple(name for name in self.hints if name not in self.preload)
        return Recipe(self.uid, self.python, tuple(sorted(environ.items())), self.preload, hints, self.becoming.identity if self.becoming else None)


@dataclass(frozen=True, slots=True)
class Born:
    """A worker's process and its channel. ``server`` bore it; if none did, ``reason`` says why not."""

    process: launch.Process
    sock: socket.socket
    server: str = ""
    reason: str = ""


class Births:
    """The fork servers of one daemon, and the plain way beside them."""

    def __init__(self, runtime: Path, folder: Path, clock: Clock, limits: Limits, prefix: str) -> None:
        self.servers: dict[Recipe, ForkServer] = {}
        #: Where servers that are not the daemon's own user's get groups of their own. Set by the composition root.
        self.groups: Groups | None = None
        self._runtime = runtime
        self._folder = folder
        self._clock = clock
        self._limits = limits
        self._prefix = prefix
        self._numbers = itertools.count(1)
        #: Why a server of this recipe is of no use, and until when that is believed.
        self._unfit: dict[Recipe, tuple[str, float]] = {}
        self._living: set[ForkServer] = set()

    async def bear(self, start: Start, stdout: int, stderr: int) -> Born:
        """A process with a channel; the descriptors stay the caller's. Raises SpawnError."""
        try:
            return await self._fork(start, stdout, stderr)
        except (ForkRefused, OSError) as error:
            reason = str(error)
        process, sock = await self._launch(start, stdout, stderr)
        return Born(process, sock, reason=reason)

    async def _launch(self, start: Start, stdout: int, stderr: int) -> tuple[launch.Process, socket.socket]:
        ours, theirs = channel.pair()
        try:
            argv = (start.python, os.fspath(self._runtime), str(theirs.fileno()))
            spec = launch.LaunchSpec(argv, start.environ, stdout, stderr, (theirs.fileno(),), start.becoming)
            return await launch.launch(spec, self._limits.launch_deadline_seconds), ours
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    async def _fork(self, start: Start, stdout: int, stderr: int) -> Born:
        """Raises ForkRefused. A server that is out of date, or has died meanwhile, is replaced, once."""
        try:
            return await self._fork_once(start, stdout, stderr)
        except ForkRefused as error:
            if not error.is_stale:
                raise
            log.info("%s: another fork server is started", error)
        return await self._fork_once(start, stdout, stderr)

    async def _fork_once(self, start: Start, stdout: int, stderr: int) -> Born:
        try:
            server = await self._ready_server(start)
        except ForkRefused as error:
            if not start.hints:
                raise
            log.info("no fork server imports %s: %s", " ".join(start.hints), error)
            server = await self._ready_server(replace(start, hints=()))  # guesses must not cost what was asked for
        process, sock = await server.bear(start.environ, stdout, stderr, start.group)
        return Born(process, sock, server.id)

    async def _ready_server(self, start: Start) -> ForkServer:
        """The one of its recipe; started if there is none. Raises ForkRefused, also when one was of no use a moment ago."""
        recipe = start.recipe
        if not self._limits.fork_servers_total:
            raise ForkRefused("fork servers are turned off (fork_servers_total is 0)")
        problem, until = self._unfit.get(recipe, ("", 0.0))
        if problem and self._clock.monotonic() < until:
            raise ForkRefused(problem)
        if dying := next((server for server in self.servers.values() if server.is_unfit and server.recipe.serves(recipe)), None):
            raise ForkRefused(dying.problem)  # another one would be no better, and this one may take long to die
        server = next((server for server in self.servers.values() if server.recipe.serves(recipe) and not server.problem), None)
        if server is None:
            server = self._new_server(recipe, start.becoming)
            server.start(self._runtime, self._folder)
        await server.ready(self._limits.start_deadline_seconds)
        return server

    def _new_server(self, recipe: Recipe, becoming: Becoming | None) -> ForkServer:
        """With as many already as there may be, of one user or in all, the one that has been idle for longest goes."""
        own = [server for server in self.servers.values() if server.recipe.uid == recipe.uid]
        if len(own) >= self._limits.fork_servers_per_uid:
            self._dismiss_oldest(own)
        elif len(self.servers) >= self._limits.fork_servers_total:
            self._dismiss_oldest(self.servers.values())
        server_id = f"{self._prefix}{next(self._numbers)}"
        group = self._make_group(server_id) if becoming is not None else None
        if becoming is not None:
            becoming = becoming.inside(group)
        server = self.servers[recipe] = ForkServer(server_id, recipe, self._clock, self._limits, self._on_gone, becoming, group)
        self._living.add(server)
        return server

    def _make_group(self, server_id: str) -> Group | None:
        """As large as a worker without limits of its own. Raises OSError."""
        bounds = Bounds(self._limits.worker_memory(), None, self._limits.worker_tasks)
        return self.groups.make(f"fork-{server_id}", bounds) if self.groups is not None else None

    def _dismiss_oldest(self, among: Collection[ForkServer]) -> None:
        oldest = min(among, key=lambda server: (server.is_busy, server.used))
        del self.servers[oldest.recipe]
        oldest.dismiss("another one is needed more")

    def _on_gone(self, server: ForkServer) -> None:
        self._living.discard(server)
        if self.servers.get(server.recipe) is server:
            del self.servers[server.recipe]
        if server.is_unfit:
            log.warning("workers start without a fork server: %s", server.problem)
            now = self._clock.monotonic()
            self._unfit = {recipe: found for recipe, found in self._unfit.items() if found[1] > now}
            self._unfit[server.recipe] = (server.problem, now + self._limits.fork_server_retry_seconds)

    def dismiss_idle(self, in_use: Collection[str]) -> None:
        """Servers that have borne nobody for a while, and none of whose workers lives, end."""
        until = self._clock.monotonic() - self._limits.fork_server_idle_seconds
        for server in list(self.servers.values()):
            if not server.is_busy and server.used < until and server.id not in in_use:
                server.dismiss("no pool has used it for a while")

    async def close(self) -> None:
        """All of them are dead when this returns; the workers that they bore are not touched."""
        await asyncio.gather(*(server.end() for server in list(self._living)))


def _is_read_at_start(name: str) -> bool:
    return name in _READ_AT_START or name.startswith(_READ_AT_START_PREFIXES)
