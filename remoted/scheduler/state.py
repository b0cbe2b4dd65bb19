"""What the scheduler knows: tickets in lanes, workers, and the pools and kinds that bring them together. Data and look-ups only."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import NamedTuple

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
    #: Its body holds the main thread, however many at once the worker takes: it has the worker for itself.
    is_alone: bool = False

    @property
    def at_once(self) -> int:
        """So many of these one worker serves."""
        return 1 if self.is_alone else self.concurrency

    @property
    def is_wide(self) -> bool:
        """It needs several devices at once, so a stream of narrow ones could pass it for ever."""
        return self.gpu is not None and self.gpu.count > 1


class Ticket(NamedTuple):
    """One waiting or running call, as far as the scheduler is concerned."""

    id: TicketId
    need: Need
    #: CPUs that are reserved while it runs; 0 = it shares the machine without a reservation.
    cpus: float = 0.0
    priority: int = 0
    ancestors: tuple[TicketId, ...] = ()

    @property
    def lane(self) -> LaneKey:
        """Tickets that have this in common wait in one line."""
        return self.need, self.priority, self.cpus


class WorkerState(str, Enum):
    STARTING = "STARTING"
    IDLE = "IDLE"
    BUSY = "BUSY"
    ENDING = "ENDING"


@dataclass(slots=True, eq=False)
class WorkerView:
    """A worker as the scheduler sees it; only the scheduler changes it."""

    id: WorkerId
    #: The how manyth of this scheduler's workers it is.
    number: int
    need: Need
    kind: Kind
    devices: tuple[DeviceUuid, ...]
    state: WorkerState
    since: float
    running: dict[TicketId, Ticket] = field(default_factory=dict)
    #: Tickets of the same lane that the worker has already, and begins one after another.
    ahead: dict[TicketId, Ticket] = field(default_factory=dict)
    #: Running tickets whose body waits for a nested call: they use neither CPU nor a place in the pool.
    waiting: set[TicketId] = field(default_factory=set)
    #: The same, of tickets ahead: their calls' word came on another connection than the end of those before.
    waiting_early: set[TicketId] = field(default_factory=set)
    #: Objects of remote classes that live there.
    instances: set[str] = field(default_factory=set)
    #: Started for a ticket of its user's turn, and nothing has run in it yet; the CPUs that this ticket reserves.
    is_fresh: bool = False
    expected_cpus: float = 0.0

    @property
    def is_waiting(self) -> bool:
        return bool(self.running) and len(self.waiting) == len(self.running)

    @property
    def has_room(self) -> bool:
        return self.state is WorkerState.IDLE or self.is_shareable

    @property
    def is_shareable(self) -> bool:
        """It runs something, and may run one more beside it."""
        if self.state is not WorkerState.BUSY or self.waiting or len(self.running) >= self.need.concurrency:
            return False
        return not next(iter(self.running.values())).need.is_alone


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

    def add_first(self, number: int, ticket: Ticket) -> None:
        self.add(number, ticket)
        self._items.move_to_end(ticket.id, last=False)

    def remove(self, ticket_id: TicketId) -> None:
        del self._items[ticket_id]

    def pop(self) -> Ticket:
        """The head."""
        return self._items.popitem(last=False)[1][1]


class Turns(IntEnum):
    """What users take turns for; a turn at one thing is none at another."""

    DEVICES = 0
    CPUS = 1
    WORKERS = 2


LaneKey = tuple[Need, int, float]


@dataclass(slots=True, eq=False)
class Lane:
    """Waiting tickets of one need, one reservation and one priority, in order of arrival."""

    need: Need
    priority: int
    cpus: float
    kind: Kind
    turns: Turns = field(init=False)
    tickets: Line = field(default_factory=Line)
    reason: Reason = Reason.WAITING_TURN
    about: tuple[str, ...] = ()
    #: Since when its head lacks devices or CPUs (monotonic seconds).
    blocked_since: float | None = None
    #: When it was last tried in vain: the step, and the change (``Changes.count``) that came last before.
    failed_step: int = -1
    failed_at: int = -1
    #: The facts that ``about`` tells (``Changes.facts``).
    explained: int = -1

    def __post_init__(self) -> None:
        self.turns = Turns.DEVICES if self.need.gpu is not None else Turns.CPUS if self.cpus else Turns.WORKERS

    @property
    def key(self) -> LaneKey:
        return self.need, self.priority, self.cpus

    @property
    def rank(self) -> tuple[int, int]:
        """Higher priority first, then the older head."""
        return (-self.priority, self.tickets.head[0])

    @property
    def is_wide(self) -> bool:
        return self.need.is_wide or self.cpus > 1

    @property
    def detail(self) -> str:
        return ", ".join(self.about)

    def wait(self, reason: Reason, *about: str) -> None:
        self.reason, self.about = reason, about

    def note_blocked(self, now: float) -> None:
        if self.blocked_since is None:
            self.blocked_since = now


KindKey = tuple[KindId, GpuRequest | None]


@dataclass(slots=True, eq=False)
class Kind:
    """Workers and lanes of one pool that fit each other. An index: ``Fleet`` and ``Queue`` keep it, ``validate`` checks it."""

    key: KindKey
    pool: Pool
    lanes: dict[Lane, None] = field(default_factory=dict)
    workers: dict[WorkerId, WorkerView] = field(default_factory=dict)
    starting: dict[WorkerId, WorkerView] = field(default_factory=dict)
    #: In the order in which they became idle.
    idle: dict[WorkerId, WorkerView] = field(default_factory=dict)
    shareable: dict[WorkerId, WorkerView] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Pool:
    """The workers of one pool by what they do, and how many lanes wait for it. An index like ``Kind``."""

    key: PoolKey
    policy: PoolPolicy
    kinds: dict[KindKey, Kind] = field(default_factory=dict)
    lanes: Counter[Turns] = field(default_factory=Counter)
    workers: dict[WorkerId, WorkerView] = field(default_factory=dict)
    #: In the order in which they became idle.
    idle: dict[WorkerId, WorkerView] = field(default_factory=dict)
    ending: dict[WorkerId, WorkerView] = field(default_factory=dict)
    #: Those with a body that runs and does not wait: no more than the policy allows are given anything new.
    busy: dict[WorkerId, WorkerView] = field(default_factory=dict)
    #: Those whose bodies all wait for nested calls: they use no place.
    waiting: dict[WorkerId, WorkerView] = field(default_factory=dict)
    #: The last change (``Changes.count``) that may help a lane of this pool.
    changed: int = 0

    @property
    def live(self) -> int:
        """Workers that are not being ended."""
        return len(self.workers) - len(self.ending)

    @property
    def places_used(self) -> int:
        return len(self.workers) - len(self.waiting)

    @property
    def has_extra(self) -> bool:
        """Workers were started for calls that bodies of this pool waited for, and are more than it may have without that."""
        return self.live - len(self.waiting) > self.policy.workers_max
