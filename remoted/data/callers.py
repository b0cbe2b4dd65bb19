"""The processes behind blocking calls: their calls end with them, not with their connections."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import NamedTuple

from remoted.attempts import Content
from remoted.calls import Call
from remoted.data.following import Following
from remoted.data.holding import Holding
from remoted.direct import DirectCalls
from remoted.endpoints import Endpoints
from remoted.jobs import Jobs
from remoted.model import Reason


class Client(NamedTuple):
    """What the first connection of a client process stands for: its others are leases."""

    following: Following
    holding: Holding


#: By uid and the name that the process gave itself.
Clients = dict[tuple[int, str], Client]


@dataclass(frozen=True, slots=True)
class Runners:
    """The two use cases, and which of them a call belongs to; and the functions that have HTTP routes."""

    jobs: Jobs
    direct: DirectCalls
    endpoints: Endpoints

    def of(self, call_id: str) -> Jobs | DirectCalls:
        return self.direct if call_id in self.direct.calls else self.jobs

    def lookup(self, call_id: str) -> Call | None:
        return self.jobs.calls.get(call_id) or self.direct.calls.get(call_id)


def watch_caller(runners: Runners, pidfd: int | None, calls: list[Call]) -> None:
    """Cancel these calls when their caller's process ends, unless another connection of it took them over.

    The pidfd is this function's from here on; None means that the process is gone.
    """
    if pidfd is None:
        _cancel_orphans(runners, calls)
    elif calls:
        _Caller(runners, pidfd, calls)
    else:
        os.close(pidfd)


class _Caller:
    """A process whose connection has gone while its calls run. A ``Watcher``, so that it ends with the last of them."""

    def __init__(self, runners: Runners, pidfd: int, calls: list[Call]) -> None:
        self._runners, self._pidfd, self._calls = runners, pidfd, set(calls)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._ended)
        for call in calls:
            call.watchers.add(self)

    def owns(self, call: Call) -> bool:
        return False

    def on_state(self, call: Call) -> None:
        pass

    def on_output(self, call: Call, stream: int, data: bytes, offset: int) -> None:
        pass

    def on_item(self, call: Call, number: int, content: Content) -> None:
        pass

    def on_mark(self, call: Call, number: int) -> None:
        pass

    def on_done(self, call: Call) -> None:
        self._calls.discard(call)
        if not self._calls:
            self._close()

    def _ended(self) -> None:
        calls = list(self._calls)
        for call in calls:
            call.watchers.discard(self)
        self._close()
        _cancel_orphans(self._runners, calls)

    def _close(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)


def _cancel_orphans(runners: Runners, calls: list[Call]) -> None:
    for call in calls:
        if not call.status.is_terminal and not any(watcher.owns(call) for watcher in call.watchers):
            runners.of(call.id).cancel(call, Reason.CALLER_GONE)
