"""One fork server as the daemon sees it: a process of its user's, started like a worker and trusted as little.

It is told once what to import and says whether it can be forked after that. Then each ``bear`` gives a process that is the
daemon's own child, with a channel of its own; what becomes of the server later does not concern it. The server ends with
its channel, hence with the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from remoted import channel, foreign
from remoted.access import Identity
from remoted.apart import Apart
from remoted.cgroup import Group, NotStill
from remoted.clock import Clock
from remoted.errors import SpawnError
from remoted.limits import Limits
from remoted.peers import take_no_descriptors
from remoted.spawn import launch, reaper
from remoted.spawn.becoming import Becoming
from remoted.spawn.door import Door, NotBelieved
from remoted.spawn.orphans import end_orphans
from remoted.spawn.usher import usher
from remoted_client import wire

_Newborn = tuple[launch.Process, socket.socket]
#: Room for the name of any worker: each writes its own over the server's (``worker/mark.py``).
_MARK_BYTES = 64
_KEPT_OUTPUT = 4000
_BURIAL_SECONDS = 5.0
_PROBLEM_LETTERS = 500


class ForkRefused(Exception):
    """No worker comes from this server; the message says why. ``is_stale``: another server of the same recipe would do."""

    def __init__(self, problem: str, is_stale: bool = False) -> None:
        super().__init__(problem)
        self.is_stale = is_stale


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes a fork server: workers that agree in all of this may come from the same one."""

    uid: int
    python: str
    environ: tuple[tuple[str, str], ...]
    preload: tuple[str, ...] = ()
    #: Guesses at what the workers will import, from their code.
    hints: tuple[str, ...] = ()
    #: As whom it runs, where that is not the daemon's own user.
    identity: Identity | None = None

    def serves(self, wanted: Recipe) -> bool:
        """Is a server made by this one as good? The same is imported, and nothing that was asked for is only a guess here."""
        return (
            (self.uid, self.identity, self.python, self.environ) == (wanted.uid, wanted.identity, wanted.python, wanted.environ)
            and set(self.preload) >= set(wanted.preload)
            and {*self.preload, *self.hints} == {*wanted.preload, *wanted.hints}
        )


class ForkServer:
    """From its launch to its burial."""

    def __init__(
        self, server_id: str, recipe: Recipe, clock: Clock, limits: Limits, on_gone: Callable[[ForkServer], None], becoming: Becoming | None = None, group: Group | None = None
    ) -> None:
        """``becoming`` and ``group``: as whom and where it runs, if that is not as the daemon itself."""
        self.id = server_id
        self.recipe = recipe
        self._becoming = becoming
        self._group = group
        self.pid = 0
        self.births = 0
        self.started_at = clock.wall()
        self.began = self.used = clock.monotonic()
        #: Why it cannot be used; "" while it can, or while that is not known yet.
        self.problem = ""
        #: Another one of this recipe would be no better.
        self.is_unfit = False
        self._clock = clock
        self._limits = limits
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._mark = f"fork-server-{server_id}-{secrets.token_hex(8)}".ljust(_MARK_BYTES, ".")
        self._process: launch.Process | None = None
        self._link: channel.Channel | None = None
        self._door: Door | None = None
        self._pipe = -1
        self._output = bytearray()
        #: Births of which the server has not said yet that it is up to date, by token.
        self._fresh: dict[str, asyncio.Future[None]] = {}
        self._moving = asyncio.Lock()
        self._apart = Apart(limits.launch_deadline_seconds)
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()

    # -- birth ---------------------------------------------------------------------------------------------

    def start(self, runtime: Path, folder: Path) -> None:
        """Launch it, whoever asked for it first and may have gone since; ``ready`` says what came of it."""
        self._starting = self._loop.create_task(self._start(runtime, folder))

    async def _start(self, runtime: Path, folder: Path) -> None:
        ours, theirs = channel.pair()
        take_no_descriptors(ours)
        self._link = channel.Channel(ours, self._on_frame, self._on_closed)
        try:
            self._door = Door(folder, self.recipe.uid)
            await self._launch(runtime, theirs, self._door)
        except (SpawnError, OSError) as error:
            self._fail(f"the fork server did not start: {error}", is_unfit=True)
            self._close()
            await self._end_of_life()
        else:
            self._link.send({"op": "preload", "modules": self.recipe.preload, "hints": self.recipe.hints})
            if self.problem:
                self._signal()  # it was dismissed meanwhile
        finally:
            theirs.close()

    async def _launch(self, runtime: Path, theirs: socket.socket, door: Door) -> None:
        self._pipe, writing = os.pipe2(os.O_CLOEXEC)
        argv = (self.recipe.python, os.fspath(runtime), str(theirs.fileno()), str(door.key))
        # The mark comes last: what follows it in memory is cut off by a shorter one.
        environ = {**dict(self.recipe.environ), "PYTORCH_NVML_BASED_CUDA_CHECK": "1", reaper.WORKER_VARIABLE: self._mark}
        try:
            spec = launch.LaunchSpec(argv, environ, writing, writing, (theirs.fileno(), door.key), self._becoming)
            self._process = await launch.launch(spec, self._limits.launch_deadline_seconds)
        finally:
            os.close(writing)
        self.pid = self._process.pid
        door.belongs_to(self._process)
        os.set_blocking(self._pipe, False)
        self._loop.add_reader(self._pipe, self._read_pipe)
        self._loop.add_reader(self._process.pidfd, self._on_exit)

    @property
    def state(self) -> str:
        return "ending" if self.problem else "ready" if self._ready.done() else "importing"

    @property
    def is_busy(self) -> bool:
        """It imports, or bears somebody."""
        return not self._ready.done() or bool(self._fresh)

    async def ready(self, deadline_seconds: float) -> None:
        """Until it may be asked for workers. Raises ForkRefused when it may not, or not yet."""
        left = self.began + deadline_seconds - self._clock.monotonic()
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), max(0.0, left))
        except TimeoutError:
            raise ForkRefused(f"the fork server has been importing for more than {deadline_seconds:g} s") from None
        if self.problem:
            raise ForkRefused(self.problem)

    async def bear(self, environ: Mapping[str, str], stdout: int, stderr: int, group: Group | None = None) -> _Newborn:
        """A worker: its process, a child of ours as soon as it greets, and its channel. Raises ForkRefused. ``group``: where it is to live."""
        body = json.dumps(dict(environ)).encode()
        if len(body) > wire.INLINE_BYTES:
            raise ForkRefused(f"its environment has {len(body)} bytes, more than go in one message")
        if self._link is None or self._door is None or self.problem or not self._link.is_open:
            raise ForkRefused(self.problem or "the fork server has ended", is_stale=not self.is_unfit)
        if group is not None and (self._group is None or not self._group.can_freeze):
            raise ForkRefused("this host cannot hold a forked worker still while it gets its own limits (cgroup.freeze)")
        if self._becoming is not None:
            for pipe in (stdout, stderr):  # /dev/stderr opens it once more, as the user
                os.fchown(pipe, self._becoming.identity.uid, self._becoming.identity.gid)
        token = secrets.token_hex(16)
        born, fresh = self._door.expect(token), self._loop.create_future()
        self._fresh[token] = fresh
        self.used = self._clock.monotonic()
        self._link.send({"op": "bear", "token": token}, body, (os.dup(stdout), os.dup(stderr)))
        try:
            found = await self._taken_in(born, fresh, group)
        except TimeoutError:
            self._give_up(f"the fork server bore no worker within {self._limits.launch_deadline_seconds:g} s", is_unfit=True)
            raise ForkRefused(self.problem) from None
        except NotBelieved as error:
            self._give_up(f"the fork server is not believed any more: {error}", is_unfit=True)
            raise ForkRefused(self.problem) from None
        finally:
            self._door.forget(token)  # who comes later is sent away, and ends
            del self._fresh[token]
        self.births += 1
        return found

    async def _taken_in(self, born: asyncio.Future[_Newborn], fresh: asyncio.Future[None], group: Group | None) -> _Newborn:
        """Once it is believed, and once the server says that what it has imported is what is installed."""
        try:
            async with asyncio.timeout(self._limits.launch_deadline_seconds):
                process, sock = await born
                await fresh
                if group is not None and self._group is not None:
                    await self._move(process, self._group, group)
                wire.send(sock, wire.encode({"op": "welcome"}))
        except BaseException as error:
            _turn_away(born)
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise ForkRefused(f"the worker ended before it was one: {error}") from error
            raise
        return process, sock

    async def _move(self, newborn: launch.Process, own: Group, group: Group) -> None:
        """One at a time, for the first to end lets everybody in the server's group run again; in a thread apart, for somebody there may keep it from holding still."""
        async with self._moving:
            if self.problem:
                raise ForkRefused(self.problem)
            try:
                if not await self._apart.do(self.id, lambda: usher(newborn, own, group)):
                    raise TimeoutError
            except NotStill as error:
                self._give_up(f"the fork server cannot be held still: {error}", is_unfit=True)
                raise ForkRefused(self.problem) from error

    # -- what it says --------------------------------------------------------------------------------------

    def _on_frame(self, frame: wire.Frame) -> None:
        header = frame.header
        frame.close()
        if frame.op == "ready" and not self._ready.done():
            if problem := str(header.get("problem", ""))[:_PROBLEM_LETTERS]:
                self._give_up(problem, is_unfit=True)
            else:
                self.used = self._clock.monotonic()
                self._ready.set_result(None)
        elif frame.op == "fresh" and (fresh := self._fresh.get(str(header.get("token", "")))) and not fresh.done():
            fresh.set_result(None)
        elif frame.op == "refused" and self._door is not None:
            problem, is_stale = str(header.get("problem", ""))[:_PROBLEM_LETTERS], header.get("stale") is True
            if is_stale:
                self._give_up(problem)
            self._refuse_birth(str(header.get("token", "")), ForkRefused(problem, is_stale))

    def _refuse_birth(self, token: str, error: ForkRefused) -> None:
        if self._door is not None:
            self._door.fail(token, error)
        fresh = self._fresh.get(token)
        if fresh is not None and not fresh.done():
            fresh.set_exception(error)
            fresh.exception()  # the other of the two may have been heard first

    def _on_closed(self, why: str) -> None:
        """Without its channel it is of no use; usually it is dead, and its burial says how it died."""
        self._signal()

    def _read_pipe(self) -> None:
        """What is printed while modules are imported: the end of it explains a failure."""
        try:
            data = os.read(self._pipe, 65536)
        except BlockingIOError:
            return
        if not data:
            self._close_pipe()
        self._output = (self._output + data)[-_KEPT_OUTPUT:]

    # -- the end -------------------------------------------------------------------------------------------

    def _fail(self, problem: str, is_unfit: bool = False) -> None:
        """The first reason is the one that counts."""
        if not self.problem:
            self.problem, self.is_unfit = problem, is_unfit
        if not self._ready.done():
            self._ready.set_result(None)

    def _give_up(self, problem: str, is_unfit: bool = False) -> None:
        """It bears nobody any more."""
        self._fail(problem, is_unfit)
        self._signal()

    def _signal(self) -> None:
        if self._process is not None and not self._gone.done():
            reaper.send(self._process.pidfd, signal.SIGKILL)

    def _on_exit(self) -> None:
        assert self._process is not None
        self._loop.remove_reader(self._process.pidfd)
        self._loop.create_task(self._bury(self._process))

    async def _bury(self, process: launch.Process) -> None:
        """A worker that was only half born goes with it."""
        if self._link is not None:
            self._link._read()
        status = reaper.reap(process.pidfd)
        self._process = None
        os.close(process.pidfd)
        was_importing = not self._ready.done()
        if self._pipe >= 0:
            self._read_pipe()
        said = bytes(self._output).decode("utf-8", "replace").strip().splitlines()
        if was_importing:
            self._fail(f"the fork server {status.describe()} while it imported" + (f": {said[-1]}" if said else ""), is_unfit=True)
        self._fail(f"the fork server {status.describe()}")
        self._close()
        if self._group is None:
            await end_orphans(self._mark, process.pid, None if self._becoming is None else self.recipe.uid)
        await self._end_of_life()

    async def _end_of_life(self) -> None:
        if self._group is not None:
            await self._group.end()
            self._group.remove()
        self._gone.set_result(None)
        self._on_gone(self)

    def _close(self) -> None:
        if self._link is not None:
            self._link.close()
        for token in list(self._fresh):
            self._refuse_birth(token, ForkRefused(self.problem, is_stale=not self.is_unfit))
        if self._door is not None:
            self._door.close(ForkRefused(self.problem, is_stale=not self.is_unfit))
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            self._loop.remove_reader(self._pipe)
            os.close(self._pipe)
            self._pipe = -1

    def dismiss(self, why: str) -> None:
        """It ends soon, through no fault of its own; nothing is lost with it."""
        self._give_up(f"the fork server was ended: {why}")

    async def end(self) -> None:
        """Returns when it is buried; one that is stuck on its way into life is left to end with its channel."""
        self.dismiss("the daemon stops")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._gone), _BURIAL_SECONDS)


def _turn_away(born: asyncio.Future[_Newborn]) -> None:
    """It hears the end of its channel, and ends."""
    if born.done() and not born.cancelled() and born.exception() is None:
        process, sock = born.result()
        foreign.leave(sock)
        os.close(process.pidfd)
