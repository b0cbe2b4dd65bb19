"""Whatever happens to the scheduler, in whatever order: its promises hold after every event, and nobody starves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from remoted.model import Device, DeviceUuid, Reason, Uid, WorkerId
from remoted.scheduler import events
from remoted.scheduler.fleet import FEW
from remoted.scheduler.matching import GpuRequest
from remoted.scheduler.policy import Scheduler
from remoted.scheduler.state import Need, PoolPolicy, Ticket, TicketId, WorkerState

GIB = 1 << 30
CARDS = tuple(Device(DeviceUuid(f"GPU-{n}"), n, n, name, gib * GIB, (8, 6)) for n, (name, gib) in enumerate([("NVIDIA GeForce RTX 3090", 24), ("NVIDIA GeForce RTX 3090", 24), ("NVIDIA RTX A6000", 48)]))
CPUS = 4.0
WEIGHTS = st.dictionaries(st.integers(1, 3), st.integers(1, 4))
REQUESTS = (None, None, GpuRequest(("ANY",), 1), GpuRequest(("ANY",), 2), GpuRequest(("NVIDIA RTX A6000", "AMPERE_24"), 1), GpuRequest(("AMPERE_24",), 2))


class SchedulerMachine(RuleBasedStateMachine):
    """A model of one host: it obeys the decisions, and keeps its own books to compare."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(CPUS, workers_total=12, workers_reserved=5, patience_seconds=5.0)
        self.now = 0.0
        self.history: list[tuple[events.Event, float, list[events.Decision]]] = []
        self.made = 0
        self.building = False
        self.leases: dict[DeviceUuid, WorkerId] = {}
        self.needs: dict[WorkerId, Need] = {}
        self.foreign: dict[DeviceUuid, tuple[int, ...]] = {}
        self.present: tuple[Device, ...] = ()
        self.most_running: dict[int, int] = {}
        self.order: dict[Any, list[TicketId]] = defaultdict(list)
        self.tickets: dict[TicketId, Ticket] = {}

    # -- the host ------------------------------------------------------------------------------------------

    def feed(self, event: events.Event) -> None:
        if isinstance(event, events.WorkerEnded):
            self.leases = {uuid: holder for uuid, holder in self.leases.items() if holder != event.worker}
        decisions = self.scheduler.handle(event, self.now)
        self.history.append((event, self.now, list(decisions)))
        for decision in decisions:
            self.check(decision)
        self.check_shares(decisions)
        self.check_limits(decisions)
        self.scheduler.validate()

    def check(self, decision: events.Decision) -> None:
        if isinstance(decision, events.StartWorker):
            self.check_start(decision)
        elif isinstance(decision, events.Assign):
            self.check_assignment(decision)
        elif isinstance(decision, events.Build):
            assert not self.building, "built twice"
            self.building = True
        elif isinstance(decision, events.Refuse):
            self.leave_line(decision.ticket)
            if decision.reason is Reason.WOULD_DEADLOCK:
                assert self.tickets[decision.ticket].ancestors, "only a nested call can close a ring"

    def check_start(self, start: events.StartWorker) -> None:
        for uuid in start.devices:
            assert uuid not in self.leases, "lent twice"
            assert uuid not in self.foreign, "lent although a stranger uses it"
            assert uuid in {card.uuid for card in self.present}, "lent although it is not there"
            self.leases[uuid] = start.worker
        assert len(start.devices) == (start.need.gpu.count if start.need.gpu else 0)
        self.needs[start.worker] = start.need
        mine = [worker for worker in self.scheduler.workers.values() if worker.need.uid == start.need.uid]
        assert len(mine) <= FEW or len(self.scheduler.workers) <= 12 - 5, "of those that are for users who have few"

    def check_assignment(self, assign: events.Assign) -> None:
        ticket = self.tickets[assign.ticket]
        worker = self.needs[assign.worker]
        assert (worker.uid, worker.pool, worker.kind, worker.gpu) == (ticket.need.uid, ticket.need.pool, ticket.need.kind, ticket.need.gpu)
        if not assign.inline:
            line = self.order[self.line_of(ticket)]
            assert line[0] == assign.ticket, "overtaken in its own lane"
            beside = [other.need.is_alone for other in self.scheduler.workers[assign.worker].running.values() if other is not ticket]
            assert assign.ahead or (not (beside and ticket.need.is_alone) and not any(beside)), "beside one who is alone"
        self.leave_line(assign.ticket)

    def check_places(self, assign: events.Assign) -> None:
        """However many workers nested calls made necessary: an idle one is given nothing while all places of its pool are used."""
        worker = self.scheduler.workers[assign.worker]
        if assign.inline or assign.ahead or len(worker.running) > 1:
            return
        busy = [other for other in self.scheduler.workers.values() if other.need.pool == worker.need.pool and other.running and not other.is_waiting and other.state is WorkerState.BUSY]
        assert len(busy) <= self.scheduler.policies[worker.need.pool].workers_max or worker not in busy, "more at once than its policy allows"

    def check_shares(self, decisions: list[events.Decision]) -> None:
        """Waiting bodies count neither against ``workers_max`` nor against the CPUs."""
        for decision in decisions:
            if isinstance(decision, events.Assign):
                self.check_places(decision)
        inline = any(isinstance(decision, events.Assign) and decision.inline for decision in decisions)
        for pool in {decision.need.pool for decision in decisions if isinstance(decision, events.StartWorker) and not inline}:
            counted = [worker for worker in self.scheduler.workers.values() if worker.need.pool == pool and not worker.is_waiting]
            assert len(counted) <= self.scheduler.policies[pool].workers_max
        if any(isinstance(decision, events.Assign) and self.tickets[decision.ticket].cpus for decision in decisions):
            assert self.scheduler.cpus_used() <= CPUS

    def check_limits(self, decisions: list[events.Decision]) -> None:
        """Nothing that nobody running has called makes its user run more than he may."""
        began = [self.tickets[decision.ticket] for decision in decisions if isinstance(decision, events.Assign) and not decision.ahead]
        for uid in {ticket.need.uid for ticket in began if not ticket.ancestors}:
            nested = sum(ticket.need.uid == uid and bool(ticket.ancestors) for ticket in began)
            running = sum(self.tickets[ticket].need.uid == uid for ticket in self.running(waiting=False))
            assert running - nested <= (self.most_running.get(uid) or running)

    def leave_line(self, ticket_id: TicketId) -> None:
        line = self.order[self.line_of(self.tickets[ticket_id])]
        if ticket_id in line:
            line.remove(ticket_id)

    @staticmethod
    def line_of(ticket: Ticket) -> Any:
        return (ticket.need, ticket.priority, ticket.cpus)

    def running(self, waiting: bool | None = None) -> list[TicketId]:
        return [
            ticket
            for worker in self.scheduler.workers.values()
            for ticket in worker.running
            if waiting is None or (ticket in worker.waiting) is waiting
        ]

    def workers_in(self, state: WorkerState) -> list[WorkerId]:
        return [worker.id for worker in self.scheduler.workers.values() if worker.state is state]

    # -- what happens --------------------------------------------------------------------------------------

    @initialize(count=st.integers(0, 3))
    def plug_in(self, count: int) -> None:
        self.see(CARDS[:count], {})

    def see(self, cards: tuple[Device, ...], foreign: dict[DeviceUuid, tuple[int, ...]], problem: str = "") -> None:
        self.present, self.foreign = cards, foreign
        self.feed(events.DevicesSeen(cards, tuple(foreign.items()), problem))

    @rule(data=st.data(), uid=st.integers(1, 3), pool=st.integers(0, 1), kind=st.integers(0, 1), gpu=st.sampled_from(REQUESTS))
    def submit(self, data: st.DataObject, uid: int, pool: int, kind: int, gpu: GpuRequest | None) -> None:
        self.made += 1
        callers = [ticket for ticket in self.running() if self.tickets[ticket].need.uid == uid]
        caller = data.draw(st.sampled_from([*callers, None]), "caller")
        ancestors = (*self.tickets[caller].ancestors, caller) if caller else ()
        instance = data.draw(st.sampled_from([None, None, None, "i"]), "instance")
        key = f"{uid}:{pool}:{kind}:{gpu}:{instance}" if instance else None
        environment = data.draw(st.sampled_from([None, None, None, "e"]), "environment")
        is_alone = bool(kind) and not key and data.draw(st.booleans(), "is_alone")
        need = Need(Uid(uid), (uid, "LiveServerless", f"p{pool}"), f"k{kind}", gpu, 1 + 2 * kind, environment, key, is_alone)
        cpus = data.draw(st.sampled_from([0.0, 0.0, 1.0, 2.0, 4.0]), "cpus")
        ticket = Ticket(f"t{self.made}", need, cpus, data.draw(st.sampled_from([0, 0, 5]), "priority"), ancestors)
        self.tickets[ticket.id] = ticket
        self.order[self.line_of(ticket)].append(ticket.id)
        self.feed(events.Submitted(ticket, PoolPolicy(data.draw(st.integers(0, 1)), data.draw(st.integers(1, 3)), 20.0)))
        if caller and caller in self.running(waiting=False) and data.draw(st.booleans(), "waits"):
            self.feed(events.Blocked(caller, True))

    @rule(weights=WEIGHTS, running=st.dictionaries(st.integers(1, 3), st.integers(1, 2)), everybodys=st.sampled_from([0, 0, 2]))
    def share_out(self, weights: dict[int, int], running: dict[int, int], everybodys: int) -> None:
        self.most_running = {uid: running.get(uid, everybodys) for uid in (1, 2, 3)}
        self.feed(events.SharesSet(tuple((Uid(uid), weight) for uid, weight in weights.items()), tuple((Uid(uid), most) for uid, most in running.items()), everybodys))

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        queued = [ticket.id for _, _, ticket in self.scheduler.waiting()]
        if queued:
            chosen = data.draw(st.sampled_from(queued))
            self.leave_line(chosen)
            self.feed(events.Withdrawn(chosen))

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        queued = [ticket.id for _, _, ticket in self.scheduler.waiting()]
        if queued:
            chosen = data.draw(st.lists(st.sampled_from(queued), unique=True))
            for ticket in chosen:
                self.leave_line(ticket)
            self.feed(events.Cleared(tuple(chosen)))

    @rule(data=st.data())
    def end_one(self, data: st.DataObject) -> None:
        if running := self.running(waiting=False):
            self.feed(events.Ended(data.draw(st.sampled_from(running))))

    @rule(data=st.data())
    def block_one(self, data: st.DataObject) -> None:
        if running := self.running(waiting=False):
            self.feed(events.Blocked(data.draw(st.sampled_from(running)), True))

    @rule(data=st.data())
    def block_early(self, data: st.DataObject) -> None:
        """Heard before the end of the call in front of it."""
        if ahead := [next(iter(worker.ahead)) for worker in self.scheduler.workers.values() if worker.ahead]:
            self.feed(events.Blocked(data.draw(st.sampled_from(ahead)), True))

    @rule(data=st.data())
    def unblock_one(self, data: st.DataObject) -> None:
        if waiting := self.running(waiting=True):
            self.feed(events.Blocked(data.draw(st.sampled_from(waiting)), False))

    @rule(data=st.data(), count=st.integers(1, 9))
    def run_ahead(self, data: st.DataObject, count: int) -> None:
        if busy := self.workers_in(WorkerState.BUSY):
            self.feed(events.RunAhead(data.draw(st.sampled_from(busy)), count))

    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        """The last one first, as they come back; what runs may never have begun either."""
        given = [[*worker.running, *worker.ahead] for worker in self.scheduler.workers.values() if worker.running and not worker.waiting]
        if given:
            ticket = data.draw(st.sampled_from(given))[-1]
            self.order[self.line_of(self.tickets[ticket])].insert(0, ticket)
            self.feed(events.Returned(ticket))

    @rule(data=st.data())
    def get_ready(self, data: st.DataObject) -> None:
        if starting := self.workers_in(WorkerState.STARTING):
            self.feed(events.WorkerReady(data.draw(st.sampled_from(starting))))

    @rule(data=st.data())
    def finish_ending(self, data: st.DataObject) -> None:
        if ending := self.workers_in(WorkerState.ENDING):
            self.feed(events.WorkerEnded(data.draw(st.sampled_from(ending))))

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        if workers := list(self.scheduler.workers):
            self.feed(events.WorkerEnded(data.draw(st.sampled_from(workers))))

    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        if workers := list(self.scheduler.workers):
            self.feed(events.WorkerClosing(data.draw(st.sampled_from(workers))))

    @rule(count=st.integers(0, 3), strangers=st.sets(st.sampled_from([card.uuid for card in CARDS])))
    def devices_change(self, count: int, strangers: set[DeviceUuid]) -> None:
        self.see(CARDS[:count], dict.fromkeys(sorted(strangers), (4711,)))

    @rule()
    def driver_hangs(self) -> None:
        self.see((), {}, "NVML did not answer")

    @precondition(lambda self: self.building)
    @rule(succeeds=st.booleans())
    def end_build(self, succeeds: bool) -> None:
        self.building = False
        self.feed(events.EnvironmentReady("e") if succeeds else events.EnvironmentFailed("e", "no such package"))

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(events.Tick())

    @precondition(lambda self: self.scheduler.policies)
    @rule(data=st.data(), seconds=st.sampled_from([1.0, 60.0]))
    def hold(self, data: st.DataObject, seconds: float) -> None:
        pool = data.draw(st.sampled_from(list(self.scheduler.policies)))
        self.feed(events.PoolHeld(pool, self.now + seconds))

    # -- what must hold ------------------------------------------------------------------------------------

    @invariant()
    def idle_workers_end_when_they_say(self) -> None:
        """No idle worker is kept beyond its moment, and the next wake-up misses none."""
        ends = [end for worker in self.scheduler.workers if (end := self.scheduler.kept_until(worker)) is not None]
        assert all(end > self.now for end in ends)
        wakeup = self.scheduler.next_wakeup()
        assert not ends or (wakeup is not None and wakeup <= min(ends))

    @invariant()
    def books_agree(self) -> None:
        assert self.scheduler.ledger.holders == self.leases

    def teardown(self) -> None:
        self.drive_to_quiescence()
        self.replay()

    def drive_to_quiescence(self) -> None:
        """Everything ends and every device is there: every ticket is assigned or refused in the end."""
        self.see(CARDS, {})
        for _ in range(40 * (len(self.tickets) + len(self.scheduler.workers) + 1)):
            self.now += 1.0
            if not self.one_step_on():
                break
        assert not list(self.scheduler.waiting()), f"starved: {[(lane.reason, lane.detail) for lane, _, _ in self.scheduler.waiting()]}"

    def one_step_on(self) -> bool:
        """Let one thing end. A body that waits goes on only after its nested calls are over."""
        if self.building:
            self.end_build(True)
            return True
        for state, event in ((WorkerState.ENDING, events.WorkerEnded), (WorkerState.STARTING, events.WorkerReady)):
            if found := self.workers_in(state):
                self.feed(event(found[0]))
                return True
        for ticket in [*self.running(waiting=False), *self.running(waiting=True)]:
            if ticket in self.running(waiting=False) or not self.scheduler.children.get(ticket):
                self.feed(events.Ended(ticket))
                return True
        return False

    def replay(self) -> None:
        again = Scheduler(CPUS, workers_total=12, workers_reserved=5, patience_seconds=5.0)
        doubting = Scheduler(CPUS, workers_total=12, workers_reserved=5, patience_seconds=5.0)
        for event, now, decisions in self.history:
            assert again.handle(event, now) == decisions, "the same events gave other decisions"
            doubting.doubt()
            assert doubting.handle(event, now) == decisions, "a lane was not tried although it would have been served"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


class Bench:
    """Users with equal calls share one card, one CPU or one place for a worker; the bench counts whose turn it was."""

    def __init__(self, shared: str) -> None:
        self.gpu = GpuRequest(("ANY",), 1) if shared == "card" else None
        self.cpus = 1.0 if shared == "cpu" else 0.0
        self.scheduler = Scheduler(1.0, workers_total=1 if shared == "place" else 100)
        self.now = 0.0
        self.made = 0
        self.fresh: set[WorkerId] = set()
        #: By user who waits: the others who had a turn since.
        self.passed_by: dict[int, set[int]] = {}
        self.checks_rounds = True
        self.on_turn: Callable[[int], object] = lambda uid: None
        self.decisions: list[events.Decision] = []
        self.feed(events.DevicesSeen(CARDS[:1]))

    def submit(self, uid: int) -> None:
        self.made += 1
        need = Need(Uid(uid), (uid, "LiveServerless", "p"), "k", self.gpu)
        self.feed(events.Submitted(Ticket(f"t{self.made}", need, self.cpus), PoolPolicy(workers_max=2)))

    def go_on(self, state: WorkerState, pick: int) -> None:
        """One worker that is starting, ending or busy gets on."""
        if found := [worker for worker in self.scheduler.workers.values() if worker.state is state]:
            worker = found[pick % len(found)]
            if state is WorkerState.BUSY:
                self.feed(events.Ended(next(iter(worker.running))))
            else:
                self.feed(events.WorkerReady(worker.id) if state is WorkerState.STARTING else events.WorkerEnded(worker.id))

    def feed(self, event: events.Event) -> None:
        self.now += 0.01
        decisions = self.scheduler.handle(event, self.now)
        self.decisions += decisions
        for decision in decisions:
            if isinstance(decision, events.StartWorker):
                self.fresh.add(decision.worker)
                self.take_turn(decision.need.uid)
            elif isinstance(decision, events.Assign):
                if decision.worker not in self.fresh:
                    self.take_turn(self.scheduler.workers[decision.worker].need.uid)
                self.fresh.discard(decision.worker)
        self.scheduler.validate()
        waiting = {lane.need.uid for lane, _, _ in self.scheduler.waiting() if lane.reason is not Reason.STARTING}
        self.passed_by = {uid: self.passed_by.get(uid, set()) for uid in waiting}

    def take_turn(self, uid: int) -> None:
        """Starting a worker is a turn, and its first call none; so is giving a call to a worker that was there."""
        self.on_turn(uid)
        self.passed_by.pop(uid, None)
        for other, passed in self.passed_by.items():
            assert uid not in passed or not self.checks_rounds, f"user {uid} had two turns while user {other} waited"
            passed.add(uid)


@settings(max_examples=150, deadline=None)
@given(
    shared=st.sampled_from(["card", "cpu", "place"]),
    steps=st.lists(st.one_of(st.integers(1, 4), st.tuples(st.sampled_from([WorkerState.STARTING, WorkerState.ENDING, WorkerState.BUSY, WorkerState.BUSY]), st.integers(0, 3))), max_size=120),
)
def test_c05_nobody_who_waits_is_passed_twice_by_the_same_user(shared: str, steps: list[int | tuple[WorkerState, int]]) -> None:
    bench = Bench(shared)
    for step in steps:
        if isinstance(step, int):
            bench.submit(step)
        else:
            bench.go_on(*step)


def give_turns(shared: str, weights: dict[int, int], turns: int) -> list[int]:
    """Who had them, while each of these users always has calls waiting."""
    bench = Bench(shared)
    bench.checks_rounds = False
    bench.feed(events.SharesSet(tuple((Uid(uid), weight) for uid, weight in weights.items())))
    had: list[int] = []
    bench.on_turn = had.append
    for _ in range(turns):
        for uid in weights:
            bench.submit(uid)
    while len(had) < turns:
        for state in (WorkerState.ENDING, WorkerState.STARTING, WorkerState.BUSY):
            bench.go_on(state, 0)
    return had[:turns]


@settings(max_examples=60, deadline=None)
@given(shared=st.sampled_from(["card", "cpu", "place"]), weights=st.dictionaries(st.integers(1, 4), st.integers(1, 5), min_size=2))
def test_c05_turns_are_as_weights_while_all_wait(shared: str, weights: dict[int, int]) -> None:
    """After any number of turns nobody is further from his part than a round."""
    total, rounds = sum(weights.values()), 8
    had = give_turns(shared, weights, total * rounds)

    for uid, weight in weights.items():
        for count in range(len(had)):
            assert abs(had[:count].count(uid) - count * weight / total) <= 2 * len(weights), (weights, had[:count])
        assert abs(had.count(uid) - weight * rounds) <= len(weights)


def test_c05_two_to_one_is_two_turns_to_one() -> None:
    had = give_turns("card", {1: 2, 2: 1}, 31)[1:]  # the first comes when nobody else is there

    assert had.count(1) == 20
    assert had.count(2) == 10
    assert "222" not in "".join(map(str, had))


@settings(max_examples=60, deadline=None)
@given(
    shared=st.sampled_from(["card", "cpu", "place"]),
    weight=st.integers(2, 7),
    steps=st.lists(st.one_of(st.integers(1, 4), st.tuples(st.sampled_from([WorkerState.STARTING, WorkerState.ENDING, WorkerState.BUSY, WorkerState.BUSY]), st.integers(0, 3))), max_size=80),
)
def test_c05_equal_weights_decide_exactly_as_none(shared: str, weight: int, steps: list[int | tuple[WorkerState, int]]) -> None:
    plain, equal = Bench(shared), Bench(shared)
    equal.feed(events.SharesSet(tuple((Uid(uid), weight) for uid in range(1, 5))))
    for bench in (plain, equal):
        for step in steps:
            if isinstance(step, int):
                bench.submit(step)
            else:
                bench.go_on(*step)

    assert plain.decisions == equal.decisions
