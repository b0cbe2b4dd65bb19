"""Is there an account behind a uid, and whose? Asked of the host's name service, which may hang: in threads, with a deadline.

Only that is asked for. What a worker runs as (uid, gid, groups) comes from the kernel, and its environment from
its caller; an answer of the name service gives nobody anything (T29).
"""

from __future__ import annotations

import asyncio
import contextlib
import pwd
import threading
from collections.abc import Callable

from remoted.clock import Clock
from remoted.errors import Forbidden, OverLimit

_DEADLINE_SECONDS = 5.0
_KNOWN_SECONDS = 600.0
_UNKNOWN_SECONDS = 10.0
#: Look-ups that hang keep their threads; more of them are not begun.
_AT_ONCE = 16
#: With so many in memory, those that are too old to be believed go.
_ANSWERS_MOST = 4096


class Accounts:
    """Remembers who has an account. One who needs none (``everybody``) is never asked for."""

    def __init__(self, everybody: bool = True, look_up: Callable[[int], object] = pwd.getpwuid, clock: Clock | None = None, deadline_seconds: float = _DEADLINE_SECONDS) -> None:
        self._everybody = everybody
        self._look_up = look_up
        self._clock = clock or Clock()
        self._deadline_seconds = deadline_seconds
        #: (the name of the account, if there is one, until when this is believed)
        self._answers: dict[int, tuple[str | None, float]] = {}
        self._asking: dict[int, asyncio.Future[str | None]] = {}

    async def require(self, uid: int, anew: bool = False) -> str:
        """Its name, "" where none is needed. ``anew``: what is remembered does not count. Raises Forbidden for a uid without account, OverLimit when the name service does not answer."""
        if self._everybody:
            return ""
        name, until = self._answers.get(uid, (None, 0.0))
        if anew or self._clock.monotonic() >= until:
            name = await self._ask(uid)
        if name is None:
            raise Forbidden("UNKNOWN_USER", f"cannot serve uid {uid}: it has no account on this host; the administrator may allow it: allow_unknown_uids = true in [users] of config.toml")
        return name

    async def _ask(self, uid: int) -> str | None:
        asking = self._asking.get(uid) or self._begin(uid)
        try:
            return await asyncio.wait_for(asyncio.shield(asking), self._deadline_seconds)
        except TimeoutError:
            raise OverLimit("BUSY", f"cannot say whether uid {uid} has an account: the host's name service did not answer within {self._deadline_seconds:g} s; try again") from None

    def _begin(self, uid: int) -> asyncio.Future[str | None]:
        if len(self._asking) >= _AT_ONCE:
            raise OverLimit("BUSY", f"cannot say whether uid {uid} has an account: the host's name service hangs; try again later")
        loop = asyncio.get_running_loop()
        asking = self._asking[uid] = loop.create_future()
        asking.add_done_callback(lambda done: self._remember(uid, done.result()))
        threading.Thread(target=self._asked, args=(uid, loop, asking), name="account", daemon=True).start()
        return asking

    def _asked(self, uid: int, loop: asyncio.AbstractEventLoop, asking: asyncio.Future[str | None]) -> None:
        found: str | None = None
        with contextlib.suppress(KeyError, OSError):
            found = str(getattr(self._look_up(uid), "pw_name", ""))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(asking.set_result, found)

    def _remember(self, uid: int, found: str | None) -> None:
        del self._asking[uid]
        if len(self._answers) >= _ANSWERS_MOST:  # a user may have 65,536 uids (subuid(5))
            now = self._clock.monotonic()
            self._answers = {known: answer for known, answer in self._answers.items() if answer[1] > now}
        self._answers[uid] = (found, self._clock.monotonic() + (_KNOWN_SECONDS if found is not None else _UNKNOWN_SECONDS))
