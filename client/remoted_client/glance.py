"""A look at a socket before its reader sleeps: most answers come sooner than an idle core wakes up (docs/decisions/0090, 0100)."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable

#: No longer than this, which is enough for an answer by one who had to be woken; who sleeps then is woken as ever.
_SECONDS = 250e-6
#: After looks in vain so many waits at most go without, and so many where others had this core meanwhile: they have it for milliseconds.
_RESTS_MOST = 63
_BUSY_RESTS = 15
_BUSY_RESTS_MOST = 1023


class Glance:
    """One reader's. Where nothing comes in time, or others want the core, it looks ever more rarely; what comes in time makes it look more often again."""

    def __init__(self, *sources: socket.socket | int, seconds: float = _SECONDS, clock: Callable[[], float] = time.perf_counter) -> None:
        """``sources``: sockets or descriptors, of which any may be what is waited for. ``seconds``: how long a look lasts at most."""
        poller = select.poll()
        for source in sources:
            poller.register(source, select.POLLIN)
        self._has_come = poller.poll
        self._seconds = seconds
        self._clock = clock
        #: So many waits go without a look after the last one.
        self.rests = 0
        self._left = 0

    def wait(self) -> None:
        """Until something can be read, or it is not worth while any longer."""
        if self._left:
            self._left -= 1
            return
        self._left = self.rests = self._look()

    def _look(self) -> int:
        """How many waits may go without the next one."""
        until = self._clock() + self._seconds
        while not self._has_come(0):
            os.sched_yield()  # whoever is to answer may need this core
            late = self._clock() - until
            if late > _SECONDS:
                return min(2 * self.rests + _BUSY_RESTS, _BUSY_RESTS_MOST)
            if late > 0:
                return max(self.rests, min(2 * self.rests + 1, _RESTS_MOST))
        return self.rests // 4
