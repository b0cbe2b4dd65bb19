"""The scheduler's decisions in single situations; ``test_scheduler_properties`` tries all others."""

from __future__ import annotations

from dataclasses import replace

from remoted.model import Device, DeviceUuid, Reason, Uid, WorkerId
from remoted.scheduler import events
from remoted.scheduler.matching import GpuRequest
from remoted.scheduler.policy import Scheduler
from remoted.scheduler.simulate import Arrival, Simulation, Times
from remoted.scheduler.state import Need, PoolPolicy, Ticket, WorkerState

GIB = 1 << 30
ONE = GpuRequest(("ANY",), 1)
TWO = GpuRequest(("ANY",), 2)


class Desk:
    """A scheduler, and events in few words."""

    def __init__(self, gpus: int = 1, cpus: float = 4.0) -> None:
        self.scheduler = Scheduler(cpus, patience_seconds=10.0)
        self.now = 0.0
        self.feed(events.DevicesSeen(cards(gpus)))

    def feed(self, event: events.Event, at: float | None = None) -> list[events.Decision]:
        self.now = self.now if at is None else at
        decisions = self.scheduler.handle(event, self.now)
        self.scheduler.validate()
        return decisions

    def submit(self, name: str, uid: int = 1, gpu: GpuRequest | None = ONE, kind: str = "k", above: tuple[str, ...] = (), most: int = 8, instance: str | None = None) -> list[events.Decision]:
        need = Need(Uid(uid), (uid, "LiveServerless", kind), kind, gpu, instance=instance)
        return self.feed(events.Submitted(Ticket(name, need, ancestors=above), PoolPolicy(workers_max=most)))

    def run(self, name: str, **asked: object) -> WorkerId:
        """Submit it, let its worker start, and return the worker."""
        self.submit(name, **asked)  # type: ignore[arg-type]
        for worker in list(self.scheduler.workers.values()):
            if worker.state.value == "STARTING":
                self.feed(events.WorkerReady(worker.id))
        return self.scheduler.placed[name]


def cards(count: int) -> tuple[Device, ...]:
    return tuple(Device(DeviceUuid(f"GPU-{n}"), n, n, "NVIDIA GeForce RTX 3090", 24 * GIB, (8, 6)) for n in range(count))


def test_c07_an_idle_worker_is_ended_for_another_pool_and_its_device_lent_only_after() -> None:
    desk = Desk()
    first = desk.run("a")
    desk.feed(events.Ended("a"))
    assert desk.submit("b", uid=2) == [events.StopWorker(first, "its GPU is needed")]
    (start,) = desk.feed(events.WorkerEnded(first))
    assert isinstance(start, events.StartWorker)
    assert start.devices == ("GPU-0",)


def test_t18_one_users_calls_that_never_end_leave_workers_for_others() -> None:
    desk = Desk()
    desk.scheduler = Scheduler(4.0, workers_total=14, workers_reserved=6)
    for uid in (1, 2):
        for name in "abcd":
            desk.run(f"{name}{uid}", uid=uid, gpu=None, kind=f"{name}{uid}")
    for uid in (1, 2):
        assert desk.submit(f"e{uid}", uid=uid, gpu=None, kind=f"e{uid}") == [], "two with many leave the rest to others"
    reasons = [(lane.reason, "workers_reserved" in lane.detail) for lane, _, _ in desk.scheduler.waiting()]
    assert reasons == [(Reason.WAITING_WORKER, True)] * 2
    bobs = desk.run("bobs", uid=3, gpu=None)
    desk.run("bobs other", uid=3, gpu=None, kind="other")
    desk.feed(events.Ended("bobs"))
    assert desk.scheduler.workers[bobs].state is WorkerState.IDLE, "one of those who have few makes no room for them"
    (stop,) = desk.feed(events.Ended("b1"))
    assert stop == events.StopWorker(WorkerId("w2"), "its place is needed")
    (start,) = desk.feed(events.WorkerEnded(WorkerId("w2")))
    assert isinstance(start, events.StartWorker)
    assert start.need.kind == "e1"


def test_c07_a_fresh_worker_serves_whom_it_was_started_for_before_anybody_may_end_it() -> None:
    desk = Desk()
    desk.submit("a", uid=1)
    desk.submit("b", uid=2)
    (worker,) = desk.scheduler.workers
    assert desk.feed(events.WorkerReady(worker)) == [events.Assign("a", worker)]


def test_c07_a_wide_request_takes_two_idle_devices_at_once_and_spares_them_where_that_is_not_enough() -> None:
    desk = Desk(gpus=2)
    first, second = desk.run("a"), desk.run("b")
    desk.feed(events.Ended("a"))
    assert desk.submit("wide", uid=2, gpu=TWO) == [], "ending one worker would not help yet"
    assert desk.feed(events.Ended("b")) == [events.StopWorker(first, "its GPU is needed"), events.StopWorker(second, "its GPU is needed")]


def test_c07_a_wide_request_claims_devices_once_it_has_waited_long() -> None:
    desk = Desk(gpus=2)
    first, second = desk.run("a"), desk.run("b")
    desk.submit("wide", uid=2, gpu=TWO)
    for name in ("c", "d", "e"):
        desk.submit(name)
    assert events.Assign("c", first) in desk.feed(events.Ended("a"), at=5.0), "it may be passed for some time"
    assert not [decision for decision in desk.feed(events.Ended("c"), at=11.0) if isinstance(decision, events.Assign)]
    stops = desk.feed(events.Ended("b"))
    assert {decision.worker for decision in stops if isinstance(decision, events.StopWorker)} == {first, second}


def test_c07_lanes_that_claim_devices_and_cpus_do_not_block_each_other() -> None:
    desk = Desk(gpus=2)
    wide = Need(Uid(1), (1, "LiveServerless", "w"), "w", TWO)
    greedy = Need(Uid(2), (2, "LiveServerless", "g"), "g", TWO)
    holder = desk.run("holder", uid=3)
    desk.feed(events.Submitted(Ticket("wide", wide, 1.0), PoolPolicy()), at=1.0)
    desk.feed(events.Submitted(Ticket("greedy", greedy, 4.0), PoolPolicy()), at=2.0)
    desk.feed(events.Ended("holder"), at=100.0)
    (start,) = desk.feed(events.WorkerEnded(holder))
    assert isinstance(start, events.StartWorker)
    assert start.need is wide


def test_c07_nothing_is_lent_or_given_to_an_idle_worker_while_the_driver_is_silent() -> None:
    desk = Desk()
    worker = desk.run("a")
    desk.feed(events.Ended("a"))
    desk.feed(events.DevicesSeen((), problem="NVML did not answer"))
    assert desk.submit("b") == []
    lane, _ = desk.scheduler.lane_of("b") or (None, 0)
    assert lane is not None
    assert (lane.reason, lane.detail) == (Reason.WAITING_GPU, "NVML did not answer")
    assert desk.feed(events.DevicesSeen(cards(1))) == [events.Assign("b", worker)]


def test_c07_an_idle_worker_whose_card_is_gone_is_ended() -> None:
    desk = Desk()
    worker = desk.run("a")
    desk.feed(events.Ended("a"))
    assert desk.feed(events.DevicesSeen(())) == [events.StopWorker(worker, "its GPU is gone")]


def test_f29_a_child_behind_others_in_the_queue_runs_inside_its_caller() -> None:
    desk = Desk()
    worker = desk.run("p")
    desk.submit("q")
    desk.submit("child", above=("p",))
    assert desk.feed(events.Blocked("p", True)) == [events.Assign("child", worker, inline=True)]


def test_f29_a_ring_over_two_devices_costs_one_call_only() -> None:
    desk = Desk(gpus=2)
    desk.run("p", kind="a")
    desk.run("q", kind="b")
    desk.submit("p1", kind="b", above=("p",))
    desk.submit("q1", kind="a", above=("q",))
    assert desk.feed(events.Blocked("p", True)) == []
    (refused,) = desk.feed(events.Blocked("q", True))
    assert isinstance(refused, events.Refuse)
    assert refused.message.endswith(f"{refused.ticket[0]} > {refused.ticket}")


def test_f29_nobody_is_refused_while_the_holder_of_the_device_goes_on_by_itself() -> None:
    desk = Desk()
    desk.run("holder")
    desk.run("cpu-child", gpu=None, kind="c", above=("holder",))
    desk.feed(events.Blocked("holder", True))
    desk.run("stranger", gpu=None, kind="d")
    desk.submit("wants-gpu", kind="e", above=("stranger",))
    assert desk.feed(events.Blocked("stranger", True)) == []


def test_f20_the_calls_of_one_instance_go_to_one_worker_and_together_to_a_new_one() -> None:
    desk = Desk(gpus=0)
    worker = desk.run("a", gpu=None, instance="i")
    assert desk.submit("b", gpu=None, instance="i") == []
    assert desk.submit("c", gpu=None, instance="i") == []
    (start,) = desk.feed(events.WorkerEnded(worker))
    assert isinstance(start, events.StartWorker)
    assert desk.feed(events.WorkerReady(start.worker)) == [events.Assign("b", start.worker)]
    assert desk.feed(events.Ended("b")) == [events.Assign("c", start.worker)]


def test_f30_a_failed_environment_is_an_event_that_refuses_who_waits_and_lets_the_next_try_again() -> None:
    desk = Desk()
    need = Need(Uid(1), (1, "LiveServerless", "k"), "k", None, environment="env")
    assert desk.feed(events.Submitted(Ticket("a", need), PoolPolicy())) == [events.Build("env", "a")]
    desk.submit("other", gpu=None, kind="c")
    assert desk.feed(events.EnvironmentFailed("env", "no such package", "log")) == [events.Refuse("a", Reason.ENVIRONMENT, "no such package", "log")]
    assert desk.feed(events.Submitted(Ticket("b", need), PoolPolicy())) == [events.Build("env", "b")]
    (start,) = desk.feed(events.EnvironmentReady("env"))
    assert isinstance(start, events.StartWorker)


def test_f30_an_idle_worker_is_kept_until_its_timeout_or_as_long_as_its_pool_is_held() -> None:
    desk = Desk(gpus=0)
    need = Need(Uid(1), (1, "LiveServerless", "k"), "k")
    (start,) = desk.feed(events.Submitted(Ticket("a", need), PoolPolicy(workers_min=1, idle_timeout_seconds=20.0)))
    assert isinstance(start, events.StartWorker)
    worker = start.worker
    assert desk.scheduler.kept_until(worker) is None, "it starts"
    desk.feed(events.WorkerReady(worker))
    assert desk.scheduler.kept_until(worker) is None, "it is busy"
    desk.feed(events.Ended("a"), at=5.0)
    assert desk.scheduler.kept_until(worker) == desk.scheduler.next_wakeup() == 25.0
    desk.feed(events.PoolHeld(need.pool, 60.0))
    assert desk.scheduler.kept_until(worker) == 60.0
    assert desk.feed(events.Tick(), at=59.0) == []
    assert desk.feed(events.Tick(), at=60.0) == [events.StopWorker(worker, "idle")]
    assert desk.scheduler.kept_until(worker) is None


def test_c05_workers_that_die_again_and_again_are_not_kept_up_for_nobody() -> None:
    """``workers_min`` starts another one at once, but not for ever; who waits for a worker still gets one."""
    desk = Desk(gpus=0)
    need = Need(Uid(1), (1, "LiveServerless", "k"), "k", concurrency=1)
    policy = PoolPolicy(workers_min=2, workers_max=3)
    desk.feed(events.PoolHeld(need.pool, 1000.0))
    started = desk.feed(events.Submitted(Ticket("a", need), policy))
    keeper, dying = (decision.worker for decision in started if isinstance(decision, events.StartWorker))
    desk.feed(events.WorkerReady(keeper))
    for second in range(1, 5):
        (again,) = desk.feed(events.WorkerEnded(dying), at=float(second))
        assert isinstance(again, events.StartWorker)
        dying = again.worker
    assert desk.feed(events.WorkerEnded(dying), at=5.0) == [], "the fifth in five seconds"
    assert desk.scheduler.next_wakeup() == 31.0
    waiting = [decision for decision in desk.feed(events.Submitted(Ticket("b", need), policy), at=6.0) if isinstance(decision, events.StartWorker)]
    assert len(waiting) == 1
    desk.feed(events.Withdrawn("b"), at=6.0)
    desk.feed(events.WorkerEnded(waiting[0].worker), at=7.0)
    assert desk.feed(events.Tick(), at=31.0) == []
    assert [type(decision) for decision in desk.feed(events.Tick(), at=37.5)] == [events.StartWorker]


def test_c05_calls_that_fill_all_cpus_run_after_any_sequence_of_fractions() -> None:
    """0.1 + 0.2 - 0.1 - 0.2 is not 0 in binary fractions; who asks for all CPUs must not wait for that rest."""
    desk = Desk(gpus=0)
    for name, cpus in (("a", 0.1), ("b", 0.2)):
        need = Need(Uid(1), (1, "LiveServerless", name), name)
        (start,) = desk.feed(events.Submitted(Ticket(name, need, cpus), PoolPolicy()))
        assert isinstance(start, events.StartWorker)
        desk.feed(events.WorkerReady(start.worker))
    desk.feed(events.Ended("a"))
    desk.feed(events.Ended("b"))
    (start,) = desk.feed(events.Submitted(Ticket("all", Need(Uid(2), (2, "LiveServerless", "k"), "k"), 4.0), PoolPolicy()))
    assert isinstance(start, events.StartWorker)


def test_c05_users_of_one_card_take_turns() -> None:
    simulation = Simulation(1, validate=True)
    report = simulation.run(Arrival(at=0.0, uid=1 + number % 3, seconds=5.0, kind=f"u{number % 3}") for number in range(60))
    assert simulation.is_quiet
    assert report.fairness() > 0.999
    slowest = [max(waits) for waits in report.waits_of.values()]
    assert max(slowest) - min(slowest) <= 30.0, "they end together, to a round and a switch"


def test_c05_a_stream_of_cpu_calls_does_not_cost_a_user_his_turn_at_the_card() -> None:
    """Placing a CPU call uses no turn at the devices."""
    calls = [Arrival(0.1 * number, 1, 0.05, gpus=0, kind="cpu") for number in range(600)]
    mine = [Arrival(1.0, 1, 1.0, kind="mine")]
    theirs = [Arrival(0.0, 2, 2.0, kind="theirs") for _ in range(30)]
    report = Simulation(1, times=Times(0.1, 0.1), validate=True).run([*calls, *theirs, *mine])
    assert report.waits["t630"] < 6.0, "after the call that ran, not after all of theirs"


def _short_calls(desk: Desk, count: int, workers: int = 2) -> None:
    """``count`` equal calls a0, a1, ... of which a pool of two workers runs the first ones."""
    need = Need(Uid(1), (1, "LiveServerless", "k"), "k")
    for number in range(count):
        desk.feed(events.Submitted(Ticket(f"a{number}", need, 1.0), PoolPolicy(workers_max=workers)))
    for worker in list(desk.scheduler.workers):
        desk.feed(events.WorkerReady(worker))


def test_c05_calls_that_come_together_are_placed_as_if_one_came_after_the_other() -> None:
    need = Need(Uid(1), (1, "LiveServerless", "k"), "k")
    tickets = [Ticket(f"a{number}", need, 1.0) for number in range(5)]
    apart, together = Desk(gpus=0), Desk(gpus=0)

    one_by_one = [decision for ticket in tickets for decision in apart.feed(events.Submitted(ticket, PoolPolicy(workers_max=2)))]
    at_once = together.feed(events.Submitted(tickets[0], PoolPolicy(workers_max=2), tuple(tickets[1:])))

    assert at_once == one_by_one
    assert together.scheduler.in_order_of_arrival() == tickets == apart.scheduler.in_order_of_arrival()
    for desk in (apart, together):
        for worker in list(desk.scheduler.workers):
            desk.feed(events.WorkerReady(worker))
    assert together.scheduler.placed == apart.scheduler.placed


def test_c05_a_worker_is_given_the_next_calls_of_its_lane_and_begins_them_in_order() -> None:
    desk = Desk(gpus=0)
    _short_calls(desk, 6, workers=1)
    (worker,) = desk.scheduler.workers
    given = desk.feed(events.RunAhead(worker, 3))
    assert given == [events.Assign(f"a{number}", worker, ahead=True) for number in (1, 2, 3)]
    assert desk.feed(events.Ended("a0")) == []
    assert list(desk.scheduler.workers[worker].running) == ["a1"]
    assert desk.scheduler.cpus_used() == 1.0
    for ticket in ("a1", "a2", "a3"):
        desk.feed(events.Ended(ticket))
    assert list(desk.scheduler.workers[worker].running) == ["a4"], "the next one of the line"


def test_f29_a_call_that_was_given_ahead_may_wait_for_another_before_its_beginning_is_heard_of() -> None:
    """Its own word and the end of the call before it come on two connections, in any order."""
    desk = Desk(gpus=0)
    _short_calls(desk, 3, workers=1)
    (worker,) = desk.scheduler.workers
    desk.feed(events.RunAhead(worker, 1))
    desk.feed(events.Blocked("a1", True))
    assert desk.feed(events.RunAhead(worker, 1)) == [], "nobody waits behind it"
    started = desk.feed(events.Ended("a0"))
    assert [type(decision) for decision in started] == [events.StartWorker], "its own does not count while it waits"
    assert desk.scheduler.workers[worker].waiting == {"a1"}
    desk.feed(events.Blocked("a1", False))
    assert not desk.scheduler.workers[worker].waiting


def test_c05_what_comes_back_is_served_first_and_at_once_where_somebody_is_free() -> None:
    desk = Desk(gpus=0)
    _short_calls(desk, 5)
    slow, quick = desk.scheduler.workers
    desk.feed(events.RunAhead(slow, 2))
    desk.feed(events.Ended("a1"))
    desk.feed(events.Ended("a4"))
    assert not list(desk.scheduler.waiting())
    assert desk.feed(events.Returned("a3")) == [events.Assign("a3", quick)]
    assert desk.feed(events.Returned("a2")) == []
    assert [ticket.id for _, _, ticket in desk.scheduler.waiting()] == ["a2"]
    assert desk.feed(events.Ended("a3")) == [events.Assign("a2", quick)]


def test_c05_workers_min_takes_no_place_that_a_waiting_call_needs() -> None:
    """One worker of the pool is ended for a call that needs another kind: ``workers_min`` must not fill its place again."""
    desk = Desk(gpus=2)
    holder = desk.run("holder", uid=1)
    plain, wide = (Need(Uid(3), (3, "LiveServerless", "p"), "k", gpu) for gpu in (None, TWO))
    policy = PoolPolicy(workers_min=1, workers_max=1)
    desk.feed(events.Submitted(Ticket("a", plain), policy))
    desk.feed(events.PoolHeld(plain.pool, 1000.0))
    (worker,) = (view.id for view in desk.scheduler.workers.values() if view.need is plain)
    desk.feed(events.WorkerReady(worker))
    desk.feed(events.Submitted(Ticket("wide", wide), policy))
    assert desk.feed(events.Ended("a")) == [events.StopWorker(worker, "its place is needed")]

    assert desk.feed(events.WorkerEnded(worker)) == [], "its place is for the wide one, which waits for a device"
    assert desk.feed(events.Ended("holder")) == [events.StopWorker(holder, "its GPU is needed")]
    (start,) = desk.feed(events.WorkerEnded(holder))
    assert isinstance(start, events.StartWorker)
    assert start.need is wide


def adopt(desk: Desk, name: str, gpu: GpuRequest | None = ONE, devices: tuple[str, ...] = ("GPU-0",)) -> WorkerId:
    worker = WorkerId("w-of-before")
    need = Need(Uid(1), (1, "LiveServerless", name), name, gpu)
    desk.feed(events.WorkerAdopted(worker, need, tuple(map(DeviceUuid, devices)), PoolPolicy(workers_max=2)))
    return worker


def test_c09_an_adopted_worker_keeps_its_device_and_takes_calls_once_it_has_answered() -> None:
    desk = Desk()
    worker = adopt(desk, "k")
    assert desk.submit("a") == [], "its pool's place is taken by one that starts"
    assert desk.submit("b", uid=2, kind="other") == [], "and so is the device"

    assert desk.feed(events.WorkerReady(worker)) == [events.Assign("a", worker)]
    assert desk.scheduler.policies[(1, "LiveServerless", "k")].workers_max == 8, "the policy of a newer call counts"


def test_c09_what_an_adopted_worker_runs_is_placed_there_in_order() -> None:
    desk = Desk(gpus=0)
    worker = adopt(desk, "k", gpu=None, devices=())
    need = desk.scheduler.workers[worker].need
    for number, ahead in enumerate((False, True, True)):
        desk.feed(events.TicketAdopted(worker, Ticket(f"t{number}", need), (), ahead))
    desk.feed(events.WorkerReady(worker))
    view = desk.scheduler.workers[worker]
    assert (list(view.running), list(view.ahead), view.state.value) == (["t0"], ["t1", "t2"], "BUSY")

    desk.feed(events.Ended("t0"))
    assert list(view.running) == ["t1"]
    desk.feed(events.Ended("t1"))
    desk.feed(events.Ended("t2"))
    assert view.state.value == "IDLE"


def test_c09_a_worker_that_cannot_be_talked_to_takes_nothing_more() -> None:
    desk = Desk(gpus=0)
    need = Need(Uid(1), (1, "LiveServerless", "k"), "k", None)
    desk.feed(events.TicketAdopted(WorkerId("adopted"), Ticket("t", need), ()))
    desk.feed(events.Ended("t"))
    (start,) = desk.submit("a", gpu=None)
    assert isinstance(start, events.StartWorker)


def test_t18_names_of_pools_are_not_remembered_for_ever() -> None:
    desk = Desk(gpus=0)
    for number in range(50):
        desk.submit(f"job{number}", gpu=None, kind=f"pool{number}")
        desk.feed(events.Withdrawn(f"job{number}"))
    for worker in list(desk.scheduler.workers):
        desk.feed(events.WorkerEnded(worker))
    assert not desk.scheduler.policies
    desk.feed(events.PoolHeld((1, "LiveServerless", "kept"), until=100.0))
    desk.submit("job", gpu=None, kind="kept")
    desk.feed(events.Withdrawn("job"))
    for worker in list(desk.scheduler.workers):
        desk.feed(events.WorkerEnded(worker))
    assert list(desk.scheduler.policies) == [(1, "LiveServerless", "kept")]
    desk.feed(events.Tick(), at=101.0)
    assert not desk.scheduler.policies


def test_t18_nobody_holds_so_many_pools_that_each_event_takes_long() -> None:
    desk = Desk(gpus=0)
    for number in range(1000):
        desk.feed(events.PoolHeld((1, "LiveServerless", f"pool{number}"), until=100.0))
    desk.feed(events.PoolHeld((2, "LiveServerless", "of another"), until=100.0))
    assert len(desk.scheduler.held_until) == 257
    assert (2, "LiveServerless", "of another") in desk.scheduler.held_until


def test_c09_who_runs_a_call_of_another_edition_gets_none_of_that_ahead() -> None:
    """The kind of a call changes over an upgrade, and the worker that runs it does not."""
    desk = Desk(gpus=0)
    worker = adopt(desk, "k", gpu=None, devices=())
    need = replace(desk.scheduler.workers[worker].need, kind="next")
    desk.feed(events.TicketAdopted(worker, Ticket("t0", need), ()))
    desk.feed(events.WorkerReady(worker))
    desk.feed(events.Submitted(Ticket("t1", need), PoolPolicy(0, 1)))

    assert list(desk.scheduler.line_behind(worker)) == []


def lone_calls(somebody_waits: bool) -> list[list[events.Decision]]:
    """What a ticket is given in situations of all kinds; with ``somebody_waits`` another user's waits for ever for a card that is not there."""
    desk = Desk(gpus=0)
    if somebody_waits:
        desk.submit("other", uid=9, gpu=ONE)
    found = []

    def submit(name: str, **asked: object) -> None:
        found.append(desk.submit(name, gpu=None, **asked))  # type: ignore[arg-type]

    for name in "abc":
        desk.run(name, gpu=None)
    for name, moment in (("b", 1.0), ("a", 2.0), ("c", 2.0)):
        desk.feed(events.Ended(name), at=moment)
    submit("last used")  # of those that became idle together the oldest
    submit("the other of them")
    submit("too many", most=2)
    desk.feed(events.Withdrawn("too many"))
    submit("other kind", kind="l")
    desk.feed(events.Withdrawn("other kind"))
    desk.feed(events.SharesSet((), ((Uid(1), 2),), 0))
    submit("over the limit")
    desk.feed(events.Withdrawn("over the limit"))
    desk.feed(events.SharesSet((), (), 0))
    submit("within it", most=8)
    submit("one more")
    return found


def test_c07_a_ticket_that_comes_where_nobody_waits_is_given_what_its_lane_would_be_given() -> None:
    alone, beside = lone_calls(somebody_waits=False), lone_calls(somebody_waits=True)

    assert alone == beside
    assert [len(decisions) for decisions in alone[:2]] == [1, 1]
    assert not alone[2]


def starts_of(ends: list[events.Event]) -> int:
    """How many workers of a pool with ``workersMin`` are started in the first seconds, when each that has started is told so of."""
    desk = Desk(gpus=1)
    need = Need(Uid(1), (1, "LiveServerless", "kept"), "kept", ONE)
    desk.feed(events.PoolHeld(need.pool, 1000.0))
    found = [*desk.feed(events.Submitted(Ticket("first", need), PoolPolicy(workers_min=1)))]
    started = 0
    for second in range(20):
        starts = [decision for decision in found if isinstance(decision, events.StartWorker)]
        started += len(starts)
        found = []
        for start in starts:
            if not second:
                desk.feed(events.WorkerReady(start.worker))
                desk.feed(events.Ended("first"))
            for end in ends:
                found += desk.feed(replace(end, worker=start.worker), at=float(second))  # type: ignore[arg-type, call-arg]
    return started


def test_c05_a_worker_that_is_dead_before_its_card_is_looked_at_counts_as_one_that_died() -> None:
    """Else a pool whose workers die at once would start one after another for ever."""
    dead, ended = events.WorkerClosing(WorkerId(""), is_dead=True), events.WorkerEnded(WorkerId(""))

    assert starts_of([ended]) == starts_of([dead, ended]) == 5
    assert starts_of([events.WorkerClosing(WorkerId("")), ended]) == 20
