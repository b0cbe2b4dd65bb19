"""The composition root: builds everything, in the order of start and stop.

    lock > store > contents > environments > engine > jobs, direct calls > adoption > sockets > serve
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import remoted
from remoted import api, cgroup, config_files, overflow, scopes
from remoted.adoption import Adoption
from remoted.apart import Apart
from remoted.audit import Audit
from remoted.blobs import Blobs
from remoted.calls import Call
from remoted.cgroup import Bounds, Groups
from remoted.clock import Clock
from remoted.contents import Contents
from remoted.data import DataServer, Runners, watch_caller
from remoted.direct import DirectCalls
from remoted.dismissal import end_workers
from remoted.endings import Ending
from remoted.endpoints import Endpoints
from remoted.engine import Engine
from remoted.environments import Environments, EnvironmentSource
from remoted.errors import RemotedError, SocketsLost, StartupError, StoreBroken, StoreError
from remoted.fdstore import FdStore
from remoted.gate import Gate
from remoted.gpu.enforce import DeviceRules, find_rules
from remoted.gpu.locks import DeviceLocks
from remoted.gpu.nvml import Nvml
from remoted.house import House
from remoted.instances import Instances
from remoted.jobs import Jobs
from remoted.journal import SOCKET, Journal
from remoted.lag import Lag
from remoted.model import Reason
from remoted.paths import Paths
from remoted.redo import RedoLog
from remoted.room import Room
from remoted.scheduler.events import SharesSet
from remoted.scheduler.policy import Scheduler
from remoted.settings import Settings
from remoted.spawn import helper, reaper, runtime
from remoted.spawn.births import Births
from remoted.spool import Spool
from remoted.steward import Stewards
from remoted.store import Store
from remoted.supervisor import Supervisor
from remoted.tally import Tally

log = logging.getLogger(__name__)
#: In the lock of a daemon that ends, and for how long the next one waits for it.
_ENDING = "ending\n"
_ENDING_SECONDS = 20.0
#: How long bodies have to listen when the daemon ends their jobs; then they are killed.
_LAST_SECONDS = 3.0
#: To look who still runs an older worker's program: everybody's processes are asked, and one that does not answer only costs a file.
_SWEEP_SECONDS = 2.0
_HOST_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Daemon:
    """One daemon, from lock to exit."""

    def __init__(self, paths: Paths, settings: Settings, idle_exit_seconds: float | None, house: House) -> None:
        self._paths = paths
        self._settings = settings
        self._config = settings.config  # as it was at the start
        self._house = house
        self._limits = settings.limits
        self._clock = Clock()
        self._idle_exit_seconds = idle_exit_seconds
        self._lag = Lag()
        self._tally = Tally()
        self._stop = asyncio.Event()
        self._ends_jobs = False
        #: Why it ends, if that is a failure.
        self._problem: RemotedError | None = None
        self._locks: list[int] = []
        self._own_sockets: list[Path] = []
        self._cgroups: Groups | None = None
        self._rules: DeviceRules | None = None
        self._supervisor = Supervisor(os.environ)
        self._fdstore = FdStore(self._supervisor, self._clock.boot_id())
        self._audit: Audit | None = None
        self._journal: Journal | None = None

    async def run(self) -> None:
        """Serve until told to stop, or idle for long enough. Raises StartupError, and what ends it (StoreBroken, SocketsLost) once all is put down."""
        self._paths.create()
        await self._take_locks()
        reaper.become_subreaper()
        _raise_descriptor_limit()
        if self._house.is_shared:
            self._cgroups = self._find_groups()
            self._rules = self._find_rules()
        self._audit = self._find_audit()
        async with self._store() as (store, redo):
            await self._serve(store, redo)
        if self._journal is not None:
            self._journal.close()
            if self._journal.lost:
                log.warning("%d audit lines were lost: the journal did not take them", self._journal.lost)
        if self._cgroups is not None:
            self._cgroups.close()
        if self._rules is not None:
            self._rules.close()
        if self._problem is not None:
            raise self._problem

    def _find_groups(self) -> Groups | None:
        """systemd's where it started us, and else our own."""
        found: Groups | None
        if self._supervisor.is_systemd and scopes.is_running():
            found = scopes.Scopes()
        else:
            found = cgroup.find(self._paths.group_name, Bounds(memory_bytes=_HOST_MEMORY * 19 // 20))
        if found is None or found.missing:
            log.warning("workers are not limited by cgroups: missing %s", ", ".join(found.missing if found else ("a place for groups",)))
        return found

    def _find_rules(self) -> DeviceRules | None:
        """For the devices that workers may open."""
        folder = cgroup.own_folder()
        if self._cgroups is None or folder is None or not self._config.gpu.enforce:
            return None
        found = find_rules(folder)
        if found is not None:
            self._cgroups.device_program = found.program(())  # builds and fork servers are lent none
        return found

    def stop(self, ends_jobs: bool = False) -> None:
        """End soon. Running jobs go on without a daemon and the next one takes them over, unless they shall end too."""
        self._ends_jobs |= ends_jobs
        self._stop.set()

    def _store_broke(self) -> None:
        self._problem = StoreBroken("the database could not be written to the disk")
        self.stop()

    async def _take_locks(self) -> None:
        """One daemon per user and machine; the lock goes with the process, however it ends."""
        # State and sockets may be shared in different ways: another HOME, the same temporary directory.
        for path in (self._paths.lock, self._paths.socket_lock):
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._locks.append(lock)
            await self._take(lock, path)
            self._sign(lock, "")

    async def _take(self, lock: int, path: Path) -> None:
        """One that says that it ends is waited for."""
        until = self._clock.monotonic() + _ENDING_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not os.pread(lock, 64, 0).endswith(_ENDING.encode()) or self._clock.monotonic() > until:
                    raise StartupError(f"cannot start: another daemon{'' if self._paths.is_shared else ' of yours'} holds {path}") from None
                await asyncio.sleep(0.05)
            else:
                return

    def _sign(self, lock: int, state: str) -> None:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n{state}".encode(), 0)

    @contextlib.asynccontextmanager
    async def _store(self) -> AsyncIterator[tuple[Store, RedoLog]]:
        store, redo = Store(self._paths.database, self._store_broke), RedoLog(self._paths.redo, self._clock.boot_id())
        await store.open()
        try:
            await _replay(store, redo)
            yield store, redo
        finally:
            await store.close()
            redo.close()

    async def _serve(self, store: Store, redo: RedoLog) -> None:
        entries = self._fdstore.take()
        program = runtime.build(self._paths.runtime)
        engine, jobs, direct, adoption, environments = self._build(store, redo, program)
        engine.handle(SharesSet.of(self._limits))
        await engine.look_at_devices()
        if self._house.is_shared and self._config.gpu.enforce and self._rules is None and engine.devices.known:
            log.warning("a worker may open every GPU: the kernel keeps no rules for devices here")
        callers: list[Call] = []
        revived = await adoption.run(entries, callers.append)
        room = Room(jobs.records, jobs.contents, self._paths, self._clock, self._limits)
        await room.measure()
        await Apart(_SWEEP_SECONDS).do("", partial(runtime.sweep, self._paths.runtime, program))
        log.info("remoted %s: %d jobs and %d workers from before, %d devices", remoted.__version__, revived, len(engine.workers), len(engine.devices.known))
        self._handle_signals(engine)  # before anybody can see that there is a daemon: a SIGHUP for it would end it
        with self._listen(self._paths.data_socket) as data_socket, self._listen(self._paths.api_socket) as api_socket:
            endpoints = Endpoints(direct, self._limits)
            runners = Runners(jobs, direct, endpoints)
            data = DataServer(data_socket, runners, self._limits, self._house.access, self._house.accounts, self._tally, self._clock)
            services = api.Services(
                jobs=jobs,
                direct=direct,
                endpoints=endpoints,
                engine=engine,
                environments=environments,
                settings=self._settings,
                limits=self._limits,
                paths=self._paths,
                clock=self._clock,
                started_at=self._clock.monotonic(),
                stop=self.stop,
                lag=self._lag,
                tally=self._tally,
                mode=self._house.mode,
                accounts=self._house.accounts,
            )
            server = await api.serve(services, api_socket, self._house.access)
            _give_back_memory()
            data.start()
            self._await_callers(runners, callers)
            self._supervisor.say("READY=1", f"STATUS=serving, {revived} jobs from before")
            try:
                await self._until_stopped(engine, runners, room)
            finally:
                await self._put_down(engine, runners, data, server)
                await environments.close()

    async def _put_down(self, engine: Engine, runners: Runners, data: DataServer, server: api.ApiServer) -> None:
        """Nothing is begun any more; what has begun is stored and sent; then everybody is let go."""
        self._supervisor.say("STOPPING=1")
        engine.freeze()
        for lock in self._locks:
            self._sign(lock, _ENDING)
        self._remove_sockets()
        if self._ends_jobs:  # callers are still connected: they hear of it
            await runners.jobs.settle_begun()
            await _end_calls(runners)
        data.close()
        await runners.jobs.settle_begun()
        await asyncio.gather(server.close(), engine.close(leaves_idle=not self._ends_jobs))
        with contextlib.suppress(StoreError):
            await runners.jobs.records.charge(runners.direct.used)
        await runners.jobs.close()

    def _build(self, store: Store, redo: RedoLog, program: Path) -> tuple[Engine, Jobs, DirectCalls, Adoption, EnvironmentSource]:
        blobs = Blobs(self._paths, self._limits.free_disk_reserve_bytes)
        contents = Contents(store, blobs, self._limits)
        contents.quotas.is_enforced = self._house.is_shared
        environments = self._environments()
        nvml = Nvml(self._config.gpu.nvml_library, self._config.gpu.nvml_deadline_seconds)
        cpus = float(self._config.cpus or len(os.sched_getaffinity(0)))
        crash_loop = (self._limits.crash_loop_count, self._limits.crash_loop_seconds)
        reserve = self._limits.reserve if self._house.is_shared else 0
        scheduler = Scheduler(cpus, self._limits.workers_total, reserve, worker_prefix=f"w{secrets.token_hex(4)}-", crash_loop=crash_loop)
        births = Births(program, self._paths.sockets, self._clock, self._limits, prefix=f"f{secrets.token_hex(2)}-")
        engine = Engine(scheduler, self._clock, self._limits, nvml, DeviceLocks(Path(self._config.gpu.lock_folder)), self._config.gpu.poll_seconds, environments, births, self._paths.sockets, Spool(self._paths.outcomes), Gate(self._paths.drain), self._fdstore)
        engine.on_shutdown = self.stop
        births.groups, engine.cradle.rules = self._cgroups, self._rules
        engine.cradle.accounts = self._house.accounts
        engine.cradle.become, engine.cradle.cgroups, engine.cradle.is_shared = self._house.become, self._cgroups, self._house.is_shared
        kind_key = self._fdstore.kind_key
        instances = Instances(engine, self._limits)
        jobs = Jobs(engine, contents, instances, self._clock, self._limits, kind_key, store, redo, blobs, self._paths)
        direct = DirectCalls(engine, contents, instances, self._clock, self._limits, kind_key, self._paths)
        for runner in (jobs, direct):
            runner.others = (jobs, direct)
            runner.access = self._house.access
            runner.on_ended = self._note_end
        return engine, jobs, direct, Adoption(store, contents, engine, jobs, direct, self._clock), environments

    def _note_end(self, ending: Ending) -> None:
        self._tally.note_end(ending)
        if self._audit is not None:
            self._audit.note(ending)

    def _find_audit(self) -> Audit | None:
        settings = self._config.audit
        if not (self._house.is_shared if settings.enabled is None else settings.enabled):
            return None
        self._journal = Journal() if self._supervisor.is_systemd and SOCKET.exists() else None
        return Audit(self._journal, settings.names)

    def _environments(self) -> EnvironmentSource:
        if self._house.is_shared:
            return Stewards(self._config.environments, _find_uv(), self._house.become, self._cgroups)
        return Environments(self._paths.environments, self._config.environments, helper.run_helper, _find_uv())

    def _await_callers(self, runners: Runners, calls: list[Call]) -> None:
        """Callers of the last daemon's blocking calls have a minute to come back; dead ones are gone now."""
        for call in calls:
            if not call.caller:
                continue
            pid, started = json.loads(call.caller)
            watch_caller(runners, _same_process(pid, started), [call])

    def _handle_signals(self, engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGQUIT, self.stop, True)
        if os.isatty(0):
            loop.add_signal_handler(signal.SIGHUP, self.stop)  # the terminal in which it was typed is closed
        else:
            loop.add_signal_handler(signal.SIGHUP, lambda: engine.spawn(self._reload(engine)))

    async def _reload(self, engine: Engine) -> None:
        """Read the configuration again; a bad one changes nothing."""
        self._supervisor.say("STATUS=reading the configuration")
        reading = await asyncio.to_thread(config_files.read, self._settings.file, self._house.is_shared)
        for problem in reading.problems:
            log.log(logging.ERROR if problem.fatal else logging.WARNING, "%s", problem)
        try:
            changes = self._settings.take(reading)
        except StartupError:
            log.error("the configuration was not reloaded: what was in force stays in force")
        else:
            self._apply(engine)
            log.info("the configuration was reloaded: %s", changes)
        self._supervisor.say("STATUS=serving")

    def _apply(self, engine: Engine) -> None:
        """To those who do not ask the limits themselves."""
        config = self._settings.config
        engine.poll_seconds = config.gpu.poll_seconds
        engine.handle(SharesSet.of(self._limits))
        if self._audit is not None:
            self._audit.names = config.audit.names

    async def _until_stopped(self, engine: Engine, runners: Runners, room: Room) -> None:
        signs = self._supervisor.feed(runners.jobs.settle_begun)
        watches = (engine.watch_devices(), engine.watch_memory(), self._lag.watch(), self._housekeeping(engine, runners, room), signs, overflow.watch(engine))
        tasks = [asyncio.create_task(watch) for watch in watches]
        try:
            await self._stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _housekeeping(self, engine: Engine, runners: Runners, room: Room) -> None:
        """Expiry, forgotten sockets, and the end of an idle daemon (MECHANISMS 7)."""
        jobs, direct = runners.jobs, runners.direct
        idle_since = self._clock.monotonic()
        while True:
            await room.wanted(min(self._limits.housekeeping_seconds, (self._idle_exit_seconds or float("inf")) / 4))
            engine.dismiss_idle_servers()
            try:
                await room.make()
                await jobs.records.charge(direct.used)
            except (RemotedError, OSError) as error:  # on a full disk too there is a next time
                log.error("cannot forget what is old: %s", error)
            if not jobs.records.is_in_place:
                log.error("the database %s was removed or replaced: what is stored now is lost at the next start; `remotectl drain --wait` lets what there is end before", self._paths.database)
            now = self._clock.monotonic()
            if jobs.calls or direct.calls or runners.endpoints:
                idle_since = now
            lost = not self._paths.data_socket.exists() and not (jobs.calls or direct.calls)
            if lost and self._supervisor.is_systemd:
                self._problem = SocketsLost("the sockets were taken away, and the next daemon makes its own")  # a failure, so there will be one
            if lost or (self._idle_exit_seconds is not None and now - idle_since >= self._idle_exit_seconds):
                log.info("nothing to do: ending (%s)", "the socket vanished" if lost else "idle")
                self.stop()

    @contextlib.contextmanager
    def _listen(self, path: Path) -> Iterator[socket.socket]:
        """The supervisor's, or one of our own in a folder where nobody else may make one; the lock says that an old one is dead."""
        given = self._supervisor.take_socket(path)
        if given is not None and path.exists():
            with given:
                yield given
            return
        if given is not None:  # it listens where nobody finds it
            log.warning("%s was taken away: the daemon makes its own, until `systemctl restart remoted.socket remoted`", path)
            given.close()
        self._own_sockets.append(path)
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            sock.bind(os.fspath(path))
            path.chmod(self._paths.socket_mode)
            sock.listen(1024)
            yield sock

    def _remove_sockets(self) -> None:
        """Who connects to the supervisor's waits for the next daemon."""
        for path in self._own_sockets:
            path.unlink(missing_ok=True)


async def _end_calls(runners: Runners) -> None:
    """Interrupt every body and store how it ended; whoever does not listen is killed after a moment."""
    running = [call for runner in (runners.jobs, runners.direct) for call in list(runner.calls.values()) if call.worker is not None]
    workers = {call.worker for call in running}
    for call in running:
        runners.of(call.id).cancel(call, Reason.DAEMON_STOPPED)
    loop = asyncio.get_running_loop()
    until = loop.time() + _LAST_SECONDS
    while any(worker.has_attempts for worker in workers if worker is not None) and loop.time() < until:
        await asyncio.sleep(0.02)
    await end_workers([worker for worker in workers if worker is not None and worker.is_alive])
    await runners.jobs.close()


async def _replay(store: Store, redo: RedoLog) -> None:
    """What the last daemon had begun and not stored yet. Raises StartupError: to go on without it could run a body twice."""
    try:
        await store.submit(redo.replay)
        redo.open()
    except (StoreError, OSError) as error:
        raise StartupError(f"cannot store what the last daemon had begun: {error}") from error


def _give_back_memory() -> None:
    """What starting took and needs no more: by itself the C library keeps it. Others than glibc have no such function, nor the need."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _raise_descriptor_limit() -> None:
    """Connections, pipes and payloads are descriptors; the soft limit of a shell (1,024) is for programs that use select."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _same_process(pid: int, started: int) -> int | None:
    """A pidfd of the process with this pid and start time (clock ticks since boot, proc(5)); None if it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if reaper.ticks_of(pid) != started:
        os.close(pidfd)
        return None
    return pidfd


def _find_uv() -> str:
    """The uv that was installed with the daemon; looked for beside its interpreter first."""
    beside = Path(sys.executable).with_name("uv")
    return os.fspath(beside) if beside.exists() else shutil.which("uv") or "uv"
