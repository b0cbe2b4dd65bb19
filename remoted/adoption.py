"""After a restart: from the store to a running daemon again.

What a dead daemon left behind is a database, outcome files, and perhaps workers. Those whose descriptors systemd has kept are
taken over first, with all that they hold (``fdstore``, ``adopted``). Any other that has lost its daemon finishes the body it
runs, leaves the outcome in a file and ends (``worker/runtime.py``). So for every attempt of theirs that had begun
there are three cases, tried in this order:

1. its outcome is in the spool: the attempt is over, with that outcome;
2. the worker still runs (same pid, same start time, same boot): it is watched through a pidfd, its devices stay
   lent to it, and when it ends its outcome is read from the spool;
3. neither: if the worker's page says that it had not begun, the job waits again; else the attempt is LOST. It
   counts, because its body may have begun (MECHANISMS 8).

Only then are queued jobs given to workers, so nothing is lent before everything that still runs is known.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterable

from remoted.access import Identity
from remoted.adopted import AdoptedWorker
from remoted.attempts import AttemptEnd, died
from remoted.calls import Call, Listener
from remoted.clock import Clock
from remoted.contents import Contents
from remoted.direct import DirectCalls
from remoted.engine import Engine
from remoted.errors import RemotedError, StoreError
from remoted.family import adopted
from remoted.fdstore import Entry
from remoted.jobs import Jobs
from remoted.model import AttemptToken, DeviceUuid, Reason, Status, WorkerId
from remoted.progress import Begun, read_page
from remoted.requests import Request
from remoted.scheduler import events
from remoted.scheduler.state import WorkerView
from remoted.spawn import reaper
from remoted.spec import parse_options
from remoted.spool import OVERFULL
from remoted.store import Row, Store
from remoted.workload import Attempt
from remoted_client.wire import close_all

log = logging.getLogger(__name__)
_START_TOLERANCE_SECONDS = 0.011
_LOOK_SECONDS = 0.5
#: Workers that were taken over have so long to say what they have before anybody is served; a body may keep one busy.
_ANSWER_SECONDS = 1.0


class Adoption:
    """One use: ``run`` before the sockets are opened."""

    def __init__(self, store: Store, contents: Contents, engine: Engine, jobs: Jobs, direct: DirectCalls, clock: Clock) -> None:
        self._store = store
        self._contents = contents
        self._engine = engine
        self._spool = engine.spool
        #: Whose output is taken.
        self._heard: set[str] = set()
        self._jobs = jobs
        self._direct = direct
        self._clock = clock
        self._on_caller: Callable[[Call], None] = lambda call: None

    async def run(self, entries: list[Entry], on_caller: Callable[[Call], None]) -> int:
        """Bring every worker and every live job back. ``on_caller`` hears of each call whose caller must still live. Returns how many jobs."""
        self._on_caller = on_caller
        rows = await self._store.submit(lambda db: db.all("live_jobs"))
        attempts = {row["job"]: row for row in await self._store.submit(lambda db: db.all("live_attempts"))}
        begun: list[Call] = []
        queued: list[Call] = []
        for row in rows:
            call = await self._revive(row)
            if call is None:
                continue
            on_caller(call)
            (begun if row["id"] in attempts else queued).append(call)
        kept = {entry.about.id: entry for entry in entries if self._agrees(entry, attempts.values())}
        for attempt in attempts.values():
            if attempt["worker"] not in kept:
                self._spool.claim(attempt["worker"], attempt["token"])
        living: set[str] = {*kept, *(attempt["worker"] for attempt in attempts.values())}
        await asyncio.to_thread(self._spool.sweep, living)
        await self._contents.sweep_secrets()
        # Only now: a call that ends takes the secrets with it that nobody else holds, and all hold theirs by now.
        if self._engine.cradle.cgroups is not None:
            await asyncio.to_thread(self._engine.cradle.cgroups.sweep, living)
        taken: list[AdoptedWorker] = []
        for worker in dict.fromkeys([*kept, *(attempts[call.id]["worker"] for call in begun)]):
            its = [(call, attempts[call.id]) for call in begun if attempts[call.id]["worker"] == worker]
            if worker in kept and (found := self._adopt(kept[worker], its)) is not None:
                taken.append(found)
            else:
                self._resume(its)
        await self._meet(taken)
        for call in queued:
            self._jobs.queue_revived(call)
        return len(rows)

    async def _revive(self, row: Row) -> Call | None:
        """None: it can never run here again, and has ended as FAILED. One job keeps no daemon from its start."""
        try:
            return await self._revived(row)
        except StoreError:
            raise
        except RemotedError as error:
            why = str(error)
        except Exception as error:
            log.exception("cannot take job %s over", row["id"])
            why = f"cannot take it over after a restart of the daemon: {type(error).__name__}; the daemon's log says more"
        await self._jobs.bury(row, why)
        return None

    async def _revived(self, row: Row) -> Call:
        request = _request(row)
        digests = {digest for digest in (request.spec, request.code, request.modules, request.arguments) if digest}
        if request.instance is not None:
            digests.add(request.instance[2])
        await self._contents.recover(row["uid"], digests, request.context)
        return self._jobs.revive(row, request, await self._jobs.records.stored_items(row["id"]))

    # -- workers that systemd has kept ---------------------------------------------------------------------

    def _agrees(self, entry: Entry, attempts: Iterable[Row]) -> bool:
        """Do the rows name the same process? Else the entry is closed, and what the rows name is looked for."""
        its = [attempt for attempt in attempts if attempt["worker"] == entry.about.id]
        if all(attempt["boot_id"] == self._clock.boot_id() and entry.about.is_process(attempt["worker_pid"], attempt["worker_started"]) for attempt in its):
            return True
        log.warning("worker %s is not taken over: the database knows another process of this name", entry.about.id)
        self._refuse(entry)
        return False

    def _refuse(self, entry: Entry) -> None:
        """Its worker sees the end of its channel."""
        close_all(entry.handles)
        self._engine.fdstore.forget(entry.about.id)

    def _adopt(self, entry: Entry, its: list[tuple[Call, Row]]) -> AdoptedWorker | None:
        try:
            worker = self._engine.adopt(entry)
        except (OSError, ValueError) as error:
            log.warning("worker %s is not taken over: %s", entry.about.id, error)
            self._refuse(entry)
            for _, attempt in its:
                self._spool.claim(attempt["worker"], attempt["token"])
            return None
        for call, attempt in sorted(its, key=lambda found: found[1]["position"]):
            self._reclaim(worker, call, attempt)
        worker.ask()
        log.info("worker %s (pid %d) goes on, with %d calls", worker.id, worker.pid, len(its))
        return worker

    def _reclaim(self, worker: AdoptedWorker, call: Call, row: Row) -> None:
        """As if this daemon had given it to the worker."""
        call.token, call.attempt_started, call.position = AttemptToken(row["token"]), row["started_at"], row["position"]
        call.devices, call.worker, call.worker_id = _devices(row), worker, worker.id
        ran = max(0.0, self._clock.wall() - row["started_at"])
        listener = Listener(self._jobs, call, call.token)
        attempt = Attempt(call.token, listener, self._clock.boottime() - ran, call.position, call.timeout_seconds)
        call.is_ahead = worker.reclaim(attempt, ran)
        call.status = Status.IN_QUEUE if call.is_ahead else Status.IN_PROGRESS
        self._engine.handle(events.TicketAdopted(worker.id, call.ticket, call.devices, call.is_ahead))

    async def _meet(self, taken: list[AdoptedWorker]) -> None:
        """Those who do not answer soon do so while others are served."""
        if taken and self._engine.devices.known:
            await self._engine.look_at_devices()  # their processes are no strangers there
        tasks = [self._engine.spawn(self._hear(worker)) for worker in taken]
        if tasks:
            await asyncio.wait(tasks, timeout=_ANSWER_SECONDS)

    async def _hear(self, worker: AdoptedWorker) -> None:
        """Until it has answered and can be given calls, or runs nothing and never will be of use."""
        answered = await worker.answer()
        if (view := self._engine.scheduler.workers.get(worker.id)) is not None:
            for instance in worker.instances:
                self._jobs.instances.remember(worker, view.need.uid, instance)
            await self._resume_leases(worker, view)
        if not answered:
            self._retire(worker, "it did not answer the new daemon")
        elif not await worker.free():
            self._retire(worker, "it runs a call that nobody waits for")
        else:
            self._engine.handle(events.WorkerReady(worker.id))

    def _retire(self, worker: AdoptedWorker, why: str) -> None:
        if worker.is_alive:
            log.warning("worker %s (pid %d) is ended: %s", worker.id, worker.pid, why)
        self._engine.retire(worker, why)

    async def _resume_leases(self, worker: AdoptedWorker, view: WorkerView) -> None:
        """Each is a call again. What one needs is looked for first: it may end meanwhile."""
        if not worker.leases:
            return
        await self._contents.recover(view.need.uid, {lease.spec for lease in worker.leases.values()}, "")
        if not worker.is_alive:
            return
        found, worker.leases = list(worker.leases.values()), {}
        for each in found:
            try:
                lease = self._direct.resume(worker, view.need, view.devices, each)
            except RemotedError as error:
                log.warning("worker %s: %s", worker.id, error)
                worker.refuse(each)
                continue
            self._engine.handle(events.TicketAdopted(worker.id, lease.ticket, lease.devices))
            self._on_caller(lease)

    # -- all others ----------------------------------------------------------------------------------------

    def _resume(self, begun: list[tuple[Call, Row]]) -> None:
        """Attempts of one worker of the last daemon's."""
        over: list[tuple[Call, Row]] = []
        running: list[tuple[Call, Row]] = []
        pidfd = -1
        for call, attempt in begun:
            call.token, call.attempt_started = AttemptToken(attempt["token"]), attempt["started_at"]
            call.devices = _devices(attempt)
            if pidfd < 0 and not self._is_over(attempt):
                pidfd = self._find_process(attempt)
            (over if pidfd < 0 or self._is_over(attempt) else running).append((call, attempt))
        for call, attempt in over:
            self._engine.spawn(self._conclude(call, attempt))
        if running:
            self._watch(running, pidfd)
        elif pidfd >= 0:
            os.close(pidfd)

    def _is_over(self, attempt: Row) -> bool:
        return attempt["boot_id"] != self._clock.boot_id() or self._spool.holds(attempt["worker"], attempt["token"])

    def _find_process(self, attempt: Row) -> int:
        """A pidfd of the attempt's worker if it is that very process; else -1."""
        try:
            pidfd = os.pidfd_open(attempt["worker_pid"])
        except ProcessLookupError:
            return -1
        if abs(reaper.started_at(attempt["worker_pid"]) - attempt["worker_started"]) > _START_TOLERANCE_SECONDS:
            os.close(pidfd)
            return -1
        return pidfd

    def _watch(self, running: list[tuple[Call, Row]], pidfd: int) -> None:
        """It takes no other calls; the scheduler must know what it holds before anything is lent."""
        first = running[0][1]
        worker_id = WorkerId(f"adopted-{first['worker']}")
        devices = _devices(first)
        for call, _ in running:
            call.status = Status.IN_PROGRESS
            log.info("job %s still runs in pid %d", call.id, first["worker_pid"])
            self._engine.handle(events.TicketAdopted(worker_id, call.ticket, devices))
        self._engine.spawn(self._await_end(running, pidfd, worker_id))

    async def _await_end(self, running: list[tuple[Call, Row]], pidfd: int, worker_id: WorkerId) -> None:
        """Until the worker ends, or has to because a call's time is over or it is cancelled; then of each call what came of it."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(pidfd, _set, ended)
        family = adopted(running[0][1]["worker"], running[0][1]["worker_pid"], self._engine.cradle.cgroups, running[0][0].uid)
        stopped: dict[str, Reason] = {}
        is_overfull = False
        try:
            while not ended.done():
                running = self._return_unbegun(running)
                await asyncio.wait([ended], timeout=self._until_next_look(running))
                is_overfull = is_overfull or self._overfills(running)
                for call, _ in running:
                    if why := call.stop_requested or self._is_late(call):
                        stopped[call.id] = why
                if (stopped or is_overfull) and not ended.done():
                    await family.end()
                    reaper.send(pidfd, 9)
                    await ended
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        want_of_memory = family.explain_kill()
        await family.bury()
        self._engine.handle(events.WorkerEnded(worker_id))
        for call, attempt in running:
            if is_overfull:
                self._jobs.attempt_ended(call, call.token, AttemptEnd("died", message=f"its worker was killed: {OVERFULL}", reason=Reason.RESULT_LOST))
            else:
                await self._conclude(call, attempt, stopped.get(call.id), want_of_memory)

    def _overfills(self, running: list[tuple[Call, Row]]) -> bool:
        """Does it leave more than its user may store (T44)?"""
        return any(self._spool.is_overfull(attempt["worker"], self._contents.quotas.left(call.uid)) for call, attempt in running[:1])

    def _return_unbegun(self, running: list[tuple[Call, Row]]) -> list[tuple[Call, Row]]:
        """What the worker was given ahead and will not begin any more goes to others now; the rest stays here."""
        unbegun = [(call, attempt) for call, attempt in running if self._never_begins(attempt)]
        for call, _ in reversed(unbegun):
            self._jobs.attempt_ended(call, call.token, _unbegun(call.stop_requested))
        return [(call, attempt) for call, attempt in running if (call, attempt) not in unbegun]

    def _until_next_look(self, running: list[tuple[Call, Row]]) -> float:
        left = [call.attempt_started + call.timeout_seconds - self._clock.wall() for call, _ in running if call.timeout_seconds is not None]
        return max(0.0, min([_LOOK_SECONDS, *left]))

    def _is_late(self, call: Call) -> Reason | None:
        limit = call.timeout_seconds
        return Reason.TIMEOUT if limit is not None and self._clock.wall() >= call.attempt_started + limit else None

    async def _conclude(self, call: Call, attempt: Row, stopped_by: Reason | None = None, want_of_memory: str = "") -> None:
        """The attempt is over: as its worker left it, else as lost unless it never began. The files go when that is committed."""
        if self._ran_last(attempt):
            await self._add_output(call, attempt["worker"])
        end = await asyncio.to_thread(self._spool.outcome, attempt["worker"], call.token, stopped_by)
        if end is None and self._never_began(attempt):
            end = _unbegun(stopped_by)
        if end is None and want_of_memory:
            end = died("ended while this daemon only waited for it", None, want_of_memory, stopped_by)
        if end is None:
            why = "the daemon was restarted" if attempt["boot_id"] == self._clock.boot_id() else "the host went down while it ran"
            end = AttemptEnd("died", message=f"{why} and the worker's outcome is lost", reason=Reason.LOST, stopped_by=stopped_by)
        self._jobs.attempt_ended(call, call.token, end)

    async def _add_output(self, call: Call, worker: str) -> None:
        """Once, and page by page: what stands there is the worker's word, and others wait meanwhile."""
        if worker in self._heard or (place := self._spool.place(worker, call.log.size)) is None:
            return
        self._heard.add(worker)
        call.log.cut(place)
        offset, end = -1, 0
        while offset < end:
            offset = end
            records, end = await asyncio.to_thread(self._spool.output, worker, offset)
            for stream, data in records:
                self._jobs.add_output(call, stream, data)
        self._spool.drop_output(worker)

    def _never_began(self, attempt: Row) -> bool:
        """As the page of its dead worker says. What that held before the machine went down was never synced, and says nothing."""
        begun = self._page(attempt)
        return begun is not None and attempt["position"] > begun.position

    def _never_begins(self, attempt: Row) -> bool:
        """The same of a worker that lives, and has noticed that its daemon is gone."""
        begun = self._page(attempt)
        return begun is not None and begun.is_last and attempt["position"] > begun.position

    def _ran_last(self, attempt: Row) -> bool:
        """What was printed without a daemon is of the call that was begun last."""
        begun = self._page(attempt)
        return begun is None or attempt["position"] >= begun.position

    def _page(self, attempt: Row) -> Begun | None:
        if attempt["boot_id"] != self._clock.boot_id():
            return None
        return read_page(self._spool.progress_path(attempt["worker"]))


def _devices(attempt: Row) -> tuple[DeviceUuid, ...]:
    return tuple(DeviceUuid(uuid) for uuid in attempt["devices"].split())


def _unbegun(stopped_by: Reason | None) -> AttemptEnd:
    return AttemptEnd("unbegun", message="the worker had not begun it", stopped_by=stopped_by)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _identity(uid: int, gid: int, groups: list[int], limits: list[list[int]], name: str = "") -> Identity:
    """Older daemons did not store the name."""
    return Identity(uid, gid, tuple(groups), tuple((number, soft, hard) for number, soft, hard in limits), name)


def _request(row: Row) -> Request:
    document = json.loads(row["options"])
    instance = document.pop("instance", None)
    identity = document.pop("identity", None)
    return Request(
        key=row["submission_key"],
        spec=row["spec"],
        code=row["code"],
        modules=row["modules"],
        context=row["context"],
        arguments=row["arguments"],
        arguments_inline=row["arguments_inline"],
        options=parse_options(document),
        parent=row["parent"],
        instance=tuple(instance) if instance else None,
        identity=_identity(*identity) if identity else None,
    )
