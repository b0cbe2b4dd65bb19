"""The scheduler: an event goes in, decisions come out. No I/O, no clock, no randomness.

Within one user tickets go by priority, then first come, first served; between users in turns, one placement
each. A ticket is *placed* by giving it to a free worker of its need, else by starting one, else by ending an
idle worker that is in the way. What is only waiting for an earlier decision (a worker that starts, a device
that is being emptied) is never decided twice: starting and ending workers are part of the state.

A body that waits for its nested call lends its CPUs and its place in the pool, not its devices. So calls
can wait for each other in a ring only over devices; when every device that could serve a ticket is held by
workers that wait, the ticket runs inside its own ancestor's worker (equal need), else it is refused
(MECHANISMS 15). Waiting for a worker that *runs* is no ring: it ends by itself or by its time limit.

The same object runs in the daemon, in ``simulate`` and under the property tests; ``validate`` states what
must hold after every event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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
from remoted.scheduler.state import Lane, LaneKey, Need, PoolKey, PoolPolicy, Ticket, TicketId, WorkerState, WorkerView


class Scheduler:
    """All waiting and running tickets, all workers, all devices of one host."""

    def __init__(self, cpus: float, workers_total: int = 256, worker_prefix: str = "w") -> None:
        self.cpus = cpus
        self.workers_total = workers_total
        self.ledger = Ledger()
        self.workers: dict[WorkerId, WorkerView] = {}
        self.policies: dict[PoolKey, PoolPolicy] = {}
        self.held_until: dict[PoolKey, float] = {}
        self.users: dict[Uid, dict[LaneKey, Lane]] = {}
        self.turns: deque[Uid] = deque()
        self.tickets: dict[TicketId, Ticket] = {}
        self.placed: dict[TicketId, WorkerId] = {}
        self.environments: set[str] = set()
        self._building: set[str] = set()
        self._prefix = worker_prefix
        self._sequence = 0
        self._worker_count = 0

    # -- one step ------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Apply one event at ``now`` (monotonic seconds) and place what can be placed."""
        decisions: list[Decision] = []
        self._apply(event, now)
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
            case DevicesSeen(devices, foreign):
                self.ledger.see(devices, dict(foreign))
            case EnvironmentReady(environment):
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
        self.tickets[ticket.id] = ticket
        lanes = self.users.setdefault(ticket.need.uid, {})
        if ticket.need.uid not in self.turns:
            self.turns.append(ticket.need.uid)
        lane = lanes.setdefault((ticket.need, ticket.priority), Lane(ticket.need, ticket.priority))
        self._sequence += 1
        lane.tickets.append((self._sequence, ticket))

    def _dequeue(self, ticket_id: TicketId) -> None:
        ticket = self.tickets.get(ticket_id)
        if ticket is None or ticket_id in self.placed:
            return
        lane = self.users[ticket.need.uid][(ticket.need, ticket.priority)]
        lane.tickets = deque(item for item in lane.tickets if item[1].id != ticket_id)
        del self.tickets[ticket_id]
        self._drop_empty(lane)

    def _pop(self, lane: Lane) -> Ticket:
        _, ticket = lane.tickets.popleft()
        self._drop_empty(lane)
        return ticket

    def _drop_empty(self, lane: Lane) -> None:
        if lane.tickets:
            return
        lanes = self.users[lane.need.uid]
        del lanes[(lane.need, lane.priority)]
        if not lanes:
            del self.users[lane.need.uid]
            self.turns.remove(lane.need.uid)

    def lane_of(self, ticket_id: TicketId) -> tuple[Lane, int] | None:
        """The lane of a waiting ticket and its place there (0 = next); None once it is placed."""
        ticket = self.tickets.get(ticket_id)
        if ticket is None or ticket_id in self.placed:
            return None
        lane = self.users[ticket.need.uid][(ticket.need, ticket.priority)]
        return lane, next(place for place, item in enumerate(lane.tickets) if item[1].id == ticket_id)

    # -- running -------------------------------------------------------------------------------------------

    def _release(self, ticket_id: TicketId, now: float) -> None:
        worker_id = self.placed.pop(ticket_id, None)
        self.tickets.pop(ticket_id, None)
        worker = self.workers.get(worker_id) if worker_id else None
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
        if worker is not None and worker.state is not WorkerState.ENDING:
            worker.state, worker.since = state, now

    def _forget_worker(self, worker_id: WorkerId) -> None:
        worker = self.workers.pop(worker_id, None)
        self.ledger.give_back(worker_id)
        for ticket_id in list(worker.running) if worker else []:
            self.placed.pop(ticket_id, None)
            self.tickets.pop(ticket_id, None)

    def _adopt(self, worker_id: WorkerId, ticket: Ticket, devices: tuple[DeviceUuid, ...], now: float) -> None:
        view = WorkerView(worker_id, ticket.need, devices, WorkerState.ENDING, now, {ticket.id: ticket})
        self.workers[worker_id] = view
        self.tickets[ticket.id] = ticket
        self.placed[ticket.id] = worker_id
        self.ledger.lend(worker_id, devices)

    # -- placing -------------------------------------------------------------------------------------------

    def _place_all(self, now: float, decisions: list[Decision]) -> None:
        """Users in turns until a whole round places nothing."""
        misses = 0
        while self.turns and misses < len(self.turns):
            uid = self.turns[0]
            self.turns.rotate(-1)
            misses = 0 if self._place_one_of(uid, now, decisions) else misses + 1

    def _place_one_of(self, uid: Uid, now: float, decisions: list[Decision]) -> bool:
        """True if one of this user's tickets left the queue."""
        lanes = sorted(self.users[uid].values(), key=lambda lane: lane.rank)
        return any(self._place(lane, now, decisions) for lane in lanes)

    def _place(self, lane: Lane, now: float, decisions: list[Decision]) -> bool:
        ticket = lane.tickets[0][1]
        if self._awaits_environment(lane, ticket, decisions):
            return False
        if not self._has_cpus(ticket):
            lane.reason, lane.detail = Reason.WAITING_CPU, f"{ticket.cpus:g} of {self.cpus:g} CPUs"
            return False
        if worker := self._free_worker(lane.need):
            self._assign(self._pop(lane), worker, now, decisions)
            return True
        if self._resolve_ring(lane, ticket, now, decisions):
            return True
        if lane.need.home is None:
            self._make_room(lane, now, decisions)
        else:
            lane.reason, lane.detail = Reason.WAITING_INSTANCE, "its worker is busy"
        return False

    def _awaits_environment(self, lane: Lane, ticket: Ticket, decisions: list[Decision]) -> bool:
        environment = lane.need.environment
        if environment is None or environment in self.environments:
            return False
        lane.reason, lane.detail = Reason.WAITING_ENV, environment
        if environment not in self._building:
            self._building.add(environment)
            decisions.append(Build(environment, ticket.id))
        return True

    def fail_environment(self, environment: str) -> list[TicketId]:
        """The build failed: these waiting tickets are withdrawn; the next one to come tries to build again."""
        self._building.discard(environment)
        failed = [item[1].id for lanes in self.users.values() for lane in lanes.values() if lane.need.environment == environment for item in lane.tickets]
        for ticket_id in failed:
            self._dequeue(ticket_id)
        return failed

    def _has_cpus(self, ticket: Ticket) -> bool:
        return ticket.cpus == 0 or self.cpus_used() + ticket.cpus <= self.cpus

    def cpus_used(self) -> float:
        """CPUs reserved by bodies that run (and do not wait for a nested call)."""
        return sum(
            ticket.cpus
            for worker in self.workers.values()
            for ticket_id, ticket in worker.running.items()
            if ticket_id not in worker.waiting
        )

    def _free_worker(self, need: Need) -> WorkerView | None:
        """The most recently used one: others may cool down and end."""
        free = [worker for worker in self.workers.values() if worker.has_room and worker.serves(need)]
        return max(free, key=lambda worker: (bool(worker.running), worker.since), default=None)

    def _assign(self, ticket: Ticket, worker: WorkerView, now: float, decisions: list[Decision], inline: bool = False) -> None:
        self.placed[ticket.id] = worker.id
        worker.running[ticket.id] = ticket
        if worker.state is WorkerState.IDLE:
            worker.state, worker.since = WorkerState.BUSY, now
        decisions.append(Assign(ticket.id, worker.id, inline))

    def _resolve_ring(self, lane: Lane, ticket: Ticket, now: float, decisions: list[Decision]) -> bool:
        """Run inside an ancestor, or refuse, when only waiting bodies hold what the ticket needs."""
        if not ticket.ancestors or not self._only_waiters_hold(lane.need):
            return False
        for ancestor in reversed(ticket.ancestors):
            worker = self.workers.get(self.placed.get(ancestor, WorkerId("")))
            if worker is not None and worker.serves(lane.need) and ancestor in worker.waiting and worker.state is WorkerState.BUSY:
                self._assign(self._pop(lane), worker, now, decisions, inline=True)
                return True
        self._pop(lane)
        del self.tickets[ticket.id]
        chain = " > ".join((*ticket.ancestors, ticket.id))
        decisions.append(Refuse(ticket.id, Reason.WOULD_DEADLOCK, f"every device that could serve it is held by calls that wait for others: {chain}"))
        return True

    def _only_waiters_hold(self, need: Need) -> bool:
        if need.home is not None:
            home = self.workers.get(need.home)
            return home is not None and home.is_waiting
        if need.gpu is None:
            return False
        holders = [self.ledger.holders.get(uuid) for uuid in self.ledger.suitable(need.gpu)]
        return bool(holders) and all(holder in self.workers and self.workers[holder].is_waiting for holder in holders if holder) and None not in holders

    # -- starting and ending workers -----------------------------------------------------------------------

    def _make_room(self, lane: Lane, now: float, decisions: list[Decision]) -> None:
        """Start a worker for the lane's head, or end an idle one that is in the way."""
        starting = [worker for worker in self.workers.values() if worker.state is WorkerState.STARTING and worker.serves(lane.need)]
        if len(starting) * lane.need.concurrency >= len(lane.tickets):
            lane.reason, lane.detail = Reason.STARTING, ", ".join(worker.id for worker in starting)
            return
        while len(starting) * lane.need.concurrency < len(lane.tickets):
            started = self._try_start(lane, now, decisions)
            if started is None:
                return
            starting.append(started)
        lane.reason, lane.detail = Reason.STARTING, ", ".join(worker.id for worker in starting)

    def _try_start(self, lane: Lane, now: float, decisions: list[Decision]) -> WorkerView | None:
        need = lane.need
        counted = self._counted(need.pool)
        if len(counted) >= self.policies[need.pool].workers_max or len(self.workers) >= self.workers_total:
            lane.reason, lane.detail = Reason.WAITING_WORKER, f"{len(counted)} of {self.policies[need.pool].workers_max} workers are busy"
            self._evict([worker for worker in counted if not worker.serves(need)], counted, now, decisions)
            return None
        devices: tuple[DeviceUuid, ...] = ()
        if need.gpu is not None:
            picked = self.ledger.pick(need.gpu)
            if picked is None:
                self._await_devices(lane, now, decisions)
                return None
            devices = tuple(device.uuid for device in picked)
        return self._start(need, devices, now, decisions)

    def _start(self, need: Need, devices: tuple[DeviceUuid, ...], now: float, decisions: list[Decision]) -> WorkerView:
        self._worker_count += 1
        worker = WorkerView(WorkerId(f"{self._prefix}{self._worker_count}"), need, devices, WorkerState.STARTING, now)
        self.workers[worker.id] = worker
        self.ledger.lend(worker.id, devices)
        decisions.append(StartWorker(worker.id, need, devices))
        return worker

    def _counted(self, pool: PoolKey) -> list[WorkerView]:
        """Workers that use a place of the pool: all but those whose bodies wait for nested calls."""
        return [worker for worker in self.workers.values() if worker.need.pool == pool and not worker.is_waiting]

    def _evict(self, others: list[WorkerView], group: list[WorkerView], now: float, decisions: list[Decision]) -> None:
        """End the longest idle of ``others``, unless one of the group is ending already and will make room."""
        if any(worker.state is WorkerState.ENDING for worker in group):
            return
        idle = [worker for worker in others if worker.state is WorkerState.IDLE]
        if idle:
            self._stop(min(idle, key=lambda worker: worker.since), "its place is needed", now, decisions)

    def _await_devices(self, lane: Lane, now: float, decisions: list[Decision]) -> None:
        assert lane.need.gpu is not None
        suitable = self.ledger.suitable(lane.need.gpu)
        holders = [self.workers[self.ledger.holders[uuid]] for uuid in suitable if uuid in self.ledger.holders]
        taken = [uuid for uuid in suitable if uuid in self.ledger.foreign]
        if taken and len(taken) == len(suitable):
            lane.reason, lane.detail = Reason.FOREIGN_GPU_USE, ", ".join(f"{uuid} is used by pid {self.ledger.foreign[uuid][0]}" for uuid in taken)
        else:
            lane.reason, lane.detail = Reason.WAITING_GPU, ", ".join(sorted({worker.id for worker in holders})) or "no device is free"
        self._evict(holders, holders, now, decisions)

    def _stop(self, worker: WorkerView, why: str, now: float, decisions: list[Decision]) -> None:
        worker.state, worker.since = WorkerState.ENDING, now
        decisions.append(StopWorker(worker.id, why))

    def _reap_idle(self, now: float, decisions: list[Decision]) -> None:
        for worker in list(self.workers.values()):
            if worker.state is not WorkerState.IDLE or self._is_kept(worker):
                continue
            if now - worker.since >= self._idle_timeout(worker):
                self._stop(worker, "idle", now, decisions)

    def _idle_timeout(self, worker: WorkerView) -> float:
        return self.policies.get(worker.need.pool, PoolPolicy()).idle_timeout_seconds

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
            missing = self.policies[pool].workers_min - len(live)
            if missing > 0 and live:
                self._start_extra(max(live, key=lambda worker: worker.since).need, missing, now, decisions)

    def _start_extra(self, need: Need, count: int, now: float, decisions: list[Decision]) -> None:
        for _ in range(min(count, self.workers_total - len(self.workers))):
            picked = self.ledger.pick(need.gpu) if need.gpu else ()
            if picked is None:
                return
            self._start(need, tuple(device.uuid for device in picked), now, decisions)

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
        assert set(self.turns) == set(self.users), "a user has no turn"
        assert len(self.turns) == len(set(self.turns)), "a user has two turns"
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
            assert ticket.need.home in (None, worker.id), "an instance's call left its home"
        if worker.state in (WorkerState.STARTING, WorkerState.IDLE):
            assert not worker.running, "a free worker runs something"
        if worker.state is WorkerState.BUSY:
            assert worker.running, "a busy worker runs nothing"
