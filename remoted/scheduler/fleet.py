"""The fleet: every worker, what runs in it, what that uses, and where instances live."""

from __future__ import annotations

from collections import Counter
from math import fsum, inf

from remoted.model import DeviceUuid, Uid, WorkerId
from remoted.scheduler.changes import Changes
from remoted.scheduler.ledger import Ledger
from remoted.scheduler.pools import Pools
from remoted.scheduler.shares import Shares
from remoted.scheduler.state import Kind, Need, Ticket, TicketId, WorkerState, WorkerView

_Index = dict[WorkerId, WorkerView]
#: Who has fewer workers than this may have one of those that are reserved.
FEW = 4


class Fleet:
    """Changes workers, keeps the indexes true, and says what a change may be good for."""

    def __init__(self, pools: Pools, ledger: Ledger, changes: Changes, shares: Shares, most: int, reserve: int, prefix: str) -> None:
        """``most`` workers; the last ``reserve`` of them are for users who have few."""
        self.most, self.reserve = most, reserve
        self.workers: _Index = {}
        self.placed: dict[TicketId, WorkerId] = {}
        #: Where the objects of remote classes live.
        self.homes: dict[str, WorkerId] = {}
        #: CPUs of running bodies that do not wait for a nested call, and of tickets that workers are started for.
        self.reserved: dict[TicketId, float] = {}
        self.promised: dict[WorkerId, float] = {}
        #: Workers with devices and room, those that were started for somebody and are idle, those whose bodies wait, those that end.
        self.lendable: _Index = {}
        self.fresh: _Index = {}
        self.waiting: _Index = {}
        self.starting: _Index = {}
        self.ending: _Index = {}
        self.idle: _Index = {}
        self._found_in: dict[WorkerId, list[_Index]] = {}
        self._pools = pools
        self._ledger = ledger
        self._changes = changes
        self._prefix = prefix
        self._shares = shares
        self._count = 0
        self._per_uid: Counter[Uid] = Counter()
        self._started = 0
        self._cpus_used: float | None = 0.0

    # -- coming and going ----------------------------------------------------------------------------------

    def start(self, need: Need, kind: Kind, devices: tuple[DeviceUuid, ...], now: float, expected_cpus: float | None) -> WorkerView:
        """A new worker; ``expected_cpus`` are those of the ticket of whose turn it is made (None: of nobody's)."""
        self._started += 1
        worker = self._add(WorkerId(f"{self._prefix}{self._started}"), need, kind, devices, WorkerState.STARTING, now)
        if expected_cpus is not None:
            worker.is_fresh, worker.expected_cpus = True, expected_cpus
        if devices:
            self._changes.facts += 1
        if self._is_short:
            self._changes.in_everything()  # whoever lacked something else finds no place now, and may end an idle one
        self._update(worker)
        return worker

    def adopt(self, worker_id: WorkerId, need: Need, devices: tuple[DeviceUuid, ...], now: float) -> None:
        """A worker of an earlier daemon; nobody waits for it in particular."""
        self._update(self._add(worker_id, need, self._pools.kind(need), devices, WorkerState.STARTING, now))

    def adopt_ticket(self, worker_id: WorkerId, ticket: Ticket, devices: tuple[DeviceUuid, ...], now: float, ahead: bool) -> None:
        """What such a worker has. One that cannot be talked to takes no other than these."""
        worker = self.workers.get(worker_id)
        if worker is None:
            worker = self._add(worker_id, ticket.need, self._pools.kind(ticket.need), devices, WorkerState.ENDING, now)
        elif worker.state is WorkerState.STARTING:
            worker.state = WorkerState.BUSY
        if ahead:
            self.give_ahead(ticket, worker)
            return
        worker.running[ticket.id] = ticket
        self.placed[ticket.id] = worker_id
        self._reserve(ticket)
        self._update(worker)

    def _add(
        self, worker_id: WorkerId, need: Need, kind: Kind, devices: tuple[DeviceUuid, ...], state: WorkerState, now: float
    ) -> WorkerView:
        self._count += 1
        self._per_uid[need.uid] += 1
        worker = WorkerView(worker_id, self._count, need, kind, devices, state, now)
        if need.pool in self._pools.held_until:
            self._pools.newest[need.pool] = need
        self.workers[worker_id] = kind.workers[worker_id] = kind.pool.workers[worker_id] = worker
        if devices:
            self._ledger.lend(worker_id, devices)
        return worker

    def forget(self, worker_id: WorkerId) -> list[TicketId]:
        """It is dead; returns what ran in it."""
        worker = self.workers.get(worker_id)
        if worker is None:
            return []
        self._set_state(worker, WorkerState.ENDING)
        lost = [*worker.running, *worker.ahead]
        for ticket_id in list(worker.ahead):
            self._take_back(worker, ticket_id)
        for ticket_id in list(worker.running):
            self._take_out(worker, ticket_id)
        if worker.devices:
            self._ledger.give_back(worker_id)
        self._update(worker)
        kind, uid = worker.kind, worker.need.uid
        if self._is_short:
            self._changes.in_everything()
        self._per_uid[uid] -= 1
        if not self._per_uid[uid]:
            del self._per_uid[uid]
        for index in (self.workers, kind.workers, kind.pool.workers, *self._found_in.pop(worker_id)):
            del index[worker_id]
        self._pools.prune(kind)
        return lost

    def set_state(self, worker: WorkerView, state: WorkerState, now: float) -> None:
        """Ready or ending; what ends never does anything else."""
        if worker.state is WorkerState.ENDING:
            return
        self._set_state(worker, state)
        worker.since = now
        self._update(worker)

    def _set_state(self, worker: WorkerView, state: WorkerState) -> None:
        worker.state = state
        worker.expected_cpus = 0.0
        if state is WorkerState.ENDING:
            # Its instances are constructed again by their next calls, elsewhere.
            for instance in worker.instances:
                del self.homes[instance]
            worker.instances.clear()

    # -- running -------------------------------------------------------------------------------------------

    def assign(self, ticket: Ticket, worker: WorkerView, now: float) -> None:
        self.placed[ticket.id] = worker.id
        worker.running[ticket.id] = ticket
        self._reserve(ticket)
        if worker.state is WorkerState.IDLE:
            worker.state, worker.since = WorkerState.BUSY, now
        worker.is_fresh = False
        instance = ticket.need.instance
        if instance is not None and instance not in self.homes:
            self._settle(instance, worker)
            self._changes.in_pool(worker.kind.pool)
        self._reindex(worker)

    def give_ahead(self, ticket: Ticket, worker: WorkerView) -> None:
        """It begins there when those before it have ended. Nobody else has anything to gain or lose by it."""
        self.placed[ticket.id] = worker.id
        worker.ahead[ticket.id] = ticket

    def pass_on(self, ticket_id: TicketId) -> bool:
        """The ticket has ended, and the next that its worker was given ahead takes its place, and what it had reserved.

        False where there is no such, and nothing was done.
        """
        worker_id = self.placed.get(ticket_id)
        worker = self.workers.get(worker_id) if worker_id is not None else None
        if worker is None or not worker.ahead or ticket_id not in worker.running or ticket_id in worker.waiting or worker.waiting_early:
            return False
        del self.placed[ticket_id], worker.running[ticket_id]
        next_id = next(iter(worker.ahead))
        worker.running[next_id] = worker.ahead.pop(next_id)
        if ticket_id in self.reserved:  # they are of one lane
            self.reserved[next_id] = self.reserved.pop(ticket_id)
        return True

    def release(self, ticket_id: TicketId, now: float) -> WorkerView | None:
        """The worker is done with the ticket; returns the worker."""
        worker_id = self.placed.get(ticket_id)
        worker = self.workers.get(worker_id) if worker_id is not None else None
        if worker is None:
            return None
        if ticket_id in worker.ahead:
            self._take_back(worker, ticket_id)
            return worker
        self._take_out(worker, ticket_id)
        if worker.ahead:
            self._run_next(worker)
        if not worker.running and worker.state is WorkerState.BUSY:
            worker.state, worker.since = WorkerState.IDLE, now
        self._update(worker)
        return worker

    def _run_next(self, worker: WorkerView) -> None:
        ticket_id = next(iter(worker.ahead))
        ticket = worker.running[ticket_id] = worker.ahead.pop(ticket_id)
        if ticket_id in worker.waiting_early:
            worker.waiting_early.discard(ticket_id)
            worker.waiting.add(ticket_id)
        else:
            self._reserve(ticket)

    def _take_back(self, worker: WorkerView, ticket_id: TicketId) -> None:
        del self.placed[ticket_id], worker.ahead[ticket_id]
        worker.waiting_early.discard(ticket_id)

    def block(self, ticket_id: TicketId, waiting: bool) -> None:
        """A running body waits for a nested call, or goes on again."""
        worker = self.workers.get(self.placed.get(ticket_id, WorkerId("")))
        if worker is None:
            return
        waits = worker.waiting_early if ticket_id in worker.ahead else worker.waiting
        if waiting:
            waits.add(ticket_id)
        else:
            waits.discard(ticket_id)
        if (ticket := worker.running.get(ticket_id)) is None:
            return  # it has reserved nothing yet
        if waiting:
            self._unreserve(ticket)
        else:
            self._reserve(ticket)
        self._update(worker)

    def settle_instance(self, instance: str, worker_id: WorkerId) -> None:
        """It lives there already."""
        worker = self.workers.get(worker_id)
        if worker is not None and worker.state is not WorkerState.ENDING and instance not in self.homes:
            self._settle(instance, worker)

    def _settle(self, instance: str, worker: WorkerView) -> None:
        self.homes[instance] = worker.id
        worker.instances.add(instance)

    def drop_instance(self, instance: str) -> None:
        """Nobody can call it any more."""
        worker = self.workers.get(self.homes.pop(instance, WorkerId("")))
        if worker is not None:
            worker.instances.discard(instance)
            self._changes.in_pool(worker.kind.pool)

    def _take_out(self, worker: WorkerView, ticket_id: TicketId) -> None:
        del self.placed[ticket_id]
        self._unreserve(worker.running.pop(ticket_id))
        worker.waiting.discard(ticket_id)

    def _reserve(self, ticket: Ticket) -> None:
        if ticket.cpus:
            self.reserved[ticket.id] = ticket.cpus
            self._cpus_used = None
            self._changes.in_cpus()  # the patience of those who lack them begins

    def _unreserve(self, ticket: Ticket) -> None:
        if ticket.cpus and self.reserved.pop(ticket.id, None) is not None:
            self._cpus_used = None
            self._changes.in_cpus()

    # -- the indexes ---------------------------------------------------------------------------------------

    def _update(self, worker: WorkerView) -> None:
        """After any change but an assignment: somebody may gain by it."""
        self._changes.in_pool(worker.kind.pool)
        if worker.devices:
            self._changes.in_devices()
        if worker.state is WorkerState.IDLE and self._is_short:
            self._changes.in_everything()  # it may be ended for any of those that found no place
        if self._shares.most_running(worker.need.uid) < inf:
            self._changes.in_everything()  # its user may have come below the limit
        self._reindex(worker)

    def _reindex(self, worker: WorkerView) -> None:
        for index in self._found_in.get(worker.id, ()):
            del index[worker.id]
        indexes = self._found_in[worker.id] = self._indexes_of(worker)
        for index in indexes:
            index[worker.id] = worker
        self._pools.update_ends(worker.kind.pool)
        self._promise(worker)

    def _indexes_of(self, worker: WorkerView) -> list[_Index]:
        """Where it belongs as it is now."""
        state, kind = worker.state, worker.kind
        indexes: list[_Index] = []
        if state is WorkerState.IDLE:
            indexes += (kind.idle, kind.pool.idle, self.idle)
            if worker.is_fresh:
                indexes.append(self.fresh)
            if worker.devices:
                indexes.append(self.lendable)
        elif state is WorkerState.STARTING:
            indexes += (kind.starting, self.starting)
        elif state is WorkerState.ENDING:
            indexes += (kind.pool.ending, self.ending)
        else:
            if not worker.is_waiting:
                indexes.append(kind.pool.busy)
            if worker.is_shareable:
                indexes.append(kind.shareable)
                if worker.devices:
                    indexes.append(self.lendable)
        if worker.waiting:
            indexes.append(self.waiting)
            if worker.is_waiting:
                indexes.append(kind.pool.waiting)
        return indexes

    def _promise(self, worker: WorkerView) -> None:
        if worker.expected_cpus:
            if worker.id not in self.promised:
                self._changes.in_cpus()
            self.promised[worker.id] = worker.expected_cpus
        elif self.promised.pop(worker.id, None) is not None:
            self._changes.in_cpus()

    # -- looking -------------------------------------------------------------------------------------------

    def has_reached_limit(self, uid: Uid, with_starting: bool) -> bool:
        """Do as many bodies of this user run as may? One that waits for a nested call does not count."""
        most = self._shares.most_running(uid)
        if most == inf:
            return False
        mine = [worker for worker in self.workers.values() if worker.need.uid == uid]
        running = sum(len(worker.running) - len(worker.waiting) for worker in mine)
        return running + with_starting * sum(worker.state is WorkerState.STARTING for worker in mine) >= most

    def instances_of(self, uid: Uid) -> int:
        return sum(len(worker.instances) for worker in self.workers.values() if worker.need.uid == uid)

    def places_for(self, uid: Uid) -> int:
        """How many more workers this user may have now."""
        count, his = len(self.workers), self._per_uid[uid]
        return max(0, min(self.most - count, max(self.most - self.reserve - count, FEW - his)))

    @property
    def _is_short(self) -> bool:
        """Is there a user who could not have one more? Whether he can depends on how many others have."""
        return len(self.workers) >= self.most - self.reserve

    @property
    def is_full(self) -> bool:
        return len(self.workers) >= self.most

    def idle_of_many(self) -> list[WorkerView]:
        """Idle workers of users who have more than those for whom some are reserved."""
        return [worker for worker in self.idle.values() if self._per_uid[worker.need.uid] >= FEW]

    def cpus_used(self) -> float:
        """CPUs reserved by bodies that run (and do not wait for a nested call)."""
        if self._cpus_used is None:
            # Summed anew: adding and subtracting would leave a rest, and a call that asks for all CPUs would wait for ever.
            self._cpus_used = fsum(self.reserved.values())
        return self._cpus_used

    def promised_to(self, uid: Uid) -> float:
        """CPUs of this user's tickets that workers are started for. Others' promises bar nobody: starting is no use of CPUs."""
        return fsum(cpus for worker_id, cpus in self.promised.items() if self.workers[worker_id].need.uid == uid)

    def home_of(self, need: Need) -> WorkerView | None:
        """The worker in which the need's instance lives."""
        home = self.homes.get(need.instance) if need.instance is not None else None
        return self.workers.get(home) if home is not None else None

    def may_run(self, worker: WorkerView, ticket: Ticket, kind: Kind) -> bool:
        """Is it the worker, or one of the workers, that such a ticket runs in?"""
        home = self.home_of(ticket.need)
        return worker.kind is kind if home is None else worker is home

    def is_usable(self, worker: WorkerView) -> bool:
        """The lease is of use now: residency is only a cache, and a stranger may have come meanwhile."""
        return all(self._ledger.is_usable(uuid) for uuid in worker.devices)

    def is_lost(self, worker: WorkerView) -> bool:
        """It is idle, and a device of its is gone: the driver answers, and does not name it."""
        if not worker.devices or worker.state is not WorkerState.IDLE or self._ledger.problem:
            return False
        return any(uuid not in self._ledger.devices for uuid in worker.devices)

    def has_device_to_give(self) -> bool:
        """Without one no lane that needs devices can be placed, or make an idle worker end."""
        return bool(self.lendable or self._ledger.free)
