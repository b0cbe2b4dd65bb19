"""What the scheduler knows: tickets in lanes, pools with their policies, workers. Data and look-ups only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from remoted.model import DeviceUuid, Reason, Uid, WorkerId
from remoted.scheduler.matching import GpuRequest

TicketId = str
KindId = str
PoolKey = tuple[int, str, str]
"""(uid, config class, name). Groups of one uid are one principal on one host, so uid stands for both."""


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """What a user may change while workers live: no change ends a worker by itself."""

    workers_min: int = 0
    workers_max: int = 3
    idle_timeout_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Need:
    """What a worker for these tickets must be; equal needs are served by the same workers, in one lane."""

    uid: Uid
    pool: PoolKey
    kind: KindId
    gpu: GpuRequest | None = None
    concurrency: int = 1
    environment: str | None = None
    #: An object of a remote class lives in one worker: the first call chooses it, all others follow (MECHANISMS 14).
    instance: str | None = None

    @property
    def is_wide(self) -> bool:
        """It needs several devices at once, so a stream of narrow ones could pass it for ever."""
        return self.gpu is not None and self.gpu.count > 1


@dataclass(frozen=True, slots=True)
class Ticket:
    """One waiting or running call, as far as the scheduler is concerned."""

    id: TicketId
    need: Need
    #: CPUs that are reserved while it runs; 0 = it shares the machine without a reservation.
    cpus: float = 0.0
    priority: int = 0
    ancestors: tuple[TicketId, ...] = ()


class WorkerState(str, Enum):
    STARTING = "STARTING"
    IDLE = "IDLE"
    BUSY = "BUSY"
    ENDING = "ENDING"


@dataclass(slots=True)
class WorkerView:
    """A worker as the scheduler sees it; only the scheduler changes it."""

    id: WorkerId
    need: Need
    devices: tuple[DeviceUuid, ...]
    state: WorkerState
    since: float
    running: dict[TicketId, Ticket] = field(default_factory=dict)
    #: Running tickets whose body waits for a nested call: they use neither CPU nor a place in the pool.
    waiting: set[TicketId] = field(default_factory=set)
    #: Started for a ticket of its user's turn, and nothing has run in it yet; the CPUs that this ticket reserves.
    is_fresh: bool = False
    expected_cpus: float = 0.0

    @property
    def is_waiting(self) -> bool:
        return bool(self.running) and len(self.waiting) == len(self.running)

    @property
    def has_room(self) -> bool:
        return self.state is WorkerState.IDLE or (self.state is WorkerState.BUSY and not self.waiting and len(self.running) < self.need.concurrency)

    def fits(self, need: Need) -> bool:
        """Is it the kind of worker that such tickets run in?"""
        mine = self.need
        return mine.pool == need.pool and mine.kind == need.kind and mine.gpu == need.gpu


class Line:
    """Waiting tickets in order of arrival, each with its number; leaving from anywhere costs the same."""

    def __init__(self) -> None:
        self._items: OrderedDict[TicketId, tuple[int, Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[tuple[int, Ticket]]:
        return iter(self._items.values())

    @property
    def head(self) -> tuple[int, Ticket]:
        return next(iter(self._items.values()))

    def add(self, number: int, ticket: Ticket) -> None:
        self._items[ticket.id] = (number, ticket)

    def pop(self) -> Ticket:
        return self._items.popitem(last=False)[1][1]

    def remove(self, ticket_id: TicketId) -> Ticket:
        return self._items.pop(ticket_id)[1]


class Turns(Enum):
    """What users take turns for; a turn at one thing is none at another."""

    DEVICES = 0
    CPUS = 1
    WORKERS = 2


@dataclass(slots=True)
class Lane:
    """Waiting tickets of one need, one reservation and one priority, in order of arrival."""

    need: Need
    priority: int
    cpus: float
    tickets: Line = field(default_factory=Line)
    reason: Reason = Reason.WAITING_TURN
    about: tuple[str, ...] = ()
    #: Since when its head lacks devices or CPUs (monotonic seconds).
    blocked_since: float | None = None
    #: The scheduler's step in which it was last tried in vain, and the facts that ``about`` tells.
    failed_step: int = -1
    explained: int = -1

    @property
    def rank(self) -> tuple[int, int]:
        """Higher priority first, then the older head."""
        return (-self.priority, self.tickets.head[0])

    @property
    def turns(self) -> Turns:
        if self.need.gpu is not None:
            return Turns.DEVICES
        return Turns.CPUS if self.cpus else Turns.WORKERS

    @property
    def is_wide(self) -> bool:
        return self.need.is_wide or self.cpus > 1

    @property
    def detail(self) -> str:
        return ", ".join(self.about)

    def wait(self, reason: Reason, *about: str) -> None:
        self.reason, self.about = reason, about


LaneKey = tuple[Need, int, float]
