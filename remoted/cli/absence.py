"""The daemon's absence while a command waits: it stays over a restart, as a script does, and asks the next daemon."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from remoted.cli.ending import CliError, NoDaemon
from remoted.cli.transport import CutOff, Silent, Unanswered

_T = TypeVar("_T")
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.2
#: What may be asked again. A stranger in the daemon's place is no absence.
AWAY = (CutOff, Unanswered)


class Absence:
    """As one command sees it, which waits no longer than until then anyway."""

    def __init__(self, until: float | None = None) -> None:
        self._until = until
        self._has_answered = False
        self._since: float | None = None
        self._is_told = False

    def ends(self) -> None:
        """There is a daemon."""
        self._has_answered, self._since = True, None

    def endure(self, error: CliError) -> None:
        """Come back in a moment. Raises what it was, or NoDaemon after a minute; at once where there was none from the beginning."""
        if not self._has_answered and isinstance(error, (Silent, Unanswered)):
            raise error
        self._has_answered, now = True, time.monotonic()
        if self._since is None:
            self._since = now
            self._tell()
        gone = now - self._since
        if gone > _PATIENCE_SECONDS or (self._until is not None and now > self._until):
            raise NoDaemon(f"the daemon went away and did not come back within {gone:.0f} s: {error}") from error
        time.sleep(_PAUSE_SECONDS)

    def ask(self, question: Callable[[], _T]) -> _T:
        """What is the answer, of this daemon or the next?"""
        while True:
            try:
                answer = question()
            except AWAY as error:
                self.endure(error)
            else:
                self.ends()
                return answer

    def _tell(self) -> None:
        """Once to who sits at a terminal."""
        if not self._is_told and sys.stderr.isatty():
            self._is_told = True
            print("\nremotectl: the daemon went away; waiting until it is back ...", file=sys.stderr, flush=True)
