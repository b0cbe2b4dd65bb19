"""A look at a socket before its reader sleeps: most answers of a lease come sooner than an idle core wakes up (docs/decisions/0090)."""

from __future__ import annotations

import os
import select
import socket
import time

#: No longer than this; who sleeps then is woken as ever.
_SECONDS = 40e-6
#: After looks in vain so many waits at most go without.
_RESTS_MOST = 1023


class Glance:
    """One reader's. Where nothing comes in time, or others want the core, it looks ever more rarely."""

    def __init__(self, sock: socket.socket) -> None:
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        self._has_come = poller.poll
        #: So many waits go without a look after the last one in vain.
        self.rests = 0
        self._left = 0

    def wait(self) -> None:
        """Until something can be read, or it is not worth while any longer."""
        if self._left:
            self._left -= 1
            return
        until = time.perf_counter() + _SECONDS
        while not self._has_come(0):
            os.sched_yield()  # whoever is to answer may need this core
            if time.perf_counter() > until:
                self.rests = self._left = min(2 * self.rests + 1, _RESTS_MOST)
                return
        self.rests = 0
