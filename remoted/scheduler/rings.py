"""Calls that wait for each other in a ring (MECHANISMS 15): found exactly, never guessed.

A body that waits for its nested calls *goes on* if one of them does: one that runs, or one that is queued and
will be served. A queued call will be served if enough of what it needs is free or held by workers whose bodies
all go on. What goes on is the least solution of these two sentences; waiting bodies outside of it wait for each
other, and their queued calls would wait for ever.

Things outside of the host (a stranger on a GPU, a driver that is silent) are no ring: they may change.
"""

from __future__ import annotations

from remoted.model import WorkerId
from remoted.scheduler.fleet import Fleet
from remoted.scheduler.ledger import Ledger
from remoted.scheduler.queue import Queue
from remoted.scheduler.state import Need, Ticket, TicketId, WorkerState, WorkerView


def stuck_tickets(queue: Queue, fleet: Fleet, ledger: Ledger) -> list[Ticket]:
    """Queued nested tickets that can never be served as things stand."""
    if not queue.nested or not fleet.waiting:
        return []
    bodies = [ticket_id for worker in fleet.workers.values() for ticket_id in worker.waiting]
    rings = _Rings(queue, fleet, ledger, set(bodies))
    rings.solve()
    return [child for body in bodies if body in rings.stuck for child in rings.queued_children(body) if not rings.is_served(child.need)]


class _Rings:
    def __init__(self, queue: Queue, fleet: Fleet, ledger: Ledger, bodies: set[TicketId]) -> None:
        self.stuck = bodies
        self._queue = queue
        self._fleet = fleet
        self._ledger = ledger
        self._served: dict[Need, bool] = {}

    def solve(self) -> None:
        """Take out of ``stuck`` whatever goes on, until nothing more does."""
        while True:
            self._served.clear()
            going = {body for body in self.stuck if self._goes_on(body)}
            if not going:
                return
            self.stuck -= going

    def queued_children(self, body: TicketId) -> list[Ticket]:
        return [self._queue.tickets[child] for child in self._queue.children.get(body, ()) if child not in self._fleet.placed]

    def _goes_on(self, body: TicketId) -> bool:
        children = self._queue.children.get(body)
        if not children:
            return True  # its call has just ended, or waits to be tried again: it will hear of it
        return any(self._child_goes_on(child) for child in children)

    def _child_goes_on(self, child: TicketId) -> bool:
        if child in self._fleet.placed:
            return child not in self.stuck
        return self.is_served(self._queue.tickets[child].need)

    def is_served(self, need: Need) -> bool:
        """Will a ticket of this need be placed once everything that goes on has ended?"""
        if need not in self._served:
            self._served[need] = self._finds_instance(need) and self._finds_devices(need) and self._finds_place()
        return self._served[need]

    def _finds_instance(self, need: Need) -> bool:
        home = self._fleet.home_of(need)
        return home is None or self._lets_go(home)

    def _finds_devices(self, need: Need) -> bool:
        if need.gpu is None or self._fleet.home_of(need) is not None:
            return True
        # No group at all means that devices are missing, not that calls hold them.
        groups = self._ledger.groups(need.gpu)
        holders = self._ledger.holders
        return not groups or any(sum(self._comes_free(holders.get(uuid)) for uuid in group) >= need.gpu.count for group in groups)

    def _comes_free(self, holder: WorkerId | None) -> bool:
        worker = self._fleet.workers.get(holder) if holder else None
        return worker is None or self._lets_go(worker)

    def _finds_place(self) -> bool:
        workers = self._fleet.workers
        return len(workers) < self._fleet.most or any(self._lets_go(worker) for worker in workers.values())

    def _lets_go(self, worker: WorkerView) -> bool:
        return not any(ticket in self.stuck for ticket in worker.running)


def find_host(queue: Queue, fleet: Fleet, ticket: Ticket) -> WorkerView | None:
    """The nearest ancestor's worker that may run the queued ticket inside the body that waits for it."""
    kind = queue.lanes[ticket.id].kind
    for ancestor in reversed(ticket.ancestors):
        worker = fleet.workers.get(fleet.placed.get(ancestor, WorkerId("")))
        if worker is not None and worker.state is WorkerState.BUSY and ancestor in worker.waiting and fleet.may_run(worker, ticket, kind):
            return worker
    return None
