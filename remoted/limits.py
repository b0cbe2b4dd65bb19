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
    # A flood by one user must leave root's calls alone (T13).
    #: Connections of one user to each of the two sockets.
    connections_per_uid: int = 512
    #: Connections of all users to each; an eighth more is for users who have few.
    connections_total: int = 900
    # Beyond these an HTTP request is refused, and frames of the data socket wait (T18).
    #: HTTP requests of one user a second; 0 is no limit.
    requests_per_second_per_uid: int = 0
    #: Messages of one user's clients a second; 0 is no limit.
    frames_per_second_per_uid: int = 0
    # A silent or trickling peer (T12).
    #: Until a client has said who it is.
    hello_deadline_seconds: float = 10.0
    #: From the first byte of a message to its last.
    frame_deadline_seconds: float = 30.0
    #: Until the head of an HTTP request has come.
    http_head_deadline_seconds: float = 10.0
    #: And then its body.
    http_body_deadline_seconds: float = 30.0
    #: The body of an HTTP request.
    http_body_bytes: int = 1 << 20
    #: Unsent bytes that a slow reader may make the daemon hold before it is dropped.
    outbox_bytes: int = 8 << 20
    # What one user may take of the queue and the disk (T18, T44).
    #: Jobs of one user that wait or run.
    queued_jobs_per_uid: int = 100_000
    #: Calls of one user that run at once, without those that wait for a nested one; 0 is as many as there is room for.
    running_jobs_per_uid: int = 0
    #: Arguments of one user's calls that wait or run, as far as they lie in memory: those of at most 64 KiB.
    arguments_bytes_per_uid: int = 1 << 30
    #: One large argument, or the code of one function.
    content_bytes: int = 64 << 30
    #: All that is kept of one user on the disk: arguments, results, output.
    stored_bytes_per_uid: int = 10 << 30
    #: For so long results are kept (7 days).
    result_seconds: float = 7 * 86_400.0
    #: And so long code and large arguments that no call needs any more (1 day).
    content_seconds: float = 86_400.0
    #: So much of the disk is left free for everything else.
    free_disk_reserve_bytes: int = 64 << 20
    #: The description of a function's config, and a caller's environment.
    spec_bytes: int = 1 << 20
    #: What a job prints: the first so many bytes are kept, the rest is counted, and the count is in the log.
    log_bytes_per_job: int = 64 << 20
    #: Objects of remote classes that live in one user's workers.
    instances_per_uid: int = 10_000
    #: HTTP routes of one user's functions.
    routes_per_uid: int = 256
    # Unread items of a generator (SURFACE F21).
    #: Items that a generator may be ahead of its reader.
    stream_items: int = 64
    #: The same in bytes.
    stream_bytes: int = 16 << 20
    #: Workers of the whole host.
    workers_total: int = 256
    # Nobody takes a worker from a body that runs, so some are left for others.
    #: The last of them are for users who have fewer than 4, where there are several users; at most a quarter of all.
    workers_reserved: int = 64
    # Memory and tasks hold where there are cgroups.
    #: What a worker and all that it starts may take where its config says nothing; 0 is nine tenths of the host's memory.
    worker_memory_bytes: int = 0
    #: Processes and threads of one worker.
    worker_tasks: int = 8192
    #: Until a new worker answers.
    start_deadline_seconds: float = 60.0
    #: Until its process is there.
    launch_deadline_seconds: float = 30.0
    #: Processes from which workers are forked, of the whole host; 0 turns them off.
    fork_servers_total: int = 16
    #: The same of one user.
    fork_servers_per_uid: int = 16
    #: One that nobody needed for so long ends.
    fork_server_idle_seconds: float = 600.0
    #: One that failed is tried again after so long.
    fork_server_retry_seconds: float = 60.0
    #: A body that is cancelled or timed out has so long to end by itself; then its processes get SIGTERM.
    cancel_term_seconds: float = 3.0
    #: And after so long SIGKILL.
    cancel_kill_seconds: float = 10.0
    #: Where so many workers of a pool end unexpectedly, no more are kept ready ...
    crash_loop_count: int = 5
    #: ... if they did within so long; who waits gets one all the same.
    crash_loop_seconds: float = 30.0
    #: Calls within calls.
    nesting_depth: int = 16
    #: The pause before the first retry; each further one is twice as long ...
    retry_base_seconds: float = 0.5
    #: ... up to this.
    retry_cap_seconds: float = 60.0
    #: For so long a load-balanced call waits for a worker; then it is refused as POOL_BUSY.
    pool_busy_seconds: float = 30.0
    #: Short calls that a worker is given ahead at most ...
    ahead_calls: int = 64
    #: ... and no more than it ends in so long.
    ahead_seconds: float = 0.02
    #: A call that lasts longer than this gives those behind it back.
    ahead_patience_seconds: float = 0.05
    #: A client that does not use its worker for so long gives it back.
    lease_idle_seconds: float = 0.2
    #: One that does, after so long, when others wait.
    lease_turn_seconds: float = 1.0
    #: Between two looks for what is old.
    housekeeping_seconds: float = 60.0
    #: A daemon of one user's own that a call has started ends when it was idle for so long.
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

    @property
    def reserve(self) -> int:
        """Workers for users who have few, as it is where there are several users."""
        return min(self.workers_reserved, self.workers_total // 4)

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
