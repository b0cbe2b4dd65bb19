"""What happens to the scheduler (events) and what it wants done (decisions). Small frozen facts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from remoted.limits import Limits
from remoted.model import Device, DeviceUuid, Reason, Uid, WorkerId
from remoted.scheduler.state import Need, PoolKey, PoolPolicy, Ticket, TicketId


@dataclass(frozen=True, slots=True)
class Submitted:
    """A call arrived, and ``behind`` it others of its lane; the policy is its pool's newest."""

    ticket: Ticket
    policy: PoolPolicy
    behind: tuple[Ticket, ...] = ()


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A waiting call is not wanted any more (cancelled, or it could not be stored)."""

    ticket: TicketId


@dataclass(frozen=True, slots=True)
class Cleared:
    """These waiting calls are taken out together: none of them is placed because another has left."""

    tickets: tuple[TicketId, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt is over and its worker is free again (``WorkerEnded`` says so for a dead worker)."""

    ticket: TicketId


@dataclass(frozen=True, slots=True)
class RunAhead:
    """What runs in this worker is short: it may have so many more calls of the same lane, which begin there one after another."""

    worker: WorkerId
    count: int


@dataclass(frozen=True, slots=True)
class Returned:
    """A call that a worker had been given ahead has not begun there and never will: it waits again, before all others of its lane."""

    ticket: TicketId


@dataclass(frozen=True, slots=True)
class Blocked:
    """A running body waits for a nested call (or goes on again)."""

    ticket: TicketId
    waiting: bool


@dataclass(frozen=True, slots=True)
class WorkerReady:
    worker: WorkerId


@dataclass(frozen=True, slots=True)
class WorkerClosing:
    """The worker takes no more calls: it is stale, it is being ended from outside the scheduler, or it ``is_dead`` and its devices are not seen to be empty yet."""

    worker: WorkerId
    is_dead: bool = False


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """Every process of the worker is dead and its devices are seen to be empty."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class WorkerAdopted:
    """A worker of an earlier daemon can be talked to: until it is ready it is as one that starts."""

    worker: WorkerId
    need: Need
    devices: tuple[DeviceUuid, ...]
    policy: PoolPolicy


@dataclass(frozen=True, slots=True)
class TicketAdopted:
    """A worker of an earlier daemon still has this ticket (``ahead``: behind others); one that was not adopted takes no other."""

    worker: WorkerId
    ticket: Ticket
    devices: tuple[DeviceUuid, ...]
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class DevicesSeen:
    devices: tuple[Device, ...]
    #: Processes that are not ours, by device.
    foreign: tuple[tuple[DeviceUuid, tuple[int, ...]], ...] = ()
    #: Why the driver said nothing; then ``devices`` is empty, which does not mean that they are gone.
    problem: str = ""


@dataclass(frozen=True, slots=True)
class InstanceFound:
    """It lives in this worker of an earlier daemon's."""

    instance: str
    worker: WorkerId


@dataclass(frozen=True, slots=True)
class InstanceDropped:
    """Nobody can call this instance any more."""

    instance: str


@dataclass(frozen=True, slots=True)
class EnvironmentReady:
    environment: str


@dataclass(frozen=True, slots=True)
class EnvironmentFailed:
    """It could not be made: who waits for it is refused, and the next to come tries again."""

    environment: str
    message: str
    #: What the build printed.
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PoolHeld:
    """Somebody uses this pool's config until ``until`` (monotonic seconds; infinite as long as a process lives): ``workers_min`` holds."""

    pool: PoolKey
    until: float


@dataclass(frozen=True, slots=True)
class SharesSet:
    """Users' weights, and how many calls each may run at once: those named, and everybody else (0 is no limit)."""

    weights: tuple[tuple[Uid, int], ...]
    running: tuple[tuple[Uid, int], ...] = ()
    everybodys: int = 0

    @classmethod
    def of(cls, limits: Limits) -> SharesSet:
        users = [(Uid(uid), share) for uid, share in limits.users.items()]
        running = tuple((uid, share.running_jobs) for uid, share in users if share.running_jobs is not None)
        return cls(tuple((uid, share.weight) for uid, share in users), running, limits.running_jobs_per_uid)


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Submitted
    | Withdrawn
    | Cleared
    | Ended
    | RunAhead
    | Returned
    | Blocked
    | WorkerReady
    | WorkerClosing
    | WorkerEnded
    | WorkerAdopted
    | TicketAdopted
    | DevicesSeen
    | InstanceFound
    | InstanceDropped
    | EnvironmentReady
    | EnvironmentFailed
    | PoolHeld
    | SharesSet
    | Tick
)


class Assign(NamedTuple):
    """A call gets a worker. A tuple: of a map there are thousands."""

    ticket: TicketId
    worker: WorkerId
    #: Runs inside a body that waits for it (MECHANISMS 15).
    inline: bool = False
    #: Begins when what runs in the worker has ended.
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker: WorkerId
    need: Need
    devices: tuple[DeviceUuid, ...]


@dataclass(frozen=True, slots=True)
class StopWorker:
    worker: WorkerId
    why: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The ticket can never run as things stand."""

    ticket: TicketId
    reason: Reason
    message: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Build:
    """The environment that the ticket needs must be made first."""

    environment: str
    ticket: TicketId


Decision = Assign | StartWorker | StopWorker | Refuse | Build


@dataclass(slots=True)
class Step:
    """One event's consequences as they are found."""

    now: float
    decisions: list[Decision] = field(default_factory=list)
