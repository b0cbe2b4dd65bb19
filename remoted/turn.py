"""What is done once for all that one event brings: hand rows over, send frames, look at the timers.

It could wait for the next turn of the loop; but each turn asks the kernel for news first, and a call on its way would do that nine times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turn] = WeakKeyDictionary()


class Turn:
    """One for each loop (``current``): what reads a socket or hears of a commit runs inside, and others as ever."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._soon = loop.call_soon
        self._complain = loop.call_exception_handler
        self._waiting: list[Callable[[], None]] = []
        self._is_open = False

    def soon(self, callback: Callable[[], None]) -> None:
        """At the end of the event that is being handled, in the order in which they came; in the next turn of the loop if there is none."""
        if not self._waiting and not self._is_open:
            self._soon(self._end)
        self._waiting.append(callback)

    def run(self, handle: Callable[..., None], *arguments: Any) -> None:
        """Handle an event, and then what it has left for its end."""
        self._is_open = True
        try:
            handle(*arguments)
        finally:
            self._end()

    def _end(self) -> None:
        """They may leave more of their kind."""
        self._is_open = True
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                self._call(callback)
        self._is_open = False

    def _call(self, callback: Callable[[], None]) -> None:
        """One's failure is nobody else's."""
        try:
            callback()
        except Exception as error:
            self._complain({"message": f"cannot end a turn: {callback!r} failed", "exception": error})


class Alarm:
    """A timer that is set anew only where it would ring too late. It may ring too early: who hears it sets it again."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None
        self._moment = 0.0

    def set(self, moment: float, now: float) -> None:
        """Monotonic seconds."""
        if self._timer is not None and self._moment <= moment:
            return
        self.cancel()
        self._moment = moment
        self._timer = asyncio.get_running_loop().call_later(max(0.01, moment - now), self._end)

    def _end(self) -> None:
        self._timer = None
        self._ring()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def current() -> Turn:
    """The running loop's."""
    loop = asyncio.get_running_loop()
    found = _turns.get(loop)
    if found is None:
        found = _turns[loop] = Turn(loop)
    return found
