"""The daemon's scheduler on a virtual clock: a workload goes in, waits and fairness come out.

A discrete-event driver around the same ``Scheduler`` object that the daemon uses. Nothing here asks a clock or
throws dice: arrivals and durations are given (``benchmarks/simulate.py`` makes them and measures the speed).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from remoted.model import Device, DeviceUuid, Uid
from remoted.scheduler import events
from remoted.scheduler.matching import parse_request
from remoted.scheduler.policy import Scheduler
from remoted.scheduler.state import Need, PoolPolicy, Ticket, TicketId, WorkerState

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Arrival:
    """One call: who, when, how long it runs, what it needs. ``gpus`` 0 is a CPU function."""

    at: float
    uid: int
    seconds: float
    gpus: int = 1
    kind: str = "k"
    cpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that a worker takes to start and to end."""

    start: float = 2.0
    end: float = 0.5


@dataclass
class Report:
    """What happened: waits by ticket, GPU seconds by user, and how much the scheduler was asked."""

    events: int = 0
    ended_at: float = 0.0
    waits: dict[TicketId, float] = field(default_factory=dict)
    waits_of: dict[int, list[float]] = field(default_factory=dict)
    gpu_seconds: dict[int, float] = field(default_factory=dict)
    starts: int = 0

    def wait(self, quantile: float) -> float:
        """Seconds from arrival to assignment that the given share of all calls did not exceed."""
        ordered = sorted(self.waits.values())
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0.0

    def fairness(self) -> float:
        """Jain's index of the users' GPU seconds: 1 is equal, 1/n is all for one."""
        shares = list(self.gpu_seconds.values())
        squares = sum(share * share for share in shares)
        return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


class Simulation:
    """One host of ``gpus`` equal cards."""

    def __init__(
        self, gpus: int, cpus: float = 64.0, times: Times | None = None, policy: PoolPolicy | None = None, validate: bool = False
    ) -> None:
        self.scheduler = Scheduler(cpus)
        self.report = Report()
        self.now = 0.0
        self._times = times or Times()
        self._policy = policy or PoolPolicy(workers_max=1000)
        self._validate = validate
        self._agenda: list[tuple[float, int, events.Event]] = []
        self._arrivals: dict[TicketId, Arrival] = {}
        self._needs: dict[tuple[int, str, int], Need] = {}
        self._made = 0
        self._wakeup: float | None = None
        #: When the next tick comes.
        self._tick_at: float | None = None
        self._feed(events.DevicesSeen(tuple(_card(number) for number in range(gpus))))

    def run(self, arrivals: Iterable[Arrival], until: float = float("inf")) -> Report:
        """Everything that is due before ``until``; then nothing more arrives and what runs is left running."""
        for arrival in arrivals:
            self._plan(arrival.at, self._submission(arrival))
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, event = heapq.heappop(self._agenda)
            if not isinstance(event, events.Tick) or self._is_due():
                self._feed(event)
        self.report.ended_at = self.now
        return self.report

    def _submission(self, arrival: Arrival) -> events.Submitted:
        key = (arrival.uid, arrival.kind, arrival.gpus)
        need = self._needs.get(key)
        if need is None:
            need = self._needs[key] = _need(*key)
        ticket = Ticket(f"t{len(self._arrivals)}", need, arrival.cpus)
        self._arrivals[ticket.id] = arrival
        return events.Submitted(ticket, self._policy)

    def _plan(self, at: float, event: events.Event) -> None:
        self._made += 1
        heapq.heappush(self._agenda, (at, self._made, event))

    def _feed(self, event: events.Event) -> None:
        self.report.events += 1
        for decision in self.scheduler.handle(event, self.now):
            self._obey(decision)
        if self._validate:
            self.scheduler.validate()
        self._wakeup = self.scheduler.next_wakeup()
        self._plan_tick()

    def _is_due(self) -> bool:
        """A tick has come. Events since may have put off what it was planned for."""
        if self._tick_at is not None and self.now >= self._tick_at:
            self._tick_at = None
        self._plan_tick()
        return self._wakeup is not None and self.now >= self._wakeup

    def _plan_tick(self) -> None:
        """Plan none where an earlier one will come anyway."""
        wakeup = self._wakeup
        if wakeup is not None and wakeup > self.now and (self._tick_at is None or wakeup < self._tick_at):
            self._tick_at = wakeup
            self._plan(wakeup, events.Tick())

    def _obey(self, decision: events.Decision) -> None:
        if isinstance(decision, events.Assign):
            self._begin(decision.ticket)
        elif isinstance(decision, events.StartWorker):
            self.report.starts += 1
            self._plan(self.now + self._times.start, events.WorkerReady(decision.worker))
        elif isinstance(decision, events.StopWorker):
            self._plan(self.now + self._times.end, events.WorkerEnded(decision.worker))

    def _begin(self, ticket: TicketId) -> None:
        arrival = self._arrivals[ticket]
        self.report.waits[ticket] = self.now - arrival.at
        self.report.waits_of.setdefault(arrival.uid, []).append(self.now - arrival.at)
        spent = self.report.gpu_seconds.get(arrival.uid, 0.0)
        self.report.gpu_seconds[arrival.uid] = spent + arrival.gpus * arrival.seconds
        self._plan(self.now + arrival.seconds, events.Ended(ticket))

    @property
    def is_quiet(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.scheduler.tickets and all(worker.state is not WorkerState.BUSY for worker in self.scheduler.workers.values())


def _need(uid: int, kind: str, gpus: int) -> Need:
    return Need(Uid(uid), (uid, "LiveServerless", kind), kind, parse_request((), gpus) if gpus else None)


def _card(number: int) -> Device:
    return Device(DeviceUuid(f"GPU-{number}"), number, number, "NVIDIA GeForce RTX 3090", 24 * _GIB, (8, 6))
