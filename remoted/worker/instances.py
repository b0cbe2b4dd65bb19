"""Objects of remote classes that live in this worker (MECHANISMS 14).

Calls come to them by two ways, from the daemon and on leases; that one is dropped is always told by the daemon. Whoever
settles an instance here is told how many drops went before, so that the next call is behind them.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

from .calls import Run, add_note

#: Names have up to 35 bytes in a header.
_NAMES_MOST = 500
#: A drop has been sent before whatever waits for it; only a worker that is about to end hears of none.
_DROP_SECONDS = 1.0


class Instances:
    """The main thread (or a nested call's) uses them; the channel's thread says which are to go."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._dropped: deque[str] = deque()
        #: How many the daemon has told of.
        self.drops = 0
        self._told = threading.Condition()

    def method(self, wanted: dict[str, Any], construct: Callable[[], Any]) -> tuple[Any, bool]:
        """(the bound method, whether the instance was constructed for it)."""
        fresh = wanted["id"] not in self._objects
        if fresh:
            try:
                self._objects[wanted["id"]] = construct()
            except BaseException as error:
                add_note(error, f"raised by the constructor of the instance, before {wanted['method']}() was called")
                raise
        return getattr(self._objects[wanted["id"]], wanted["method"]), fresh

    def names(self) -> list[str]:
        """As many as one message holds."""
        return list(islice(self._objects, _NAMES_MOST))

    # -- dropping ------------------------------------------------------------------------------------------

    def tell_drop(self, instance: str, call: Callable[[], None]) -> None:
        """Nobody can call it any more. ``call`` has the main thread come and forget it: before it hears of anything that waits for that."""
        with self._told:
            self._dropped.append(instance)
            call()
            self.drops += 1
            self._told.notify_all()

    def await_drops(self, run: Run) -> None:
        """Until those are told that went before the call's instance was settled here."""
        if run.instance is None or self.drops >= (before := run.instance["drops"]):
            return
        with self._told:
            self._told.wait_for(lambda: self.drops >= before, _DROP_SECONDS)

    def catch_up(self, run: Run) -> None:
        """While a lease has the main thread nobody else forgets anything."""
        self.await_drops(run)
        while self.drop_next():
            pass

    def drop_next(self) -> bool:
        """Forget one, after its own ``close()`` if it has one. False: nobody is to go."""
        if not self._dropped:
            return False
        found = self._objects.pop(self._dropped.popleft(), None)
        close = getattr(found, "close", None)
        if callable(close) and not inspect.iscoroutinefunction(close):
            with contextlib.suppress(Exception):  # a user's close() may fail; the instance is gone all the same
                close()
        return True
