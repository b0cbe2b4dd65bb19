"""Placement: which waiting ticket gets which worker, and for which one a worker is started."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from remoted.model import DeviceUuid, Reason, Uid
from remoted.scheduler import explain
from remoted.scheduler.builds import Builds
from remoted.scheduler.changes import Changes
from remoted.scheduler.claims import Claims
from remoted.scheduler.events import Assign, Step
from remoted.scheduler.explain import Explanations
from remoted.scheduler.fleet import FEW, Fleet
from remoted.scheduler.ledger import Ledger
from remoted.scheduler.lifecycle import Lifecycle
from remoted.scheduler.matching import GpuRequest
from remoted.scheduler.pools import Pools
from remoted.scheduler.queue import Queue
from remoted.scheduler.shares import Shares
from remoted.scheduler.state import Kind, Lane, Ticket, TicketId, Turns, WorkerState, WorkerView

_TURNS = tuple(Turns)


class Placement:
    """Gives lanes their turns and tickets their workers."""

    def __init__(
        self,
        cpus: float,
        pools: Pools,
        queue: Queue,
        fleet: Fleet,
        ledger: Ledger,
        claims: Claims,
        builds: Builds,
        lifecycle: Lifecycle,
        changes: Changes,
        shares: Shares,
    ) -> None:
        self._cpus = cpus
        self._pools = pools
        self._queue = queue
        self._fleet = fleet
        self._ledger = ledger
        self._claims = claims
        self._builds = builds
        self._lifecycle = lifecycle
        self._changes = changes
        self._shares = shares
        self._explanations = Explanations(ledger)
        self._facts = -1
        #: With these devices barred, requests for which no idle worker can be ended, and the change of devices after which that was found.
        self._vain_barred: frozenset[DeviceUuid] = frozenset()
        self._vain: dict[GpuRequest, int] = {}
        self._round = 0

    # -- whose turn it is ----------------------------------------------------------------------------------

    def place_all(self, step: Step) -> None:
        """Fresh workers get what they were started for; then users in turns until a whole round places nothing."""
        self._round += 1
        self._claims.renew((lane for lane in self._queue.wide if not self._is_limited(lane)), step.now)
        if self._fleet.fresh:
            self._serve_fresh(step)
        if self._fleet.starting or self._facts != self._changes.facts:
            self._changes.open.add(Turns.DEVICES)  # nobody gains, but explanations change
        self._facts = self._changes.facts
        for kind in _TURNS:
            if kind in self._changes.open:
                self._changes.open.discard(kind)  # what changes from here on is for the next round
                (self._take_turns if self._shares.are_equal else self._take_weighted_turns)(kind, step)

    def place_lane(self, lane: Lane, step: Step) -> None:
        """Place what one lane can; nobody else has anything to gain."""
        if lane.failed_at >= 0 and lane.reason is not Reason.STARTING and not self._changes.concern(lane):
            return
        while lane.tickets and self._try(lane, step):
            self._queue.end_turn(lane.need.uid, lane.turns)

    def place_alone(self, ticket: Ticket, step: Step) -> bool:
        """Where nobody waits for anything: what the lane of such a ticket would give it, without making one for a moment."""
        need = ticket.need
        if self._queue.users or ticket.ancestors or ticket.cpus or need.gpu is not None or need.instance is not None or need.concurrency > 1:
            return False
        kind = self._pools.find(need)
        if kind is None or self._builds.lacks(need) or self._fleet.has_reached_limit(need.uid, with_starting=False):
            return False
        worker = self._last_idle(kind, frozenset())
        if worker is None or not _has_place(worker):
            return False
        self._queue.know(ticket)
        self._assign(ticket, worker, step)
        return True

    def _take_turns(self, kind: Turns, step: Step) -> None:
        turns = self._queue.turns[kind]
        misses = 0
        while turns and misses < len(turns):
            if kind is Turns.DEVICES and not self._fleet.has_device_to_give():
                turns.rotate(misses)  # nobody after them has had a turn
                self._explain_rest(step)
                return
            uid = turns[0]
            turns.rotate(-1)
            misses = 0 if self._place_one_of(uid, kind, step) else misses + 1

    def _take_weighted_turns(self, kind: Turns, step: Step) -> None:
        """The same where users have weights. Who is passed over stays before the others until somebody uses the turn."""
        turns = self._queue.turns[kind]
        missed: set[Uid] = set()
        while len(missed) < len(turns):
            if kind is Turns.DEVICES and not self._fleet.has_device_to_give():
                self._explain_rest(step)
                return
            turn = self._shares.whose_turn(kind, turns, missed)
            turns.rotate(-turn.steps)
            if self._place_one_of(turn.uid, kind, step):
                missed.clear()
                self._shares.use(kind, turn, turns)
            else:
                missed.add(turn.uid)
                turns.rotate(turn.steps)

    def _place_one_of(self, uid: Uid, kind: Turns, step: Step) -> bool:
        """True if this user's turn was used. Within one round nothing comes free, so who failed once is not tried again."""
        lanes: list[Lane] = []
        hopeless: list[Lane] = []
        for lane in self._queue.users[uid].values():
            if lane.turns is kind and lane.failed_step != self._round:
                (lanes if self._changes.concern(lane) else hopeless).append(lane)
        if lanes and any(self._try(lane, step) for lane in self._queue.in_order(lanes)):
            return True
        for lane in hopeless:
            lane.failed_step = self._round
        return False

    def _serve_fresh(self, step: Step) -> None:
        waited_for = [worker for worker in self._fleet.fresh.values() if worker.kind.lanes and self._fleet.is_usable(worker)]
        for worker in sorted(waited_for, key=lambda worker: worker.number):
            for lane in self._queue.in_order(list(worker.kind.lanes)):
                if self._fleet.home_of(lane.need) is None and self._has_cpus(lane) and _has_place(worker) and not self._is_limited(lane):
                    self._assign_head(lane, worker, step)
                    break

    def _explain_rest(self, step: Step) -> None:
        """Lanes that nobody tried say what they wait for now; those that already did, have not changed."""
        facts = self._changes.facts
        for uid in self._queue.turns[Turns.DEVICES]:
            for lane in self._queue.users[uid].values():
                if lane.turns is Turns.DEVICES and (lane.explained != facts or lane.reason is Reason.STARTING):
                    self._explain_untried(lane, step)

    def _explain_untried(self, lane: Lane, step: Step) -> None:
        lane.explained = self._changes.facts
        if self._is_limited(lane):
            explain.explain_quota(lane, self._shares.most_running(lane.need.uid))
            return
        lane.note_blocked(step.now)
        if not lane.kind.starting and not self._builds.lacks(lane.need):
            self._explanations.explain_devices(lane)

    # -- one lane ------------------------------------------------------------------------------------------

    def _try(self, lane: Lane, step: Step) -> bool:
        """Place the lane's head, or remember that it was in vain."""
        before = self._changes.count
        if self._place(lane, step):
            return True
        lane.failed_step, lane.failed_at = self._round, before
        return False

    def _place(self, lane: Lane, step: Step) -> bool:
        """Give the lane's head to a worker or start one for it. True if something was used for it."""
        lane.explained = self._changes.facts
        if self._builds.lacks(lane.need):
            explain.explain_environment(lane)
            self._builds.ask_for(lane, step)
            return False
        if self._is_limited(lane):
            return self._wait_for_quota(lane)
        if not self._has_cpus(lane):
            lane.note_blocked(step.now)
            if lane.kind.starting:
                explain.explain_start(lane)
            else:
                explain.explain_cpus(lane, self._cpus)
            return False
        home = self._fleet.home_of(lane.need)
        worker = self._free_worker(lane, home)
        if worker is not None and not _has_place(worker):
            explain.explain_pool(lane, worker.kind.pool.policy.workers_max)
            return False
        if worker is not None:
            self._assign_head(lane, worker, step)
            return True
        if home is not None:
            explain.explain_instance(lane)
            return False
        return self._make_room(lane, step)

    def _is_limited(self, lane: Lane, with_starting: bool = False) -> bool:
        """Does its user run as much as he may? What a running body calls belongs to that."""
        return not lane.tickets.head[1].ancestors and self._fleet.has_reached_limit(lane.need.uid, with_starting)

    def _wait_for_quota(self, lane: Lane) -> bool:
        explain.explain_quota(lane, self._shares.most_running(lane.need.uid))
        return False

    def _has_cpus(self, lane: Lane, promised: float = 0.0) -> bool:
        return not lane.cpus or self._fleet.cpus_used() + lane.cpus + self._claims.barred_cpus(lane) + promised <= self._cpus

    def _free_worker(self, lane: Lane, home: WorkerView | None) -> WorkerView | None:
        """The instance's home; else the most recently used one: others may cool down and end."""
        barred = self._claims.barred(lane)
        if home is not None:
            return home if home.has_room and self._may_use(home, barred) else None
        kind = lane.kind
        if not kind.idle and not kind.shareable:
            return None
        if kind.shareable and not _must_wait_for_idle(lane):
            shareable = [worker for worker in kind.shareable.values() if self._may_use(worker, barred)]
            if shareable:
                return max(shareable, key=lambda worker: (worker.since, -worker.number))
        return self._last_idle(kind, barred)

    def _last_idle(self, kind: Kind, barred: frozenset[DeviceUuid]) -> WorkerView | None:
        """Among those that became idle at the same moment the oldest worker."""
        best: WorkerView | None = None
        for worker in reversed(kind.idle.values()):
            if best is not None and worker.since != best.since:
                break
            if self._may_use(worker, barred) and (best is None or worker.number < best.number):
                best = worker
        return best

    def _may_use(self, worker: WorkerView, barred: frozenset[DeviceUuid]) -> bool:
        return not worker.devices or (barred.isdisjoint(worker.devices) and self._fleet.is_usable(worker))

    def _assign_head(self, lane: Lane, worker: WorkerView, step: Step) -> None:
        ticket = self._queue.pop(lane)
        self._claims.drop(lane)
        self._assign(ticket, worker, step)

    def _assign(self, ticket: Ticket, worker: WorkerView, step: Step, inline: bool = False) -> None:
        self._fleet.assign(ticket, worker, step.now)
        step.decisions.append(Assign(ticket.id, worker.id, inline))

    def run_inline(self, ticket: Ticket, host: WorkerView, step: Step) -> bool:
        """Run a queued ticket inside the body that waits for it, if there are CPUs for it."""
        if not self._has_cpus(self._queue.lanes[ticket.id]):
            return False
        self._queue.take(ticket)
        self._assign(ticket, host, step, inline=True)
        return True

    # -- running ahead -------------------------------------------------------------------------------------

    def line_behind(self, worker: WorkerView) -> Iterator[TicketId]:
        """The tickets that a busy worker may be given ahead: those that wait in the lane of what it runs, in order."""
        if worker.state is not WorkerState.BUSY or worker.waiting or worker.waiting_early or worker.need.concurrency > 1:
            return
        lane = self._queue.lane_like(next(iter(worker.running.values())))
        if lane is None or lane.kind is not worker.kind or self._claims.barred_cpus(lane) or not self._claims.barred(lane).isdisjoint(worker.devices):
            return
        for _, ticket in lane.tickets:
            if ticket.ancestors:
                return  # who waits for it may be in the way
            yield ticket.id

    def run_ahead(self, worker: WorkerView, count: int, step: Step) -> None:
        """It is no turn of its own: what is given ahead lasts no longer than a moment, or is taken back."""
        for ticket_id in list(islice(self.line_behind(worker), count)):
            ticket = self._queue.pop(self._queue.lanes[ticket_id])
            self._fleet.give_ahead(ticket, worker)
            step.decisions.append(Assign(ticket_id, worker.id, ahead=True))

    # -- a new worker --------------------------------------------------------------------------------------

    def _make_room(self, lane: Lane, step: Step) -> bool:
        """Start a worker for the lane, or end an idle one that is in the way. True if one was started."""
        if self._is_limited(lane, with_starting=True):
            if not lane.kind.starting:
                return self._wait_for_quota(lane)
            explain.explain_start(lane)
            return False
        starting = len(lane.kind.starting)
        has_cpus = self._has_cpus(lane, self._fleet.promised_to(lane.need.uid) if lane.cpus else 0.0)
        if starting and (not has_cpus or starting * lane.need.at_once >= self._count_waiting(lane)):
            explain.explain_start(lane)
            return False
        if not has_cpus:
            lane.note_blocked(step.now)
            explain.explain_cpus(lane, self._cpus)
            return False
        return self._try_start(lane, step)

    def _count_waiting(self, lane: Lane) -> int:
        """Tickets that workers of this kind would serve; the calls of one instance are served by one."""
        plain = sum(len(other.tickets) for other in lane.kind.lanes if other.need.instance is None)
        homeless = {
            other.need.instance for other in lane.kind.lanes if other.need.instance is not None and self._fleet.home_of(other.need) is None
        }
        return plain + len(homeless) * lane.need.at_once

    def _try_start(self, lane: Lane, step: Step) -> bool:
        pool = lane.kind.pool
        most = pool.policy.workers_max
        if pool.places_used >= most:
            explain.explain_pool(lane, most)
            self._lifecycle.evict_from_pool(pool, lane.kind, step)
            return False
        if self._fleet.is_full:
            explain.explain_host(lane, self._fleet.most)
            self._lifecycle.evict_from_host(step)
            return False
        if not self._fleet.places_for(lane.need.uid):
            explain.explain_reserve(lane, self._fleet.reserve, self._fleet.most, FEW)
            self._lifecycle.evict_from_many(step)
            return False
        devices = self._ledger.pick(lane.need.gpu, self._claims.barred(lane)) if lane.need.gpu is not None else ()
        if devices is None:
            self._await_devices(lane, step)
            return False
        worker = self._lifecycle.start(lane.need, lane.kind, devices, step, lane.cpus)
        lane.wait(Reason.STARTING, worker.id)
        self._claims.drop(lane)
        return True

    def _await_devices(self, lane: Lane, step: Step) -> None:
        request = lane.need.gpu
        assert request is not None
        lane.note_blocked(step.now)
        self._explanations.explain_devices(lane)
        barred = self._claims.barred(lane)
        if barred is self._vain_barred and self._vain.get(request) == self._changes.devices:
            return
        for group in self._ledger.groups(request):
            usable = [uuid for uuid in group if uuid not in barred and self._ledger.is_usable(uuid)]
            if self._lifecycle.free_devices(usable, request.count, step):
                break
        if barred is not self._vain_barred:
            self._vain_barred = barred
            self._vain.clear()
        self._vain[request] = self._changes.devices


def _has_place(worker: WorkerView) -> bool:
    """A pool has more workers than its policy allows when some were started while bodies waited; no more of them run at once."""
    pool = worker.kind.pool
    return worker.state is not WorkerState.IDLE or len(pool.busy) < pool.policy.workers_max


def _must_wait_for_idle(lane: Lane) -> bool:
    """Who holds a main thread gets a worker that runs nothing: what stood behind him there would wait for what he calls, and that for others' like him.
    Nobody who came later keeps such workers busy meanwhile, but for what running bodies call."""
    if lane.need.is_alone:
        return True
    return not lane.tickets.head[1].ancestors and any(other.need.is_alone and other.rank < lane.rank for other in lane.kind.lanes)
