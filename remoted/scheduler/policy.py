"""The scheduler: an event goes in, decisions come out. No I/O, no clock, no randomness.

Within one user tickets go by priority, then first come, first served; between users in turns, one placement
each, separately for what needs devices, what reserves CPUs, and the rest. A ticket is *placed* by giving it to
a free worker of its need, else by starting one, else by ending an idle worker that is in the way. Starting one
uses the turn: the first ticket of a fresh worker goes to whom it was started for. What is only waiting for an
earlier decision (a worker that starts, a device that is being emptied) is never decided twice: starting and
ending workers are part of the state.

A ticket that needs several devices or CPUs at once would be passed for ever by those that need one. After
``patience_seconds`` the oldest such ticket *claims* what it needs: nobody else gets it before.

A body that waits for its nested call lends its CPUs and its place in the pool, not its devices. So calls
can wait for each other in a ring over devices (``rings``); then one of them runs inside its own ancestor's
worker (equal need), or is refused (MECHANISMS 15). Waiting for a worker that *runs* is no ring: it ends by
itself or by its time limit.

The same object runs in the daemon, in ``simulate`` and under the property tests; ``validate`` states what
must hold after every event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import assert_never

from remoted.model import DeviceUuid, Reason, Uid, WorkerId
from remoted.scheduler.events import (
    Assign,
    Blocked,
    Build,
    Decision,
    DevicesSeen,
    Ended,
    EnvironmentReady,
    Event,
    InstanceDropped,
    PoolHeld,
    Refuse,
    StartWorker,
    StopWorker,
    Submitted,
    Tick,
    Withdrawn,
    WorkerAdopted,
    WorkerClosing,
    WorkerEnded,
    WorkerReady,
)
from remoted.scheduler.ledger import Ledger
from remoted.scheduler.rings import find_host, stuck_tickets
from remoted.scheduler.state import Lane, LaneKey, Need, PoolKey, PoolPolicy, Ticket, TicketId, Turns, WorkerState, WorkerView

_PATIENCE_SECONDS = 10.0


class Scheduler:
    """All waiting and running tickets, all workers, all devices of one host."""

    def __init__(self, cpus: float, workers_total: int = 256, worker_prefix: str = "w", patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self.cpus = cpus
        self.workers_total = workers_total
        self.ledger = Ledger()
        self.workers: dict[WorkerId, WorkerView] = {}
        self.policies: dict[PoolKey, PoolPolicy] = {}
        self.held_until: dict[PoolKey, float] = {}
        self.users: dict[Uid, dict[LaneKey, Lane]] = {}
        self.turns: dict[Turns, deque[Uid]] = {kind: deque() for kind in Turns}
        self.tickets: dict[TicketId, Ticket] = {}
        self.placed: dict[TicketId, WorkerId] = {}
        #: Known nested tickets by the body that called them.
        self.children: dict[TicketId, dict[TicketId, None]] = {}
        #: Where the objects of remote classes live.
        self.homes: dict[str, WorkerId] = {}
        self.environments: set[str] = set()
        self._building: set[str] = set()
        self._patience = patience_seconds
        self._prefix = worker_prefix
        self._sequence = 0
        self._step = 0
        self._facts = 0
        self._worker_count = 0
        self._wide: dict[tuple[Uid, LaneKey], Lane] = {}
        #: What the oldest wide lanes claim in this step.
        self._device_claim: tuple[Lane | None, frozenset[DeviceUuid]] = (None, frozenset())
        self._cpu_claim: Lane | None = None

    # -- one step ------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Apply one event at ``now`` (monotonic seconds) and place what can be placed."""
        decisions: list[Decision] = []
        is_only_news = self._is_only_news(event)
        self._apply(event, now)
        if isinstance(event, (DevicesSeen, Ended, WorkerReady)):
            self._stop_lost(now, decisions)
        if not is_only_news:
            self._place_all(now, decisions)
        if isinstance(event, Submitted):
            self._place_lane(_lane_key(event.ticket), now, decisions)
        while self._resolve_ring(now, decisions):
            self._place_all(now, decisions)
        self._reap_idle(now, decisions)
        self._keep_minimum(now, decisions)
        return decisions

    def next_wakeup(self) -> float | None:
        """When a ``Tick`` is next needed (monotonic seconds); None while only events matter."""
        times = [
            worker.since + self._idle_timeout(worker)
            for worker in self.workers.values()
            if worker.state is WorkerState.IDLE and not self._is_kept(worker)
        ]
        times += self.held_until.values()
        return min(times, default=None)

    def _is_only_news(self, event: Event) -> bool:
        """A submission changes nothing for the other lanes: they were blocked before and still are."""
        return isinstance(event, Submitted) and self.policies.get(event.ticket.need.pool) in (None, event.policy)

    def _apply(self, event: Event, now: float) -> None:
        match event:
            case Submitted(ticket, policy):
                self.policies[ticket.need.pool] = policy
                self._enqueue(ticket)
            case Withdrawn(ticket_id):
                self._dequeue(ticket_id)
            case Ended(ticket_id):
                self._release(ticket_id, now)
            case Blocked(ticket_id, waiting):
                self._block(ticket_id, waiting)
            case WorkerReady(worker_id):
                self._set_state(worker_id, WorkerState.IDLE, now)
            case WorkerClosing(worker_id):
                self._set_state(worker_id, WorkerState.ENDING, now)
            case WorkerEnded(worker_id):
                self._forget_worker(worker_id)
            case WorkerAdopted(worker_id, ticket, devices):
                self._adopt(worker_id, ticket, devices, now)
            case DevicesSeen(devices, foreign, problem):
                self.ledger.see(devices, dict(foreign), problem)
                self._facts += 1
            case InstanceDropped(instance):
                self.homes.pop(instance, None)
            case EnvironmentReady(environment):
                self._facts += 1
                self.environments.add(environment)
                self._building.discard(environment)
            case PoolHeld(pool, until):
                self.held_until[pool] = max(until, self.held_until.get(pool, 0.0))
            case Tick():
                self.held_until = {pool: until for pool, until in self.held_until.items() if until > now}
            case _:
                assert_never(event)

    # -- the queue -----------------------------------------------------------------------------------------

    def _enqueue(self, ticket: Ticket) -> None:
        if ticket.id in self.tickets:
            raise ValueError(f"cannot queue {ticket.id}: it is already known")
        self._know(ticket)
        uid, key = ticket.need.uid, _lane_key(ticket)
        lanes = self.users.setdefault(uid, {})
        if key not in lanes:
            self._open_lane(uid, key, lanes)
        self._sequence += 1
        lanes[key].tickets.add(self._sequence, ticket)

    def _open_lane(self, uid: Uid, key: LaneKey, lanes: dict[LaneKey, Lane]) -> None:
        lane = lanes[key] = Lane(key[0], key[1], key[2])
        if lane.is_wide:
            self._wide[uid, key] = lane
        if uid not in self.turns[lane.turns]:
            self.turns[lane.turns].append(uid)

    def _know(self, ticket: Ticket) -> None:
        self.tickets[ticket.id] = ticket
        if ticket.ancestors:
            self.children.setdefault(ticket.ancestors[-1], {})[ticket.id] = None

    def _forget(self, ticket_id: TicketId) -> None:
        ticket = self.tickets.pop(ticket_id, None)
        if ticket is None or not ticket.ancestors:
            return
        siblings = self.children[ticket.ancestors[-1]]
        del siblings[ticket_id]
        if not siblings:
            del self.children[ticket.ancestors[-1]]

    def _dequeue(self, ticket_id: TicketId) -> None:
        """Take a waiting ticket away; unknown and placed ones are left alone."""
        ticket = self.tickets.get(ticket_id)
        if ticket is None or ticket_id in self.placed:
            return
        lane = self.users[ticket.need.uid][_lane_key(ticket)]
        lane.tickets.remove(ticket_id)
        self._forget(ticket_id)
        self._drop_empty(lane)

    def _pop(self, lane: Lane) -> Ticket:
        ticket = lane.tickets.pop()
        lane.blocked_since, lane.explained = None, -1
        self._drop_claims(lane)
        self._drop_empty(lane)
        return ticket

    def _drop_empty(self, lane: Lane) -> None:
        if lane.tickets:
            return
        uid, key = lane.need.uid, (lane.need, lane.priority, lane.cpus)
        lanes = self.users[uid]
        del lanes[key]
        self._wide.pop((uid, key), None)
        if not any(other.turns is lane.turns for other in lanes.values()):
            self.turns[lane.turns].remove(uid)
        if not lanes:
            del self.users[uid]

    def lane_of(self, ticket_id: TicketId) -> tuple[Lane, int] | None:
        """The lane of a waiting ticket and its place there (0 = next); None once it is placed."""
        ticket = self.tickets.get(ticket_id)
        if ticket is None or ticket_id in self.placed:
            return None
        lane = self.users[ticket.need.uid][_lane_key(ticket)]
        return lane, next(place for place, item in enumerate(lane.tickets) if item[1].id == ticket_id)

    # -- running -------------------------------------------------------------------------------------------

    def _release(self, ticket_id: TicketId, now: float) -> None:
        worker_id = self.placed.pop(ticket_id, None)
        if worker_id is None:
            return
        self._forget(ticket_id)
        worker = self.workers.get(worker_id)
        if worker is None:
            return
        worker.running.pop(ticket_id, None)
        worker.waiting.discard(ticket_id)
        if not worker.running and worker.state is WorkerState.BUSY:
            worker.state, worker.since = WorkerState.IDLE, now

    def _block(self, ticket_id: TicketId, waiting: bool) -> None:
        worker = self.workers.get(self.placed.get(ticket_id, WorkerId("")))
        if worker is None:
            return
        if waiting:
            worker.waiting.add(ticket_id)
        else:
            worker.waiting.discard(ticket_id)

    def _set_state(self, worker_id: WorkerId, state: WorkerState, now: float) -> None:
        worker = self.workers.get(worker_id)
        if worker is None or worker.state is WorkerState.ENDING:
            return
        worker.state, worker.since = state, now
        worker.expected_cpus = 0.0
        if state is WorkerState.ENDING:
            self._clear_homes(worker_id)

    def _forget_worker(self, worker_id: WorkerId) -> None:
        worker = self.workers.pop(worker_id, None)
        self.ledger.give_back(worker_id)
        self._clear_homes(worker_id)
        for ticket_id in list(worker.running) if worker else []:
            self.placed.pop(ticket_id, None)
            self._forget(ticket_id)

    def _clear_homes(self, worker_id: WorkerId) -> None:
        """Its instances are constructed again by their next calls, elsewhere."""
        self.homes = {instance: home for instance, home in self.homes.items() if home != worker_id}

    def _adopt(self, worker_id: WorkerId, ticket: Ticket, devices: tuple[DeviceUuid, ...], now: float) -> None:
        view = WorkerView(worker_id, ticket.need, devices, WorkerState.ENDING, now, {ticket.id: ticket})
        self.workers[worker_id] = view
        self._know(ticket)
        self.placed[ticket.id] = worker_id
        self.ledger.lend(worker_id, devices)

    # -- placing -------------------------------------------------------------------------------------------

    def _place_all(self, now: float, decisions: list[Decision]) -> None:
        """Fresh workers get what they were started for; then users in turns until a whole round places nothing."""
        self._step += 1
        self._renew_claims(now)
        self._serve_fresh(now, decisions)
        for kind in Turns:
            self._take_turns(kind, now, decisions)

    def _take_turns(self, kind: Turns, now: float, decisions: list[Decision]) -> None:
        turns = self.turns[kind]
        misses = 0
        while turns and misses < len(turns):
            if kind is Turns.DEVICES and not self._has_device_to_give():
                turns.rotate(misses)  # nobody after them has had a turn
                self._explain_rest(now)
                return
            uid = turns[0]
            turns.rotate(-1)
            misses = 0 if self._place_one_of(uid, kind, now, decisions) else misses + 1

    def _place_one_of(self, uid: Uid, kind: Turns, now: float, decisions: list[Decision]) -> bool:
        """True if this user's turn was used. Within one step nothing comes free, so who failed once is not tried again."""
        for lane in self._lanes_in_order(uid):
            if lane.turns is kind and lane.failed_step != self._step:
                if self._place(lane, now, decisions):
                    return True
                lane.failed_step = self._step
        return False

    def _has_device_to_give(self) -> bool:
        """Without one no lane that needs devices can be placed, or make an idle worker end."""
        return any(worker.devices and worker.has_room for worker in self.workers.values()) or any(map(self.ledger.is_free, self.ledger.devices))

    def _explain_rest(self, now: float) -> None:
        """Lanes that nobody tried say what they wait for now; those that already did, have not changed."""
        for uid in self.turns[Turns.DEVICES]:
            for lane in self.users[uid].values():
                if lane.turns is Turns.DEVICES and (lane.explained != self._facts or lane.reason is Reason.STARTING):
                    self._explain_untried(lane, now)

    def _explain_untried(self, lane: Lane, now: float) -> None:
        lane.explained = self._facts
        self._note_blocked(lane, now)
        if not self._is_coming(lane) and not self._lacks_environment(lane):
            self._explain_devices(lane)

    def _is_coming(self, lane: Lane) -> bool:
        return any(worker.state is WorkerState.STARTING and worker.fits(lane.need) for worker in self.workers.values())

    def _lacks_environment(self, lane: Lane) -> bool:
        return lane.need.environment is not None and lane.need.environment not in self.environments

    def _lanes_in_order(self, uid: Uid) -> list[Lane]:
        lanes = list(self.users.get(uid, {}).values())
        return sorted(lanes, key=lambda lane: lane.rank) if len(lanes) > 1 else lanes

    def _place_lane(self, key: LaneKey, now: float, decisions: list[Decision]) -> None:
        """Place what one lane can; nobody else has anything to gain."""
        uid = key[0].uid
        while lane := self.users.get(uid, {}).get(key):
            if not self._place(lane, now, decisions):
                return
            turns = self.turns[lane.turns]
            if uid in turns:
                turns.remove(uid)
                turns.append(uid)

    def _serve_fresh(self, now: float, decisions: list[Decision]) -> None:
        for worker in self.workers.values():
            if not worker.is_fresh or worker.state is not WorkerState.IDLE or not self._is_usable(worker):
                continue
            for lane in self._lanes_in_order(worker.need.uid):
                if self.may_run(worker, lane.need) and self._has_cpus(lane):
                    self._assign(self._pop(lane), worker, now, decisions)
                    break

    def _place(self, lane: Lane, now: float, decisions: list[Decision]) -> bool:
        """Give the lane's head to a worker or start one for it. True if something was used for it."""
        lane.explained = self._facts
        if self._awaits_environment(lane, decisions):
            return False
        if not self._has_cpus(lane):
            self._note_blocked(lane, now)
            lane.wait(Reason.WAITING_CPU, f"{lane.cpus:g} of {self.cpus:g} CPUs")
            return False
        if worker := self._free_worker(lane):
            self._assign(self._pop(lane), worker, now, decisions)
            return True
        if self.home_of(lane.need) is not None:
            lane.wait(Reason.WAITING_INSTANCE, "its worker is busy")
            return False
        return self._make_room(lane, now, decisions)

    def _awaits_environment(self, lane: Lane, decisions: list[Decision]) -> bool:
        environment = lane.need.environment
        if environment is None or environment in self.environments:
            return False
        lane.wait(Reason.WAITING_ENV, environment)
        if environment not in self._building:
            self._building.add(environment)
            decisions.append(Build(environment, lane.tickets.head[1].id))
        return True

    def fail_environment(self, environment: str) -> list[TicketId]:
        """The build failed: these waiting tickets are withdrawn; the next one to come tries to build again."""
        self._building.discard(environment)
        failed = [ticket.id for lane, _, ticket in self.waiting() if lane.need.environment == environment]
        for ticket_id in failed:
            self._dequeue(ticket_id)
        return failed

    def _has_cpus(self, lane: Lane, promised: float = 0.0) -> bool:
        if not lane.cpus:
            return True
        claim = self._cpu_claim.cpus if self._cpu_claim is not None and self._cpu_claim is not lane else 0.0
        return self.cpus_used() + lane.cpus + claim + promised <= self.cpus

    def cpus_used(self) -> float:
        """CPUs reserved by bodies that run (and do not wait for a nested call)."""
        return sum(
            ticket.cpus
            for worker in self.workers.values()
            for ticket_id, ticket in worker.running.items()
            if ticket_id not in worker.waiting
        )

    def home_of(self, need: Need) -> WorkerView | None:
        """The worker in which the need's instance lives."""
        return self.workers.get(self.homes[need.instance]) if need.instance in self.homes else None

    def may_run(self, worker: WorkerView, need: Need) -> bool:
        home = self.home_of(need)
        return worker.fits(need) if home is None else worker is home

    def _free_worker(self, lane: Lane) -> WorkerView | None:
        """The most recently used one: others may cool down and end."""
        barred = self._barred(lane)
        free = [
            worker
            for worker in self.workers.values()
            if worker.has_room and self.may_run(worker, lane.need) and self._is_usable(worker) and barred.isdisjoint(worker.devices)
        ]
        return max(free, key=lambda worker: (bool(worker.running), worker.since), default=None)

    def _is_usable(self, worker: WorkerView) -> bool:
        """The lease is of use now: residency is only a cache, and a stranger may have come meanwhile."""
        return all(self.ledger.is_usable(uuid) for uuid in worker.devices)

    def _assign(self, ticket: Ticket, worker: WorkerView, now: float, decisions: list[Decision], inline: bool = False) -> None:
        self.placed[ticket.id] = worker.id
        worker.running[ticket.id] = ticket
        worker.is_fresh = False
        if ticket.need.instance is not None:
            self.homes[ticket.need.instance] = worker.id
        if worker.state is WorkerState.IDLE:
            worker.state, worker.since = WorkerState.BUSY, now
        decisions.append(Assign(ticket.id, worker.id, inline))

    def _resolve_ring(self, now: float, decisions: list[Decision]) -> bool:
        """Of calls that wait for each other: run one inside an ancestor, or refuse the one that closed the ring."""
        if not self.children or not any(worker.waiting for worker in self.workers.values()):
            return False
        stuck = stuck_tickets(self)
        for ticket in stuck:
            host = find_host(self, ticket)
            if host is None:
                continue
            if self._has_cpus(self.users[ticket.need.uid][_lane_key(ticket)]):
                self._take(ticket)
                self._assign(ticket, host, now, decisions, inline=True)
                return True
        hopeless = [ticket for ticket in stuck if find_host(self, ticket) is None]
        if hopeless:
            self._refuse(hopeless[-1], decisions)
        return bool(hopeless)

    def _take(self, ticket: Ticket) -> None:
        """Out of its lane, but still known."""
        lane = self.users[ticket.need.uid][_lane_key(ticket)]
        lane.tickets.remove(ticket.id)
        self._drop_empty(lane)

    def _refuse(self, ticket: Ticket, decisions: list[Decision]) -> None:
        self._dequeue(ticket.id)
        chain = " > ".join((*ticket.ancestors, ticket.id))
        decisions.append(Refuse(ticket.id, Reason.WOULD_DEADLOCK, f"every device that could serve it is held by calls that wait for others: {chain}"))

    # -- claims of what needs several things at once --------------------------------------------------------

    def _note_blocked(self, lane: Lane, now: float) -> None:
        if lane.blocked_since is None:
            lane.blocked_since = now

    def _renew_claims(self, now: float) -> None:
        """The oldest impatient lanes claim all that they need; a lane claims nothing where an older one claims a part."""
        self._device_claim, self._cpu_claim = (None, frozenset()), None
        impatient = [lane for lane in self._wide.values() if lane.blocked_since is not None and now - lane.blocked_since >= self._patience]
        for lane in sorted(impatient, key=lambda lane: (lane.blocked_since, lane.rank)):
            if (lane.cpus and self._cpu_claim is not None) or (lane.need.gpu is not None and self._device_claim[1]):
                continue
            claimed = self._claimable(lane.need) if lane.need.gpu is not None else frozenset()
            if lane.need.gpu is not None and not claimed:
                continue
            self._cpu_claim = lane if lane.cpus else self._cpu_claim
            self._device_claim = (lane, claimed) if claimed else self._device_claim

    def _drop_claims(self, lane: Lane) -> None:
        """It has what it claimed, or something as good."""
        if self._device_claim[0] is lane:
            self._device_claim = (None, frozenset())
        if self._cpu_claim is lane:
            self._cpu_claim = None

    def _claimable(self, need: Need) -> frozenset[DeviceUuid]:
        """The devices of the best alternative that will come free soonest; none while strangers make it impossible."""
        assert need.gpu is not None
        for group in self.ledger.groups(need.gpu):
            usable = sorted((uuid for uuid in group if self.ledger.is_usable(uuid)), key=self._is_busy)
            if len(usable) >= need.gpu.count:
                return frozenset(usable[: need.gpu.count])
        return frozenset()

    def _is_busy(self, uuid: DeviceUuid) -> bool:
        holder = self.workers.get(self.ledger.holders.get(uuid, WorkerId("")))
        return holder is not None and bool(holder.running)

    def _barred(self, lane: Lane) -> frozenset[DeviceUuid]:
        claimer, claimed = self._device_claim
        return claimed if claimer is not lane else frozenset()

    # -- starting and ending workers -----------------------------------------------------------------------

    def _make_room(self, lane: Lane, now: float, decisions: list[Decision]) -> bool:
        """Start a worker for the lane, or end an idle one that is in the way. True if one was started."""
        need = lane.need
        starting = [worker for worker in self.workers.values() if worker.state is WorkerState.STARTING and worker.fits(need)]
        enough = len(starting) * need.concurrency >= self._count_waiting(need)
        promised = sum(worker.expected_cpus for worker in self.workers.values()) if lane.cpus else 0.0
        if enough or (starting and not self._has_cpus(lane, promised)):
            lane.wait(Reason.STARTING, *(worker.id for worker in starting))
            return False
        if not self._has_cpus(lane, promised):
            self._note_blocked(lane, now)
            lane.wait(Reason.WAITING_CPU, f"{lane.cpus:g} of {self.cpus:g} CPUs")
            return False
        return self._try_start(lane, now, decisions)

    def _count_waiting(self, need: Need) -> int:
        """Tickets that workers of this kind would serve; the calls of one instance are served by one."""
        lanes = [lane for lane in self.users[need.uid].values() if (lane.need.pool, lane.need.kind, lane.need.gpu) == (need.pool, need.kind, need.gpu)]
        plain = sum(len(lane.tickets) for lane in lanes if lane.need.instance is None)
        return plain + len({lane.need.instance for lane in lanes if lane.need.instance is not None and self.home_of(lane.need) is None}) * need.concurrency

    def _try_start(self, lane: Lane, now: float, decisions: list[Decision]) -> bool:
        need = lane.need
        counted = self._counted(need.pool)
        most = self.policies[need.pool].workers_max
        if len(counted) >= most:
            lane.wait(Reason.WAITING_WORKER, f"{len(counted)} of {most} workers are busy")
            self._evict([worker for worker in counted if not worker.fits(need)], counted, now, decisions)
            return False
        if len(self.workers) >= self.workers_total:
            lane.wait(Reason.WAITING_WORKER, f"the host has its {self.workers_total} workers")
            self._evict(self.workers.values(), self.workers.values(), now, decisions)
            return False
        devices = self.ledger.pick(need.gpu, self._barred(lane)) if need.gpu is not None else ()
        if devices is None:
            self._await_devices(lane, now, decisions)
            return False
        worker = self._start(need, devices, now, decisions)
        worker.is_fresh, worker.expected_cpus = True, lane.cpus
        lane.wait(Reason.STARTING, worker.id)
        self._drop_claims(lane)
        return True

    def _start(self, need: Need, devices: tuple[DeviceUuid, ...], now: float, decisions: list[Decision]) -> WorkerView:
        self._worker_count += 1
        worker = WorkerView(WorkerId(f"{self._prefix}{self._worker_count}"), need, devices, WorkerState.STARTING, now)
        self.workers[worker.id] = worker
        if devices:
            self.ledger.lend(worker.id, devices)
            self._facts += 1
        decisions.append(StartWorker(worker.id, need, devices))
        return worker

    def _counted(self, pool: PoolKey) -> list[WorkerView]:
        """Workers that use a place of the pool: all but those whose bodies wait for nested calls."""
        return [worker for worker in self.workers.values() if worker.need.pool == pool and not worker.is_waiting]

    def _evict(self, others: Iterable[WorkerView], group: Iterable[WorkerView], now: float, decisions: list[Decision]) -> None:
        """End the least wanted idle one of ``others``, unless one of the group is ending already and will make room."""
        if any(worker.state is WorkerState.ENDING for worker in group):
            return
        idle = self._by_use(worker for worker in others if worker.state is WorkerState.IDLE)
        if idle:
            self._stop(idle[0], "its place is needed", now, decisions)

    def _by_use(self, idle: Iterable[WorkerView]) -> list[WorkerView]:
        """The least wanted first: not kept warm by ``workers_min``, then the longest idle."""
        return sorted(idle, key=lambda worker: (self._is_kept(worker), worker.since))

    def _await_devices(self, lane: Lane, now: float, decisions: list[Decision]) -> None:
        assert lane.need.gpu is not None
        self._note_blocked(lane, now)
        self._explain_devices(lane)
        barred = self._barred(lane)
        for group in self.ledger.groups(lane.need.gpu):
            victims = self._find_victims([uuid for uuid in group if uuid not in barred and self.ledger.is_usable(uuid)], lane.need.gpu.count)
            if victims is not None:
                for worker in victims:
                    self._stop(worker, "its GPU is needed", now, decisions)
                return

    def _explain_devices(self, lane: Lane) -> None:
        assert lane.need.gpu is not None
        if self.ledger.problem:
            lane.wait(Reason.WAITING_GPU, self.ledger.problem)
            return
        suitable = self.ledger.suitable(lane.need.gpu)
        taken = [uuid for uuid in suitable if uuid in self.ledger.foreign]
        if taken and len(suitable) - len(taken) < lane.need.gpu.count:
            lane.wait(Reason.FOREIGN_GPU_USE, *(f"{uuid} is used by pid {self.ledger.foreign[uuid][0]}" for uuid in taken))
            return
        holders: list[str] = sorted({self.ledger.holders[uuid] for uuid in suitable if uuid in self.ledger.holders})
        lane.wait(Reason.WAITING_GPU, *(holders or ["no device is free" if suitable else "no device that could serve it is here now"]))

    def _find_victims(self, group: list[DeviceUuid], count: int) -> list[WorkerView] | None:
        """Idle workers whose end makes ``count`` of these devices free; empty if enough come free anyway; None if not."""
        holders = {uuid: self.workers.get(self.ledger.holders.get(uuid, WorkerId(""))) for uuid in group}
        coming = sum(worker is None or worker.state is WorkerState.ENDING for worker in holders.values())
        victims: list[WorkerView] = []
        idle = {worker.id: worker for worker in holders.values() if worker is not None and worker.state is WorkerState.IDLE}
        for worker in self._by_use(idle.values()):
            if coming >= count:
                break
            victims.append(worker)
            coming += sum(holder is worker for holder in holders.values())
        return victims if coming >= count else None

    def _stop(self, worker: WorkerView, why: str, now: float, decisions: list[Decision]) -> None:
        self._set_state(worker.id, WorkerState.ENDING, now)
        decisions.append(StopWorker(worker.id, why))

    def _stop_lost(self, now: float, decisions: list[Decision]) -> None:
        """An idle worker whose device is gone (the driver answers, and does not name it) is of no use."""
        if self.ledger.problem:
            return
        for worker in self.workers.values():
            if worker.devices and worker.state is WorkerState.IDLE and any(uuid not in self.ledger.devices for uuid in worker.devices):
                self._stop(worker, "its GPU is gone", now, decisions)

    def _reap_idle(self, now: float, decisions: list[Decision]) -> None:
        for worker in self.workers.values():
            if worker.state is not WorkerState.IDLE or now < worker.since + self._idle_timeout(worker) or self._is_kept(worker):
                continue
            self._stop(worker, "idle", now, decisions)

    def _idle_timeout(self, worker: WorkerView) -> float:
        policy = self.policies.get(worker.need.pool)
        return policy.idle_timeout_seconds if policy is not None else PoolPolicy().idle_timeout_seconds

    def _is_kept(self, worker: WorkerView) -> bool:
        """One of the pool's ``workers_min``, while somebody uses the config."""
        pool = worker.need.pool
        if pool not in self.held_until:
            return False
        live = [other for other in self.workers.values() if other.need.pool == pool and other.state is not WorkerState.ENDING]
        return len(live) <= self.policies[pool].workers_min

    def _keep_minimum(self, now: float, decisions: list[Decision]) -> None:
        """Start what ``workers_min`` asks for, of the kind last used, where no device must be taken for it."""
        for pool in self.held_until:
            live = [worker for worker in self.workers.values() if worker.need.pool == pool and worker.state is not WorkerState.ENDING]
            missing = self.policies[pool].workers_min - len(live) if pool in self.policies else 0
            if missing > 0 and live:
                self._start_extra(max(live, key=lambda worker: worker.since).need, missing, now, decisions)

    def _start_extra(self, need: Need, count: int, now: float, decisions: list[Decision]) -> None:
        if need.gpu is not None and self.turns[Turns.DEVICES]:
            return  # somebody waits for a device: keeping one warm now would only be undone
        for _ in range(min(count, self.workers_total - len(self.workers))):
            devices = self.ledger.pick(need.gpu) if need.gpu else ()
            if devices is None:
                return
            self._start(need, devices, now, decisions)

    # -- looking -------------------------------------------------------------------------------------------

    def waiting(self) -> Iterator[tuple[Lane, int, Ticket]]:
        """Every waiting ticket with its lane and place."""
        for lanes in self.users.values():
            for lane in lanes.values():
                for place, (_, ticket) in enumerate(lane.tickets):
                    yield lane, place, ticket

    def validate(self) -> None:
        """Raise AssertionError unless every invariant holds."""
        queued = [ticket.id for _, _, ticket in self.waiting()]
        assert len(queued) == len(set(queued)), "a ticket waits twice"
        assert set(queued) | set(self.placed) == set(self.tickets), "a ticket was forgotten"
        assert not set(queued) & set(self.placed), "a ticket waits and runs"
        for kind, turns in self.turns.items():
            owners = {uid for uid, lanes in self.users.items() if any(lane.turns is kind for lane in lanes.values())}
            assert set(turns) == owners, "a user has no turn"
            assert len(turns) == len(owners), "a user has two turns"
        assert all(lane.tickets for lanes in self.users.values() for lane in lanes.values()), "a lane is empty"
        assert {ticket.id for ticket in self.tickets.values() if ticket.ancestors} == {child for family in self.children.values() for child in family}
        assert set(self.homes.values()) <= set(self.workers), "an instance lives nowhere"
        for worker in self.workers.values():
            self._validate_worker(worker)
        held = [uuid for worker in self.workers.values() for uuid in worker.devices]
        assert len(held) == len(set(held)), "a device is lent twice"
        assert {uuid: worker.id for worker in self.workers.values() for uuid in worker.devices} == self.ledger.holders

    def _validate_worker(self, worker: WorkerView) -> None:
        assert worker.waiting <= set(worker.running), "a call waits that does not run"
        for ticket_id, ticket in worker.running.items():
            assert self.placed[ticket_id] == worker.id, "a ticket runs where it was not placed"
            assert ticket.need.uid == worker.need.uid, "a worker serves two users"
            left = self.homes.get(ticket.need.instance or "", worker.id) != worker.id
            assert worker.state is WorkerState.ENDING or not left, "an instance's call left its home"
        if worker.state in (WorkerState.STARTING, WorkerState.IDLE):
            assert not worker.running, "a free worker runs something"
        if worker.state is WorkerState.BUSY:
            assert worker.running, "a busy worker runs nothing"


def _lane_key(ticket: Ticket) -> LaneKey:
    return ticket.need, ticket.priority, ticket.cpus
