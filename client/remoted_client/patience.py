"""How long calls wait for the workers of their pool before they are told that it is busy."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from remoted_client.errors import for_code

if TYPE_CHECKING:
    from remoted_client.call_queue import CallQueue
    from remoted_client.connection import Connection
    from remoted_client.provision import Provision

_LOOK_SECONDS = 1.0


class Patience:
    """Of one pool, whose ``lock`` this is. Calls that wait for this process's own others count their time here; the rest is the daemon's to count."""

    def __init__(self, line: Connection, lock: threading.RLock, queue: CallQueue, provision: Provision) -> None:
        self._line = line
        self._lock = lock
        self._queue = queue
        self._provision = provision
        self._is_watching = False

    def watch(self) -> None:
        """For as long as calls wait."""
        with self._lock:
            if self._is_watching or not self._queue:
                return
            self._is_watching = True
        self._line.attendant.after(_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        now, patience = time.monotonic(), self._line.daemon.get("pool_busy_seconds", 30.0)
        with self._lock:
            self._is_watching = False
            leases = self._provision.leases
            all_granted = bool(leases) and all(lease.is_granted for lease in leases)
            late = self._queue.take_all([call for call in self._queue.calls() if all_granted and now - call.queued_at > patience])
        for call in late:
            call.fail(for_code("POOL_BUSY", f"cannot run {call.name}: no worker became free within {patience:g} s (this process's own calls keep all {self._provision.most} busy)"))
        self.watch()
