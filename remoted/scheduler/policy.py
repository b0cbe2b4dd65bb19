"""The scheduler: an event goes in, decisions come out. No I/O, no clock, no randomness.

Within one user tickets go by priority, then first come, first served; between users in turns (by weight, where users have
one: ``shares``), one placement each, separately for what needs devices, what reserves CPUs, and the rest. A ticket is *placed* by giving it to
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

from collections.abc import Iterator
from typing import assert_never

from remoted.model import Reason, WorkerId
from remoted.scheduler.builds import Builds
from remoted.scheduler.changes import Changes
from remoted.scheduler.claims import Claims
from remoted.scheduler.crashes import Crashes
from remoted.scheduler.events import (
    Blocked,
    Cleared,
    Decision,
    DevicesSeen,
    Ended,
    EnvironmentFailed,
    EnvironmentReady,
    Event,
    InstanceDropped,
    InstanceFound,
    PoolHeld,
    Refuse,
    Returned,
    RunAhead,
    SharesSet,
    Step,
    Submitted,
    Tick,
    TicketAdopted,
    Withdrawn,
    WorkerAdopted,
    WorkerClosing,
    WorkerEnded,
    WorkerReady,
)
from remoted.scheduler.fleet import Fleet
from remoted.scheduler.ledger import Ledger
from remoted.scheduler.lifecycle import Lifecycle
from remoted.scheduler.placement import Placement
from remoted.scheduler.pools import Pools
from remoted.scheduler.queue import Queue
from remoted.scheduler.rings import find_host, stuck_tickets
from remoted.scheduler.shares import Shares
from remoted.scheduler.state import Lane, Ticket, TicketId, Turns, WorkerState
from remoted.scheduler.validation import validate_fleet, validate_index, validate_queue

_PATIENCE_SECONDS = 10.0
#: So many crashes in so many seconds.
_CRASH_LOOP = (5, 30.0)


class Scheduler:
    """All waiting and running tickets, all workers, all devices of one host."""

    def __init__(
        self,
        cpus: float,
        workers_total: int = 256,
        workers_reserved: int = 0,
        worker_prefix: str = "w",
        patience_seconds: float = _PATIENCE_SECONDS,
        crash_loop: tuple[int, float] = _CRASH_LOOP,
    ) -> None:
        self.cpus = cpus
        self.workers_total = workers_total
        self.ledger = Ledger()
        self._changes = Changes()
        self._pools = Pools()
        self._shares = Shares()
        self._queue = Queue(self._pools, self._changes, self._shares)
        self._fleet = Fleet(self._pools, self.ledger, self._changes, self._shares, workers_total, workers_reserved, worker_prefix)
        self._builds = Builds()
        self._claims = Claims(self._fleet, self.ledger, self._changes, patience_seconds)
        self._crashes = Crashes(*crash_loop)
        self._lifecycle = Lifecycle(self._pools, self._fleet, self.ledger, self._crashes)
        self._placement = Placement(cpus, self._pools, self._queue, self._fleet, self.ledger, self._claims, self._builds, self._lifecycle, self._changes, self._shares)
        # For reading. What belongs to whom is said where it is changed.
        self.policies = self._pools.policies
        self.held_until = self._pools.held_until
        self.users = self._queue.users
        self.turns = self._queue.turns
        self.tickets = self._queue.tickets
        self.children = self._queue.children
        self.workers = self._fleet.workers
        self.placed = self._fleet.placed
        self.homes = self._fleet.homes
        self.instances_of = self._fleet.instances_of

    # -- one step ------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Apply one event at ``now`` (monotonic seconds) and place what can be placed."""
        step = Step(now)
        if isinstance(event, Submitted):
            self._submit(event, step)
        elif not isinstance(event, Ended) or not self.pass_on(event.ticket):
            self._apply(event, step)
            self._placement.place_all(step)
        while self._queue.nested and self._resolve_ring(step):
            self._placement.place_all(step)
        self._lifecycle.reap_idle(step)
        if self.held_until:
            self._lifecycle.keep_minimum(bool(self.turns[Turns.DEVICES]), step)
        return step.decisions

    def pass_on(self, ticket_id: TicketId) -> bool:
        """As ``Ended``, if its worker has the next one already: nobody else has anything to gain by that. Else nothing is done."""
        if not self._fleet.pass_on(ticket_id):
            return False
        self._queue.forget(ticket_id)
        return True

    def next_wakeup(self) -> float | None:
        """When a ``Tick`` is next needed (monotonic seconds); None while only events matter."""
        return self._lifecycle.next_wakeup()

    def _submit(self, event: Submitted, step: Step) -> None:
        """Unless it brings a new policy it changes nothing for the other lanes: they were blocked before and still are."""
        has_new_policy = self._pools.set_policy(event.ticket.need.pool, event.policy)
        if not (has_new_policy or event.behind or event.ticket.id in self.tickets) and self._placement.place_alone(event.ticket, step):
            return
        lane = self._queue.add(event.ticket, *event.behind)
        if has_new_policy:
            self._changes.in_pool(lane.kind.pool)
            self._placement.place_all(step)
        if lane.tickets:
            self._placement.place_lane(lane, step)

    def _apply(self, event: Event, step: Step) -> None:
        match event:
            case Ended(ticket_id):
                self._end(ticket_id, step)
            case RunAhead(worker_id, count):
                if worker_id in self.workers:
                    self._placement.run_ahead(self.workers[worker_id], count, step)
            case Returned(ticket_id):
                self._return(ticket_id, step)
            case Withdrawn(ticket_id):
                self._queue.remove(ticket_id)
            case Cleared(tickets):
                for ticket_id in tickets:
                    self._queue.remove(ticket_id)
            case Blocked(ticket_id, waiting):
                self._fleet.block(ticket_id, waiting)
            case WorkerReady(worker_id):
                self._set_state(worker_id, WorkerState.IDLE, step)
            case WorkerClosing(worker_id, is_dead):
                if is_dead:
                    self._note_death(worker_id, step)
                self._set_state(worker_id, WorkerState.ENDING, step)
            case WorkerEnded(worker_id):
                self._note_death(worker_id, step)
                for ticket_id in self._fleet.forget(worker_id):
                    self._queue.forget(ticket_id)
            case WorkerAdopted(worker_id, need, devices, policy):
                self._pools.set_policy(need.pool, policy)
                self._fleet.adopt(worker_id, need, devices, step.now)
            case TicketAdopted(worker_id, ticket, devices, ahead):
                self._queue.know(ticket)
                self._fleet.adopt_ticket(worker_id, ticket, devices, step.now, ahead)
            case DevicesSeen(devices, foreign, problem):
                self.ledger.see(devices, dict(foreign), problem)
                self._changes.facts += 1
                self._changes.in_everything()
                self._lifecycle.stop_lost(self.workers.values(), step)
            case InstanceFound(instance, worker_id):
                self._fleet.settle_instance(instance, worker_id)
            case InstanceDropped(instance):
                self._fleet.drop_instance(instance)
            case EnvironmentReady(environment):
                self._builds.succeed(environment)
                self._changes.facts += 1
                self._changes.in_everything()
            case EnvironmentFailed(environment, message, detail):
                self._fail_environment(environment, message, detail, step)
            case PoolHeld(pool, until):
                self._pools.hold(pool, until)
            case SharesSet(weights, running, everybodys):
                self._shares.set(dict(weights), dict(running), everybodys)
                self._changes.in_everything()
            case Tick():
                self._pools.let_go(step.now)
            case Submitted():
                raise TypeError("a submission does not touch the other lanes: see _submit")
            case _:
                assert_never(event)

    def _end(self, ticket_id: TicketId, step: Step) -> None:
        worker = self._fleet.release(ticket_id, step.now)
        if worker is not None:
            self._queue.forget(ticket_id)
            self._lifecycle.stop_lost((worker,), step)

    def _return(self, ticket_id: TicketId, step: Step) -> None:
        worker = self._fleet.release(ticket_id, step.now)
        if worker is not None:
            self._queue.put_back(self.tickets[ticket_id])
            self._lifecycle.stop_lost((worker,), step)

    def _note_death(self, worker_id: WorkerId, step: Step) -> None:
        """Of one that nobody had told to end."""
        worker = self.workers.get(worker_id)
        if worker is not None and worker.state is not WorkerState.ENDING:
            self._crashes.note(worker.need.pool, step.now)

    def _set_state(self, worker_id: WorkerId, state: WorkerState, step: Step) -> None:
        worker = self.workers.get(worker_id)
        if worker is not None and (state is WorkerState.ENDING or worker.state is WorkerState.STARTING):
            self._fleet.set_state(worker, state, step.now)
            self._lifecycle.stop_lost((worker,), step)

    def _fail_environment(self, environment: str, message: str, detail: str, step: Step) -> None:
        self._builds.fail(environment)
        for ticket in [ticket for lane, _, ticket in self._queue if lane.need.environment == environment]:
            self._queue.remove(ticket.id)
            step.decisions.append(Refuse(ticket.id, Reason.ENVIRONMENT, message, detail))

    def _resolve_ring(self, step: Step) -> bool:
        """Of calls that wait for each other: run one inside an ancestor, or refuse the one that closed the ring."""
        hosts = [(ticket, find_host(self._queue, self._fleet, ticket)) for ticket in stuck_tickets(self._queue, self._fleet, self.ledger)]
        if any(host is not None and self._placement.run_inline(ticket, host, step) for ticket, host in hosts):
            return True
        hopeless = [ticket for ticket, host in hosts if host is None]
        if hopeless:
            self._refuse(hopeless[-1], step)
        return bool(hopeless)

    def _refuse(self, ticket: Ticket, step: Step) -> None:
        self._queue.remove(ticket.id)
        chain = " > ".join((*ticket.ancestors, ticket.id))
        message = f"every device that could serve it is held by calls that wait for others: {chain}"
        step.decisions.append(Refuse(ticket.id, Reason.WOULD_DEADLOCK, message))

    # -- looking -------------------------------------------------------------------------------------------

    def cpus_used(self) -> float:
        """CPUs reserved by bodies that run (and do not wait for a nested call)."""
        return self._fleet.cpus_used()

    def waiting(self) -> Iterator[tuple[Lane, int, Ticket]]:
        """Every waiting ticket with its lane and place."""
        return iter(self._queue)

    def in_order_of_arrival(self) -> list[Ticket]:
        """Every waiting ticket, whoever's turn it is."""
        lanes = [lane for lanes in self.users.values() for lane in lanes.values()]
        return [ticket for _, ticket in sorted(((number, ticket) for lane in lanes for number, ticket in lane.tickets), key=lambda item: item[0])]

    def lane_of(self, ticket_id: TicketId) -> tuple[Lane, int] | None:
        """The lane of a waiting ticket and its place there (0 = next); None once it is placed."""
        return self._queue.place_of(ticket_id)

    def line_behind(self, worker_id: WorkerId) -> Iterator[TicketId]:
        """The tickets that the worker could be given ahead, the next one first."""
        worker = self.workers.get(worker_id)
        return self._placement.line_behind(worker) if worker is not None else iter(())

    def kept_until(self, worker_id: WorkerId) -> float | None:
        """When an idle worker will be ended if nothing happens (monotonic seconds); None for any other."""
        worker = self.workers.get(worker_id)
        return self._pools.kept_until(worker) if worker is not None else None

    def validate(self) -> None:
        """Raise AssertionError unless every invariant holds and every index says what a look at everything says."""
        validate_queue(self._queue, self._fleet)
        validate_fleet(self._fleet, self.ledger)
        validate_index(self._pools, self._queue, self._fleet)

    def doubt(self) -> None:
        """Forget which lanes cannot have anything to gain: the next event tries them all. It finds no more, only later."""
        self._changes.in_everything()
