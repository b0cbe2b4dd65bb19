"""What the scheduler knows: tickets in lanes, pools with their policies, workers. Data and look-ups only."""

from __future__ import annotations

from collections import deque
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
    #: An instance lives in one worker: its calls go there and nowhere else (MECHANISMS 14).
    home: WorkerId | None = None


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

    @property
    def is_waiting(self) -> bool:
        return bool(self.running) and len(self.waiting) == len(self.running)

    @property
    def has_room(self) -> bool:
        return self.state is WorkerState.IDLE or (self.state is WorkerState.BUSY and not self.waiting and len(self.running) < self.need.concurrency)

    def serves(self, need: Need) -> bool:
        if need.home is not None:
            return self.id == need.home
        mine = self.need
        return mine.pool == need.pool and mine.kind == need.kind and mine.gpu == need.gpu


@dataclass(slots=True)
class Lane:
    """Waiting tickets of one need and priority, in order of arrival."""

    need: Need
    priority: int
    tickets: deque[tuple[int, Ticket]] = field(default_factory=deque)
    reason: Reason = Reason.WAITING_TURN
    detail: str = ""

    @property
    def rank(self) -> tuple[int, int]:
        """Higher priority first, then the older head."""
        return (-self.priority, self.tickets[0][0])


LaneKey = tuple[Need, int]
