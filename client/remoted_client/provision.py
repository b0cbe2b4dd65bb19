"""Which leases a pool opens: as many as calls wait, within its size, and to the workers in which their instances live.

Where an instance lives the daemon says, and decides it where that is nowhere yet: a lease for an instance is one of its
home, and of one that is at hand anyway the daemon is asked whether its worker is that, or may be.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from remoted_client import wire
from remoted_client.daemon import connect
from remoted_client.errors import RemotedError
from remoted_client.greeting import hello
from remoted_client.lease import LINE, Lease

if TYPE_CHECKING:
    from remoted_client.call_queue import CallQueue
    from remoted_client.connection import Connection, Upload
    from remoted_client.home import Home
    from remoted_client.lease_pool import LeasePool

#: The sockets may be gone although their daemon lives, by somebody's hand: that is said when it lasts.
_TRIES, _AGAIN_SECONDS = 10, 1.0


class Provision:
    """The leases of one pool, from the request on. Its pool's lock is held."""

    def __init__(self, line: Connection, uploads: tuple[Upload, ...], request: dict[str, Any], workers_most: int, concurrency: int) -> None:
        """``request``: what every one is asked for with; ``concurrency``: how many one worker has at once."""
        self.leases: set[Lease] = set()
        self.most = workers_most * concurrency
        self._line = line
        self._uploads = uploads
        self._common = request
        self._concurrency = concurrency
        self._sent_again: set[Lease] = set()
        #: Instances of which the daemon was asked where they live, and on behalf of which lease.
        self._asked: dict[str, Lease] = {}

    def provide(self, pool: LeasePool, queue: CallQueue, idle: Sequence[Lease]) -> None:
        """For what waits and cannot use those that are idle."""
        for home, line in queue.items():
            wanted = len(line) - self._opening(home)
            if home is None:
                self._open(pool, None, wanted)
            elif home.id not in self._asked:
                self._lead_to(pool, home, wanted, idle)

    def _opening(self, home: Home | None) -> int:
        return sum(not lease.is_granted and lease.home is home for lease in self.leases)

    def _lead_to(self, pool: LeasePool, home: Home, wanted: int, idle: Sequence[Lease]) -> None:
        there = sum(lease.worker == home.worker for lease in self.leases) if home.worker else 0
        opening = self._opening(home)
        if there:
            self._open(pool, home, min(wanted, self._concurrency - there - opening))
        elif opening:
            return
        elif home.worker:
            self._open(pool, home, 1, beyond=True)  # none of ours is there, so they do not have its place
        elif (lease := self._at_hand(idle)) is not None:
            self._asked[home.id] = lease
            self._line.attendant.post(lambda: self._line.send({"op": "settle", "instance": home.id, "lease": lease.id}))
        else:
            self._open(pool, home, 1)

    def _at_hand(self, idle: Sequence[Lease]) -> Lease | None:
        """One that is idle and no other instance's first; any, if there will be no others."""
        spoken_for = set(self._asked.values())
        free = next((lease for lease in reversed(idle) if lease not in spoken_for), None)
        if free is not None or len(self.leases) < self.most:
            return free
        return next((lease for lease in self.leases if lease.is_granted and not lease.is_closed), None)

    def _open(self, pool: LeasePool, home: Home | None, count: int, beyond: bool = False) -> None:
        while count > 0 and (beyond or len(self.leases) < self.most):
            lease = Lease(pool, self._line.name, time.monotonic(), home)
            self.leases.add(lease)
            count -= 1
            self._line.expect_lease(pool, lease)
            self._line.attendant.post(functools.partial(self._connect, pool, lease, _TRIES))

    def _connect(self, pool: LeasePool, lease: Lease, tries: int) -> None:
        """Ask for it on a connection of its own: in the line's thread, as soon as there is a daemon."""
        if lease.is_closed or lease.fileno() >= 0:
            return
        try:
            self._line.bring(self._uploads)
            lease.open(connect(), hello(""), self._request(lease))
        except (ConnectionError, FileNotFoundError) as error:
            # Mostly the daemon is going: then the line ends too, and all this is asked of the next one.
            if tries and not isinstance(error, RemotedError):
                self._line.attendant.after(_AGAIN_SECONDS, lambda: self._connect(pool, lease, tries - 1))
            else:
                pool.on_fault(lease, error)
        except Exception as error:
            pool.on_fault(lease, error)
        else:
            lease.reader = LINE
            self._line.attendant.attend(lease)

    def _request(self, lease: Lease) -> bytes:
        instance = {"instance": lease.home.id} if lease.home is not None else {}
        return wire.encode({**self._common, "lease": lease.id, **instance})

    def send_again(self, lease: Lease) -> bool:
        """The daemon lacked what it refers to. False: it did not help once."""
        if lease in self._sent_again:
            return False
        self._sent_again.add(lease)
        lease.ask_again(self._uploads, self._request(lease))
        return True

    def forget(self, lease: Lease) -> None:
        self.leases.discard(lease)
        self._sent_again.discard(lease)
        for instance in [instance for instance, asked in self._asked.items() if asked is lease]:
            del self._asked[instance]

    def on_settled(self, instance: str) -> None:
        """The daemon has answered."""
        self._asked.pop(instance, None)

    def restart(self) -> None:
        """Another daemon does not know what was asked of the last one."""
        self._asked.clear()
        for lease in [lease for lease in self.leases if not lease.is_granted]:
            lease.close()
            self.leases.discard(lease)
            self._line.forget_lease(lease)
