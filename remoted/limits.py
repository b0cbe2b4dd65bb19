"""Every cap of the daemon, with its unit in its name; the configuration may change each.

One object serves the daemon's whole life. Only a reload changes it (``follow``), between two turns of the event loop.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection
from dataclasses import dataclass, field, fields


def size_text(count: int) -> str:
    """Bytes for people, in units of a thousand as disks are sold."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 100 * size and unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count} bytes"


@dataclass(frozen=True, slots=True)
class Share:
    """What one user has of his own; None is what everybody has."""

    weight: int = 1
    queued_jobs: int | None = None
    running_jobs: int | None = None
    stored_bytes: int | None = None
    connections: int | None = None


_ORDINARY = Share()


@dataclass(slots=True)
class Limits:
    # One user's share of each of the two sockets (T13): a flood by one user must leave root's calls alone.
    connections_per_uid: int = 512
    connections_total: int = 900
    # A second, of one user (T18); 0 is no limit. Beyond it an HTTP request is refused, and frames of the data socket wait.
    requests_per_second_per_uid: int = 0
    frames_per_second_per_uid: int = 0
    # A silent or trickling peer (T12). Frames: from first byte to last; HTTP: head, then body.
    hello_deadline_seconds: float = 10.0
    frame_deadline_seconds: float = 30.0
    http_head_deadline_seconds: float = 10.0
    http_body_deadline_seconds: float = 30.0
    http_body_bytes: int = 1 << 20
    # Unsent bytes that a slow reader may make the daemon hold before it is dropped.
    outbox_bytes: int = 8 << 20
    # Jobs and stored bytes of one user (T18, T44).
    queued_jobs_per_uid: int = 100_000
    # At once; 0 is as many as there is room for. A call that waits for a nested one does not count.
    running_jobs_per_uid: int = 0
    # Arguments of one user's calls that wait or run, as far as they lie in memory: those of at most 64 KiB.
    arguments_bytes_per_uid: int = 1 << 30
    content_bytes: int = 64 << 30
    stored_bytes_per_uid: int = 10 << 30
    result_seconds: float = 7 * 86_400.0
    content_seconds: float = 86_400.0
    free_disk_reserve_bytes: int = 64 << 20
    spec_bytes: int = 1 << 20
    # What a job prints: the first so many bytes are kept, the rest is counted, and the count is in the log.
    log_bytes_per_job: int = 64 << 20
    # Objects of remote classes that live in one user's workers: what is remembered of each stays here.
    instances_per_uid: int = 10_000
    # HTTP routes of one user's functions; each with a description of at most 64 KiB.
    routes_per_uid: int = 256
    # Unread items of a generator (SURFACE F21).
    stream_items: int = 64
    stream_bytes: int = 16 << 20
    # Workers. Memory and tasks hold where there are cgroups; 0 is nine tenths of the host's memory.
    workers_total: int = 256
    # The last of them, where there are several users, are for those who have fewer than 4: nobody takes a worker from a body that
    # runs, so some are left for others. At most a quarter of all.
    workers_reserved: int = 64
    worker_memory_bytes: int = 0
    worker_tasks: int = 8192
    start_deadline_seconds: float = 60.0
    launch_deadline_seconds: float = 30.0
    # Fork servers: so many (0 turns them off), until they were idle for so long; one that failed is tried again after a while.
    fork_servers_total: int = 16
    fork_servers_per_uid: int = 16
    fork_server_idle_seconds: float = 600.0
    fork_server_retry_seconds: float = 60.0
    cancel_term_seconds: float = 3.0
    cancel_kill_seconds: float = 10.0
    crash_loop_count: int = 5
    crash_loop_seconds: float = 30.0
    nesting_depth: int = 16
    retry_base_seconds: float = 0.5
    retry_cap_seconds: float = 60.0
    pool_busy_seconds: float = 30.0
    # Short calls that a worker is given ahead: so many, and no more than it ends in so many seconds. Whoever of them lasts
    # longer than a patience gives those behind it back.
    ahead_calls: int = 64
    ahead_seconds: float = 0.02
    ahead_patience_seconds: float = 0.05
    # A lease that nobody uses ends; one that is used ends after its turn when others wait.
    lease_idle_seconds: float = 0.2
    lease_turn_seconds: float = 1.0
    housekeeping_seconds: float = 60.0
    user_mode_idle_seconds: float = 900.0
    #: By uid, who has limits of his own.
    users: dict[int, Share] = field(default_factory=dict)

    def values(self) -> dict[str, int | float]:
        """Everybody's, by name."""
        return {found.name: getattr(self, found.name) for found in fields(self) if found.name != "users"}

    def follow(self, other: Limits, but: Collection[str] = ()) -> None:
        """Be as ``other`` from here on, except for these."""
        for name, value in other.values().items():
            if name not in but:
                setattr(self, name, value)
        self.users = dict(other.users)

    def share(self, uid: int) -> Share:
        return self.users.get(uid, _ORDINARY)

    def queued_jobs(self, uid: int) -> int:
        return _own(self.share(uid).queued_jobs, self.queued_jobs_per_uid)

    def running_jobs(self, uid: int) -> int:
        """0 is no limit."""
        return _own(self.share(uid).running_jobs, self.running_jobs_per_uid)

    def retry_pause(self, attempts: int) -> float:
        """Exponential with full jitter on the upper half: two failing jobs do not come back together."""
        full = min(self.retry_cap_seconds, self.retry_base_seconds * 2 ** (attempts - 1))
        return float(full * random.uniform(0.5, 1.0))

    def stored_bytes(self, uid: int) -> int:
        return _own(self.share(uid).stored_bytes, self.stored_bytes_per_uid)

    def worker_memory(self, asked: int | None = None) -> int:
        """Of one worker: what its config asks for, else everybody's, else nine tenths of the host's: the rest is the daemon's and the kernel's."""
        return asked or self.worker_memory_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 9 // 10

    def connections(self, uid: int) -> int:
        return _own(self.share(uid).connections, self.connections_per_uid)

    def full_for_one(self, uid: int, own: int) -> str:
        """The cap that a user with so many connections at one door has reached, with its value; "" if there is room."""
        return f"connections_per_uid is {self.connections(uid)}" if own >= self.connections(uid) else ""

    def full_for_all(self, own: int, everybodys: int) -> str:
        """The same of all users. Who has few has a reserve that the others together cannot fill."""
        most = self.connections_total + (self.connections_reserve if own < _FEW else 0)
        return f"connections_total is {self.connections_total}" if everybodys >= most else ""

    @property
    def connections_reserve(self) -> int:
        """Beyond ``connections_total``."""
        return self.connections_total // _RESERVE_PART


#: Connections that an ordinary user has at once.
_FEW = 8
_RESERVE_PART = 8


def _own(own: int | None, everybodys: int) -> int:
    return everybodys if own is None else own
