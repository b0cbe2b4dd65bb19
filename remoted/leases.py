"""A client's connection in a worker's hands: its calls pass by the daemon, which watches and can take it back.

The worker says in a shared page which call it has in hand (``wire.LEASE_PAGE``); the daemon reads the page now and
then and when somebody waits. A lease ends when either side dies, when nothing was called for a while, when its turn
is over and others wait, or when one of its calls is stopped. What the worker writes there harms only its own user: the
daemon charges by its own clock, from grant to end.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from remoted import foreign
from remoted.attempts import Content, LeaseSpec
from remoted.calls import Call
from remoted.clock import Clock
from remoted.limits import Limits
from remoted.model import Reason
from remoted_client import wire

_TICK_SECONDS = 0.1
#: Idle for less than this is a client that has just received its answer and sends the next call.
_PAUSE_SECONDS = 0.002
_PAGE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Door(Protocol):
    """Where a lease was asked for."""

    def hand_over(self) -> socket.socket | None:
        """The connection, which nobody here reads any more; None when the client has gone, or has sent what it must not."""
        ...


class Page(NamedTuple):
    """What the worker says of the lease. Times in seconds since boot."""

    accepted: int
    answered: int
    began: float
    timeout_seconds: float
    ended: float

    @property
    def is_idle(self) -> bool:
        return self.answered >= self.accepted


_NEW = Page(0, 0, 0.0, 0.0, 0.0)


@dataclass(eq=False)
class Lease(Call):
    """A call as far as the scheduler and ``remotectl`` are concerned; as many as its client likes in truth."""

    door: Door | None = None
    connection: socket.socket | None = None
    page_fd: int = -1
    granted_at: float = 0.0
    #: Told to end: no news about it is expected but its end.
    is_revoked: bool = False
    #: The page at its end.
    last_page: Page = _NEW

    def read_page(self) -> Page:
        """The newest state. A torn write is seen once, and read again at the next look."""
        if self.page_fd < 0:
            return self.last_page
        accepted, answered, began, timeout, ended = wire.LEASE_PAGE.unpack(os.pread(self.page_fd, wire.LEASE_PAGE.size, 0))
        return Page(accepted, answered, began / 1e9, timeout / 1e3, ended / 1e9)


class Leases:
    """The leases that were granted, and when each must end."""

    def __init__(self, clock: Clock, limits: Limits, others_wait: Callable[[], bool]) -> None:
        self._clock = clock
        self._limits = limits
        self._others_wait = others_wait
        self._granted: set[Lease] = set()
        self._timer: asyncio.TimerHandle | None = None

    def grant(self, lease: Lease, connection: socket.socket, context: Content) -> LeaseSpec:
        """The lease begins; what the worker is to be told. The caller has taken ``connection`` out of its own loop."""
        self.resume(lease, connection, _make_page())
        concurrent = lease.spec.pool.max_concurrency > 1
        return LeaseSpec(lease.token, lease.id, lease.request.spec, context, os.dup(connection.fileno()), os.dup(lease.page_fd), concurrent)

    def resume(self, lease: Lease, connection: socket.socket, page: int) -> None:
        """A worker has it. Both are this object's from here on."""
        lease.connection, lease.page_fd = connection, page
        lease.granted_at = self._clock.monotonic()
        self._granted.add(lease)
        self._set_timer()

    def end(self, lease: Lease) -> None:
        """Its client sees the end of the connection, even if a child of the worker holds a copy. Idempotent."""
        self._granted.discard(lease)
        if lease.page_fd >= 0:
            lease.last_page = lease.read_page()
            os.close(lease.page_fd)
            lease.page_fd = -1
        if lease.connection is not None:
            foreign.leave(lease.connection)
            lease.connection = None

    def stop_call(self, lease: Lease, number: int | None, why: Reason) -> None:
        """Stop one call (None: the one in hand), and with it the lease."""
        page = lease.read_page()
        number = page.accepted if number is None else number
        assert lease.worker is not None
        if number < page.accepted or (number == page.accepted and page.is_idle):
            if why is Reason.CALLER_GONE:
                self.revoke(lease)
            return
        began = page.began if number == page.accepted else self._clock.boottime()

        def is_running() -> bool:
            now = lease.read_page()
            return now.accepted == number and not now.is_idle

        lease.is_revoked = True
        lease.worker.stop_leased(lease.token, number, began, is_running, why)

    def revoke(self, lease: Lease) -> None:
        """It ends when the call in hand has."""
        if not lease.is_revoked and lease.worker is not None:
            lease.is_revoked = True
            lease.worker.revoke(lease.token)

    def make_room(self) -> None:
        """Somebody waits: leases that nobody uses right now end."""
        for lease in self._granted:
            page = lease.read_page()
            if page.is_idle and self._unused_seconds(lease, page) > _PAUSE_SECONDS:
                self.revoke(lease)

    def revoke_all(self) -> None:
        """Each ends with the call in hand."""
        for lease in list(self._granted):
            self.revoke(lease)

    def _unused_seconds(self, lease: Lease, page: Page) -> float:
        return min(self._clock.boottime() - page.ended, self._clock.monotonic() - lease.granted_at)

    # -- now and then --------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if self._timer is None and self._granted:
            self._timer = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._timer = None
        others_wait = bool(self._granted) and self._others_wait()
        for lease in list(self._granted):
            if not lease.is_revoked:
                self._look_at(lease, others_wait)
        self._set_timer()

    def _look_at(self, lease: Lease, others_wait: bool) -> None:
        page, now = lease.read_page(), self._clock.boottime()
        held = self._clock.monotonic() - lease.granted_at
        if page.is_idle:
            if self._unused_seconds(lease, page) > (_PAUSE_SECONDS if others_wait else self._limits.lease_idle_seconds):
                self.revoke(lease)
        elif page.timeout_seconds and now - page.began > page.timeout_seconds:
            self.stop_call(lease, page.accepted, Reason.TIMEOUT)
        if others_wait and held > self._limits.lease_turn_seconds:
            self.revoke(lease)
        if lease.log.size > self._limits.log_bytes_per_job // 2:
            self.revoke(lease)  # the next one begins a new log


def _make_page() -> int:
    """4 KiB of zeros that nobody can make shorter: a read by the daemon always finds them."""
    fd = os.memfd_create("remoted-lease", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, wire.LEASE_PAGE_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _PAGE_SEALS)
    return fd


def is_page(fd: int) -> bool:
    """Can it be read as the page of a lease, whoever made it, without waiting and without an end that comes too soon?"""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) == _PAGE_SEALS and os.fstat(fd).st_size == wire.LEASE_PAGE_BYTES
    except OSError:
        return False
