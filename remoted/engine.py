"""The scheduler's hands: feeds it what happens and does what it decides.

The two use cases (durable jobs, direct calls) hand in tickets and hear back through ``TicketOwner``. This
module knows workers, devices and environments; it knows nothing of results, storage or clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from remoted import turn
from remoted.adopted import AdoptedWorker, entry_of
from remoted.clock import Clock
from remoted.cradle import Cradle, WorkerPlan
from remoted.dismissal import end_workers
from remoted.environments import EnvironmentFailed, EnvironmentSource
from remoted.errors import NoAccount, SpawnError
from remoted.fdstore import Entry, FdStore
from remoted.gate import Gate
from remoted.gpu.facts import Devices
from remoted.gpu.locks import DeviceLocks
from remoted.gpu.nvml import Nvml, NvmlError
from remoted.gpu.strangers import find_all
from remoted.hearers import Hearers
from remoted.holders import Holders
from remoted.limits import Limits
from remoted.model import DeviceUuid, Reason, WorkerId
from remoted.owners import TicketOwner
from remoted.plans import Plans
from remoted.scheduler import events
from remoted.scheduler.policy import Scheduler
from remoted.scheduler.state import Need, PoolPolicy, Ticket, TicketId, Turns
from remoted.spawn import shutdown
from remoted.spawn.births import Births, Start
from remoted.spawn.memory import SAMPLE_SECONDS, MemoryKills
from remoted.spent import Spent
from remoted.spool import Spool
from remoted.tasks import Tasks
from remoted.workers import Worker

log = logging.getLogger(__name__)
_ROUNDS_WITHOUT_DEVICES = 10
_TOLD_PER_LANE = 16
#: Who waits for these is not helped by others' leases coming to an end.
_NOBODY_IN_THE_WAY = frozenset({Reason.STARTING, Reason.WAITING_ENV, Reason.FOREIGN_GPU_USE})


class Engine:
    """One host's scheduler, its workers and devices."""

    def __init__(self, scheduler: Scheduler, clock: Clock, limits: Limits, nvml: Nvml, locks: DeviceLocks, poll_seconds: float, environments: EnvironmentSource, births: Births, sockets: Path, spool: Spool, gate: Gate, fdstore: FdStore) -> None:
        self.scheduler = scheduler
        self.spool = spool
        self.cradle = Cradle(limits, sockets)
        self.devices = Devices()
        self.workers: dict[WorkerId, Worker] = {}
        self.births = births
        self.gate = gate
        self.fdstore = fdstore
        #: Told at every step while somebody waits for what others hold.
        self.on_contention: Callable[[], None] = lambda: None
        #: Told when the host goes down, if that is noticed here first.
        self.on_shutdown: Callable[[], None] = lambda: None
        self.is_contended = False
        self._clock = clock
        self._limits = limits
        self._nvml = nvml
        self._locks = locks
        self.poll_seconds = poll_seconds
        self._environments = environments
        self.plans = Plans()
        self._hearers = Hearers()
        self._deaf: dict[TicketId, TicketId] = {}
        self._owners: dict[TicketId, TicketOwner] = {}
        self.holders = Holders(self.handle, clock)
        self._told: dict[TicketId, Reason] = {}
        self._spent = Spent(partial(self.ended, has_returned=True))
        self._tasks = Tasks("engine")
        self._alarm = turn.Alarm(lambda: self.handle(events.Tick()))
        self._turn = turn.current()
        self._is_step_open = False
        self._look: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self.is_stopping = False
        self._memory_kills = MemoryKills()

    # -- for the use cases ---------------------------------------------------------------------------------

    def submit(self, ticket: Ticket, policy: PoolPolicy, owner: TicketOwner, behind: tuple[Ticket, ...] = ()) -> None:
        """Queue a ticket, and others of its lane; the owner hears when they have workers."""
        self._owners |= dict.fromkeys((each.id for each in (ticket, *behind)), owner)
        event = events.Submitted(ticket, policy, behind)
        if ticket.need.gpu is not None and self._clock.monotonic() - self.devices.seen_at >= self.poll_seconds:
            self.spawn(self._look_then(event))
        else:
            self._enter(event)

    async def _look_then(self, event: events.Submitted) -> None:
        """A burst of submissions looks once."""
        if self._look is None or self._look.done():
            self._look = asyncio.get_running_loop().create_task(self.look_at_devices())
        await asyncio.shield(self._look)
        wanted = tuple(ticket for ticket in (event.ticket, *event.behind) if ticket.id in self._owners)
        if wanted:
            self._enter(events.Submitted(wanted[0], event.policy, wanted[1:]))

    def _enter(self, event: events.Submitted) -> None:
        """To the scheduler, or to those who wait for the end of a drain."""
        if self.is_closed_to(event.ticket.ancestors):
            for ticket in (event.ticket, *event.behind):
                self._hold(ticket, event.policy)
        else:
            self.handle(event)

    def withdraw(self, ticket_id: TicketId) -> None:
        self._owners.pop(ticket_id, None)
        self._told.pop(ticket_id, None)
        if self.gate.held.pop(ticket_id, None) is None:
            self.handle(events.Withdrawn(ticket_id))

    def forget(self, ticket_id: TicketId) -> None:
        """Whatever the ticket was, it is no more; usually the scheduler has let go of it already."""
        self._owners.pop(ticket_id, None)
        self._told.pop(ticket_id, None)
        if ticket_id in self.scheduler.placed:
            self.ended(ticket_id)
        elif ticket_id in self.scheduler.tickets or ticket_id in self.gate.held:
            self.withdraw(ticket_id)

    def spent(self, ticket_id: TicketId, worker: Worker | None) -> bool:
        """As ``ended``, of a call that is forgotten soon: while nobody waits the scheduler hears of it then, or before anything else. False: it must hear now."""
        if worker is None or self.scheduler.users or worker.ahead_count:
            return False
        self._spent.add(ticket_id)
        return True

    def ended(self, ticket_id: TicketId, has_returned: bool = False) -> None:
        """The attempt is over; its worker is free."""
        self._spent.discard(ticket_id)
        self._owners.pop(ticket_id, None)
        worker = self.workers.get(self.scheduler.placed.get(ticket_id, WorkerId("")))
        if worker is None or not worker.is_alive or self.is_stopping or not self.scheduler.pass_on(ticket_id):
            self._close_useless(ticket_id, has_returned)
            self.handle(events.Ended(ticket_id))

    def returned(self, ticket_id: TicketId, owner: TicketOwner) -> bool:
        """What the worker was given ahead did not begin there: it waits again. False if no worker here has it."""
        if ticket_id not in self.scheduler.placed:
            return False
        self._owners[ticket_id] = owner  # of one that was adopted nobody has been told
        self._close_useless(ticket_id)
        ticket = self.scheduler.tickets[ticket_id]
        if self.is_closed_to(ticket.ancestors):
            policy = self.scheduler.policies[ticket.need.pool]
            self.handle(events.Ended(ticket_id))
            self._hold(ticket, policy, first=True)
        else:
            self.handle(events.Returned(ticket_id))
        return True

    def _close_useless(self, ticket_id: TicketId, has_returned: bool = False) -> None:
        """Nobody else is given to the dead, nor to one that is full of what its calls have left behind. ``has_returned``: it did not die of this call."""
        worker = self.workers.get(self.scheduler.placed.get(ticket_id, WorkerId("")))
        if worker is not None and not worker.is_alive:
            self.handle(events.WorkerClosing(worker.id, is_dead=has_returned))
        elif worker is not None and not worker.has_attempts and worker.family.is_full:
            self.retire(worker, "its processes take up what it may have")

    def line_behind(self, worker: Worker) -> Iterator[TicketId]:
        """What could be given to the worker ahead, the next one first."""
        return self.scheduler.line_behind(worker.id)

    def run_ahead(self, worker: Worker, count: int) -> None:
        """Give it so many of these."""
        self.handle(events.RunAhead(worker.id, count))

    def retire(self, worker: Worker, why: str) -> None:
        """The worker takes no more calls and ends when what runs in it is over."""
        self.handle(events.WorkerClosing(worker.id))
        self.spawn(worker.end(why))

    def blocked(self, ticket_id: TicketId, waiting: bool) -> None:
        self.handle(events.Blocked(ticket_id, waiting))

    def drop_instance(self, instance: str) -> None:
        self.handle(events.InstanceDropped(instance))

    def waiting_for(self, ticket_id: TicketId) -> tuple[Reason, str, int] | None:
        """(why, detail, place in its lane) of a waiting ticket."""
        if (found := self.scheduler.lane_of(ticket_id)) is None:
            return None
        lane, place = found
        return lane.reason, lane.detail, place

    # -- drain ---------------------------------------------------------------------------------------------

    def is_closed_to(self, ancestors: tuple[TicketId, ...]) -> bool:
        """A drain holds everything back but what running bodies call: without that they would not go on."""
        return self.gate.is_closed and not any(above in self.scheduler.placed for above in ancestors)

    def drain(self) -> None:
        """The gate is closed: what waits, waits there or is refused; what has begun goes on."""
        waiting = [ticket for ticket in self.scheduler.in_order_of_arrival() if self.is_closed_to(ticket.ancestors)]
        held = [(ticket, self.scheduler.policies[ticket.need.pool]) for ticket in waiting]
        self.handle(events.Cleared(tuple(ticket.id for ticket in waiting)))
        for ticket, policy in held:
            if self._owners[ticket.id].keeps_outcomes:
                self._hold(ticket, policy)
            else:
                self._tell_unplaceable(ticket.id, Reason.DRAINED, f"cannot run it: {self.gate.drain}")
        for worker in self.workers.values():
            worker.recall()

    def resume(self) -> None:
        """Those who were held back come in, in the order in which they came."""
        for ticket, policy in self.gate.open():
            self.submit(ticket, policy, self._owners[ticket.id])

    def _hold(self, ticket: Ticket, policy: PoolPolicy, first: bool = False) -> None:
        self.gate.hold(ticket, policy, first)
        self._told.pop(ticket.id, None)
        self._owners[ticket.id].on_waiting(ticket.id, Reason.DRAINED)

    # -- one step ------------------------------------------------------------------------------------------

    def handle(self, event: events.Event) -> None:
        """Feed the scheduler and do what it says."""
        if self.is_stopping:
            return
        self._spent.tell()
        for decision in self.scheduler.handle(event, self._clock.monotonic()):
            self._carry_out(decision)
        if not self._is_step_open:
            self._is_step_open = True
            self._turn.soon(self._end_step)

    def _end_step(self) -> None:
        """Once for all that happened in one turn of the loop."""
        self._is_step_open = False
        if self.is_stopping:
            return
        self._tell_reasons()
        if self.is_contended:
            self.on_contention()
        self._set_timer()

    def _tell_reasons(self) -> None:
        """Those at the head of each lane hear why they wait, when it changes; the rest may ask."""
        self.is_contended = False
        for lanes in self.scheduler.users.values():
            for lane in lanes.values():
                self.is_contended |= bool(lane.tickets) and lane.reason not in _NOBODY_IN_THE_WAY
                for _, ticket in islice(lane.tickets, _TOLD_PER_LANE):
                    owner = self._owners.get(ticket.id)
                    if owner is not None and self._told.get(ticket.id) is not lane.reason:
                        self._told[ticket.id] = lane.reason
                        owner.on_waiting(ticket.id, lane.reason)

    def _carry_out(self, decision: events.Decision) -> None:
        match decision:
            case events.Assign(ticket_id, worker_id):
                view = self.scheduler.workers[worker_id]
                self._told.pop(ticket_id, None)
                self._owners[ticket_id].on_assigned(ticket_id, self.workers[worker_id], view.devices, decision)
            case events.StartWorker(worker_id, need, devices):
                self.spawn(self._start_worker(worker_id, need, devices, self._plan_of(need)))
            case events.StopWorker(worker_id, why):
                self.spawn(self.workers[worker_id].end(why))
            case events.Refuse(ticket_id, reason, message, detail):
                if hearer := self._deaf.get(ticket_id):
                    detail = f"what the installer printed is in the error of {hearer}"
                self._tell_unplaceable(ticket_id, reason, message, detail)
            case events.Build(environment, ticket_id):
                self.spawn(self._build(environment, self._plan_of(self.scheduler.tickets[ticket_id].need)))

    def _tell_unplaceable(self, ticket_id: TicketId, reason: Reason, message: str, detail: str = "") -> None:
        self._told.pop(ticket_id, None)
        if (owner := self._owners.pop(ticket_id, None)) is not None:
            owner.on_unplaceable(ticket_id, reason, message, detail)

    def _set_timer(self) -> None:
        if (wakeup := self.scheduler.next_wakeup()) is not None:
            self._alarm.set(wakeup, self._clock.monotonic())

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task of the engine's: kept, and its failure logged."""
        return self._tasks.spawn(coroutine)

    # -- workers -------------------------------------------------------------------------------------------

    def _plan_of(self, need: Need) -> WorkerPlan | None:
        """How such workers are started: as it is remembered, else as those say who wait for one. None: it is forgotten, and nobody waits."""
        if plan := self.plans.find(need.uid, need.kind):
            return plan
        lanes = self.scheduler.users.get(need.uid, {}).values()
        ticket_id = next((lane.tickets.head[1].id for lane in lanes if lane.need.kind == need.kind and lane.tickets), "")
        owner = self._owners.get(ticket_id)
        return owner.plan_of(ticket_id) if owner is not None else None

    async def _start_worker(self, worker_id: WorkerId, need: Need, devices: tuple[DeviceUuid, ...], plan: WorkerPlan | None) -> None:
        worker = Worker(worker_id, self._clock, self._limits, self._memory_kills, self._on_worker_dead)
        if not self.workers:
            self._sample_memory()
        self.workers[worker_id] = worker
        if not self._locks.acquire(devices):
            self._forget_worker(worker)  # another daemon was faster; the look that follows sees it
            return
        try:
            if plan is None:
                raise SpawnError("cannot start a worker: nobody says any more how; the next call of its pool does")
            await self.cradle.require_account(plan.identity)
            python, extra = await self._interpreter(plan)
            environ = {**plan.environ, **extra, "REMOTED_PYTHON": plan.executable, **self.cradle.variables(worker_id, devices, has_devices=bool(self.devices.known))}
            start = Start(need.uid, python, environ, plan.preload, tuple(sorted(plan.hints)), plan.import_environ)
            hello = await worker.start(self.births, self.cradle.prepare(worker_id, plan, start, self.devices.cards(devices)), self.spool)
            if problem := hello.explain_mismatch(plan.version):
                await worker.end(problem, grace_seconds=0)
                raise SpawnError(f"cannot use the worker: {problem}")
        except (SpawnError, EnvironmentFailed, OSError) as error:
            log.warning("%s", error)
            if not await self._ends_with_the_host():
                self._fail_one_waiting(need, error)
            self._forget_worker(worker)
            return
        if worker.is_alive:
            self._leave_to_the_next(worker, need, devices)
            self.handle(events.WorkerReady(worker_id))

    def _leave_to_the_next(self, worker: Worker, need: Need, devices: tuple[DeviceUuid, ...]) -> None:
        """It outlives this daemon from now on, where systemd keeps descriptors."""
        entry = entry_of(worker, need, self.scheduler.policies.get(need.pool, PoolPolicy()), devices)
        if entry is not None:
            self.fdstore.keep(entry)

    async def _interpreter(self, plan: WorkerPlan) -> tuple[str, Mapping[str, str]]:
        """(program, variables). An environment that was pruned or outdated since is built again (MECHANISMS 10)."""
        if plan.environment is None:
            return plan.executable, {}
        found = await self._environments.ensure(plan.environment, lambda data: None, plan.build_environ)
        return found.python, found.variables

    async def _ends_with_the_host(self) -> bool:
        """Is something gone wrong because the daemon ends, or the host? Whoever waits for it goes on waiting, for the next one."""
        if not self.is_stopping and await shutdown.is_under_way():
            log.warning("the host goes down: nothing is started any more")
            self.freeze()
            self.on_shutdown()
        return self.is_stopping

    def _fail_one_waiting(self, need: Need, error: Exception) -> None:
        """One ticket pays for one failed start, so that a broken interpreter cannot be tried for ever."""
        why = Reason.UNKNOWN_USER if isinstance(error, NoAccount) else Reason.WORKER_START_FAILED
        for lane, _, ticket in self.scheduler.waiting():
            if lane.need == need:
                owner = self._owners.pop(ticket.id, None)
                self.handle(events.Withdrawn(ticket.id))
                if owner is not None:
                    owner.on_unplaceable(ticket.id, why, str(error), "")
                return

    def _on_worker_dead(self, worker: Worker) -> None:
        if worker.hello is not None or worker.id in self.workers:
            self._forget_worker(worker)

    def _forget_worker(self, worker: Worker) -> None:
        self._spent.tell()
        if self.workers.pop(worker.id, None) is None:
            return
        self.spool.remove(worker.id)
        self.fdstore.forget(worker.id)
        view = self.scheduler.workers.get(worker.id)
        if view is not None and view.devices:
            self.handle(events.WorkerClosing(worker.id, is_dead=True))  # nobody is given to it meanwhile
            self.spawn(self._free_devices(worker.id))
        else:
            self.handle(events.WorkerEnded(worker.id))

    async def _free_devices(self, worker_id: WorkerId) -> None:
        """Its processes are dead; look at the devices before they are lent again (promise 9)."""
        view = self.scheduler.workers[worker_id]
        await self.look_at_devices()
        self._locks.release(view.devices)
        self.handle(events.WorkerEnded(worker_id))

    # -- of earlier daemons --------------------------------------------------------------------------------

    def adopt(self, entry: Entry) -> AdoptedWorker:
        """It holds what it held; who has not been asked yet is as one that starts. Raises OSError, ValueError."""
        about = entry.about
        worker = AdoptedWorker(entry, self.spool, self._clock, self._limits, self._memory_kills, self.cradle.cgroups, self._on_worker_dead)
        if not self._locks.acquire(about.devices):
            log.warning("another daemon has taken a device of worker %s", about.id)
        self.workers[about.id] = worker
        self.handle(events.WorkerAdopted(about.id, about.need, about.devices, about.policy))
        return worker

    # -- environments --------------------------------------------------------------------------------------

    async def _build(self, environment: str, plan: WorkerPlan | None) -> None:
        try:
            if plan is None or plan.environment is None:
                raise EnvironmentFailed("cannot build the environment: nobody says any more what it is made for; call again")
            await self.cradle.require_account(plan.identity)
            await self._environments.ensure(plan.environment, lambda data: self._on_build_output(environment, data), plan.build_environ)
        except Exception as error:  # whatever went wrong: those who wait must hear of it
            text = getattr(error, "log", "")
            if not isinstance(error, (EnvironmentFailed, NoAccount)):
                log.exception("cannot build environment %s", environment)
            if await self._ends_with_the_host():
                return
            self._deaf = self._hearers.deaf(environment, self._callers_of(environment))
            self.handle(events.EnvironmentFailed(environment, str(error), text))
            self._deaf = {}
        else:
            self.handle(events.EnvironmentReady(environment))
        finally:
            self._hearers.forget(environment)

    def _on_build_output(self, environment: str, data: bytes) -> None:
        """Of each caller one waiting call shows it and keeps it; a build with many calls behind it is told once."""
        for ticket_id in self._hearers.choose(environment, self._callers_of(environment)).values():
            self._owners[ticket_id].on_build_output(ticket_id, data)

    def _callers_of(self, environment: str) -> dict[TicketId, str]:
        """Who waits for this environment, and whose they are."""
        waiting = [ticket.id for lane, _, ticket in self.scheduler.waiting() if lane.need.environment == environment]
        return {ticket_id: self._owners[ticket_id].caller_of(ticket_id) for ticket_id in waiting if ticket_id in self._owners}

    # -- devices -------------------------------------------------------------------------------------------

    async def look_at_devices(self) -> None:
        """Ask NVML and tell the scheduler; when it does not answer, nothing is lent."""
        async with self._looking:  # looks end in the order in which they began
            try:
                known = await self._nvml.devices()
                uses = await self._nvml.uses() if known else ()
                cuda = await self._nvml.driver_cuda_version() if known else None
            except NvmlError as error:
                self.devices.problem = str(error)
                self.handle(events.DevicesSeen((), problem=str(error)))
                return
            found = await asyncio.to_thread(find_all, uses, self._processes_of_holder, self._locks.taken_by_others) if uses else {}
            foreign = {uuid: strangers.taking for uuid, strangers in found.items() if strangers.taking}
            desktop = {uuid: strangers.desktop for uuid, strangers in found.items() if strangers.desktop}
            self.devices = Devices(known, uses, foreign, desktop, cuda, self._clock.monotonic(), "; ".join(self._nvml.lost))
            self.handle(events.DevicesSeen(known, tuple(foreign.items())))

    def _processes_of_holder(self, uuid: DeviceUuid) -> set[int]:
        worker = self.workers.get(self.scheduler.ledger.holders.get(uuid, WorkerId("")))
        return worker.family.pids() if worker is not None else set()

    # -- life ----------------------------------------------------------------------------------------------

    async def watch_devices(self) -> None:
        """For as long as the daemon lives: devices are looked at while somebody waits for one.

        Where there are none they are looked for now and then: the driver may be loaded after the daemon starts.
        """
        rounds = 0
        while True:
            await asyncio.sleep(self.poll_seconds)
            rounds += 1
            if self.scheduler.turns[Turns.DEVICES] or (not self.devices.known and rounds % _ROUNDS_WITHOUT_DEVICES == 0):
                await self.look_at_devices()

    async def watch_memory(self) -> None:
        """For as long as the daemon lives: remember how often the kernel has killed for want of memory."""
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            if self.workers:
                self._sample_memory()

    def dismiss_idle_servers(self) -> None:
        self.births.dismiss_idle({worker.born_as.server for worker in self.workers.values() if worker.born_as is not None})

    def _sample_memory(self) -> None:
        self._memory_kills.sample([worker.pid for worker in self.workers.values() if worker.pid])

    def freeze(self) -> None:
        """The daemon ends: nothing is begun, started or refused from here on."""
        self.is_stopping = True
        self._alarm.cancel()

    async def close(self, leaves_idle: bool = False) -> None:
        """Leave the workers that run something to the next daemon, and idle ones that it will find; end the others."""
        left = [worker for worker in self.workers.values() if worker.runs_on or (leaves_idle and not worker.has_attempts and self.fdstore.keeps(worker.id))]
        for worker in left:
            worker.leave()
        others = [worker for worker in self.workers.values() if worker not in left]
        await end_workers(others)
        await self._tasks.cancel()
        await self.births.close()
