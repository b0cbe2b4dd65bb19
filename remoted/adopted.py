"""A worker that an earlier daemon has started and systemd has kept: it goes on here as if nothing had been (decision 0040).

It is asked what it has (``adopt``) and answers with all that nobody has acknowledged, its leases, and last with a hello. What
comes before the hello was meant for the dead daemon, and is as good as if that had read it. Its word counts for attempts
that the store says it has, and for nobody else's.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from remoted import foreign
from remoted.attempts import AttemptEnd
from remoted.cgroup import Groups
from remoted.channel import Channel
from remoted.clock import Clock
from remoted.family import adopted
from remoted.fdstore import About, Entry
from remoted.limits import Limits
from remoted.model import AttemptToken, DeviceUuid, Reason
from remoted.orders import Orders
from remoted.pipes import Unread
from remoted.progress import Progress
from remoted.replies import Hello, close_payload
from remoted.scheduler.state import Need, PoolPolicy
from remoted.spawn import launch, reaper
from remoted.spawn.births import Born
from remoted.spawn.memory import MemoryKills
from remoted.spool import Spool
from remoted.workers import Worker
from remoted.workload import Attempt
from remoted_client import wire

#: No worker comes so far; what says more has scribbled on its page, and a column of the store holds 64 bits.
_POSITIONS_MOST = 1 << 53
#: More than a stream may have on its way: all of it counts as read.
_ALL_ITEMS = 1 << 20
#: Who has adopted its process (init) waits for it within moments.
_LOOKS, _LOOK_SECONDS = 10, 0.02
#: Of an instance's name.
_NAME_LETTERS = 200


class FoundLease(NamedTuple):
    """What a worker says of a lease that it has, unchecked. The descriptors are the taker's."""

    token: AttemptToken
    lease_id: str
    spec: str
    connection: int
    page: int

    def close(self) -> None:
        foreign.let_go((self.connection, self.page))


def entry_of(worker: Worker, need: Need, policy: PoolPolicy, devices: tuple[DeviceUuid, ...]) -> Entry | None:
    """What the next daemon must find to take it over; None when it has closed something already."""
    handles, hello, born = worker.handles(), worker.hello, worker.born_as
    if handles is None or hello is None or born is None:
        return None
    about = About(worker.id, worker.pid, worker.born, worker.started_at, need, policy, devices, worker.family.bounds, hello.python, hello.cloudpickle, born.server, born.reason)
    return Entry(about, handles)


class _Nobody:
    """Who listens to a call that nobody waits for."""

    def __init__(self, over: asyncio.Future[None]) -> None:
        self._over = over

    def on_begin(self) -> None: ...
    def on_lasting(self) -> None: ...
    def on_output(self, stream: int, said: bytes | Unread) -> None: ...
    def on_mark(self, number: int) -> None: ...

    def on_item(self, number: int, payload: bytes | int, size: int) -> None:
        close_payload(payload)

    def on_end(self, end: AttemptEnd) -> None:
        close_payload(end.payload)
        self._over.set_result(None)


class AdoptedWorker(Worker):
    """Made from its entry; ``reclaim`` what it has, then ``ask`` it, then ``answer`` says that it has answered."""

    def __init__(self, entry: Entry, spool: Spool, clock: Clock, limits: Limits, memory_kills: MemoryKills, groups: Groups | None, on_dead: Callable[[Worker], None]) -> None:
        """Raises OSError or ValueError when its page is of no use; the descriptors are the caller's then."""
        about, handles = entry.about, entry.handles
        super().__init__(about.id, clock, limits, memory_kills, on_dead)
        self.pid, self.born, self.started_at = about.pid, about.born, about.started_at
        self.hello = Hello(about.pid, about.python, about.cloudpickle)
        self._greeted.set_result(self.hello)
        self._progress = Progress(spool.progress_path(about.id), is_new=False)
        self._begun = self._positions = self.calls_done = self._progress.read().position
        if self._begun > _POSITIONS_MOST:
            os.close(self._progress.fd)
            raise ValueError(f"its page says that it has begun {self._begun} calls")
        self._process = launch.Process(about.pid, handles.pidfd)
        self._sock = socket.socket(fileno=handles.channel)
        self.born_as = Born(self._process, self._sock, about.server, about.reason)
        self._pipes.take(handles.stdout, handles.stderr)
        self.family = adopted(about.id, about.pid, groups, about.need.uid, about.bounds)
        #: What it says that it has, by token, until somebody takes it.
        self.leases: dict[str, FoundLease] = {}
        self._leases_most = about.need.concurrency
        #: What it has for callers who have been told that it is lost, until it is over.
        self._nobodys: dict[str, asyncio.Future[None]] = {}
        #: Objects of remote classes that it says live in it.
        self.instances: list[str] = []
        self._nonce = secrets.token_hex(16)
        self._reclaimed: dict[str, Attempt] = {}
        #: Its outcome is here and will be acknowledged once it is committed.
        self._settling: set[str] = set()
        self._answered: asyncio.Future[None] = self._loop.create_future()

    # -- before it is asked --------------------------------------------------------------------------------

    def reclaim(self, attempt: Attempt, ran_seconds: float) -> bool:
        """The store says that it has this; in the order in which it was given. True: others come before it."""
        self._workload.add(attempt, attempt.position > self._begun)
        self._reclaimed[attempt.token] = attempt
        self._positions = max(self._positions, attempt.position)
        if self._workload.is_ahead(attempt):
            return True
        if attempt.timeout_seconds is not None:
            attempt.timers.append(self._loop.call_later(max(0.0, attempt.timeout_seconds - ran_seconds), self.stop, attempt.token, Reason.TIMEOUT))
        return False

    def ask(self) -> None:
        """From here on it is heard."""
        assert self._process is not None
        self._channel = Channel(self._sock, self._on_frame, self._on_channel_closed, foreign.is_memory_or_socket)
        self._orders = Orders(self._channel, self.id, self._limits)
        self._loop.add_reader(self._process.pidfd, self._on_exit)
        self._pipes.watch(bool(self._workload) and not self._workload.ahead_count)
        self._channel.send({"op": "adopt", "nonce": self._nonce})

    async def answer(self) -> bool:
        """Has it answered? A body may keep it from that for long; one that runs nothing has the time of a start."""
        deadline = None if self.has_attempts else self._limits.start_deadline_seconds
        either: set[asyncio.Future[Any]] = {self._answered, self._gone}
        await asyncio.wait(either, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        return self._answered.done() and not self._gone.done()

    # -- what it says --------------------------------------------------------------------------------------

    def _on_frame(self, frame: wire.Frame) -> None:
        """An answer to another daemon's question is none."""
        if frame.op not in ("hello", "leased"):
            if frame.op == "lease_ended" and (lost := self.leases.pop(str(frame.header.get("attempt")), None)) is not None:
                lost.close()
            if not all(map(foreign.is_memory, frame.fds)):
                foreign.let_go(frame.fds)
                frame = frame._replace(fds=())
            super()._on_frame(frame)
            return
        is_ours = frame.header.get("nonce") == self._nonce and not self._answered.done()
        if is_ours and frame.op == "leased" and len(frame.fds) == 2 and len(self.leases) < self._leases_most:
            self._on_leased(frame)
            return
        if frame.fds:
            foreign.let_go(frame.fds)
        if is_ours and frame.op == "hello":
            try:
                self._on_hello(frame)
            except TypeError as error:
                self.break_off(repr(error))

    def _on_leased(self, frame: wire.Frame) -> None:
        header = frame.header
        found = FoundLease(AttemptToken(str(header.get("attempt"))), str(header.get("lease")), str(header.get("spec")), *frame.fds)
        if found.token in self.leases:
            found.close()
        else:
            self.leases[found.token] = found

    def lent(self, attempt: Attempt) -> None:
        """A lease of its is a call again, and what it prints is that one's."""
        self._workload.add(attempt, ahead=False)
        self._pipes.watch()

    def refuse(self, lease: FoundLease) -> None:
        """It is of no use here: the worker gives it up after the call in hand, and its client asks for another one."""
        lease.close()
        self._tell({"op": "revoke", "attempt": lease.token})
        self._pipes.watch()

    def _on_hello(self, frame: wire.Frame) -> None:
        named = {str(token) for part in ("running", "waiting") for token in frame.header.get(part, ())}
        for token in reversed([token for token in self._reclaimed if token not in named]):
            self._miss(self._reclaimed[token])
        strangers = named - set(self._reclaimed)
        for token in strangers:
            self._stop_nobodys(AttemptToken(token), token in frame.header.get("waiting", ()))
        self.instances = [str(name)[:_NAME_LETTERS] for name in frame.header.get("instances", ())]
        drops = frame.header.get("drops")
        self.drops = drops if isinstance(drops, int) else 0
        for attempt in self._workload:
            self.credit(attempt.token, _ALL_ITEMS)  # what was on its way to the dead daemon is no more
        if self._workload.ahead_count and self._patience is None:
            self._have_patience()
        self._answered.set_result(None)
        if not self.leases:
            self._pipes.watch(not self._workload.ahead_count)

    def _stop_nobodys(self, token: AttemptToken, waits: bool) -> None:
        """As any other that is cancelled; what it still says is heard by nobody."""
        over = self._nobodys[token] = self._loop.create_future()
        over.add_done_callback(lambda _: self.acknowledge(token))
        self._workload.add(Attempt(token, _Nobody(over), self._clock.boottime()), waits)
        self.stop(token, Reason.CALLER_GONE)

    @property
    def runs_for_nobody(self) -> bool:
        """And for nobody else?"""
        return any(not over.done() for over in self._nobodys.values()) and all(attempt.token in self._nobodys for attempt in self._workload)

    async def free(self) -> bool:
        """Wait until it can be given calls again. False: it cannot, because it or what it has started does not listen."""
        if self.runs_for_nobody:
            if self.family.pids() - {self.pid}:
                return False  # nobody knows which call has started these
            await asyncio.wait(self._nobodys.values())  # its death is the end of these too
        return not self._gone.done()

    def _miss(self, attempt: Attempt) -> None:
        """It does not know this. Then it was never told, unless its page says that it has begun it."""
        if self._workload.find(attempt.token) is None:
            return  # it has said meanwhile how it ended
        if attempt.position > self._begun:
            self._return(attempt)
        else:
            message = "the daemon was restarted, and the worker does not know what came of it"
            self._end_attempt(attempt.token, AttemptEnd("died", message=message, reason=Reason.LOST, stopped_by=attempt.stopped_by))

    def _on_done(self, attempt: Attempt | None, frame: wire.Frame) -> None:
        token = str(frame.header.get("attempt"))
        if attempt is not None:
            self._settling.add(token)
        elif token not in self._settling:
            self.acknowledge(AttemptToken(token))  # its end was committed before, or it was nobody's
        super()._on_done(attempt, frame)

    async def _bury(self) -> None:
        """How it ended is known when its new parent has collected it, which is not always soon."""
        assert self._process is not None
        for _ in range(_LOOKS):
            if reaper.collected(self._process.pidfd) is not None:
                break
            await asyncio.sleep(_LOOK_SECONDS)
        await super()._bury()
        while self.leases:  # nobody has taken them
            self.leases.popitem()[1].close()

    def _end_all(self, status: reaper.ExitStatus) -> None:
        """It died before it began these, or before it was told of them."""
        begun = self._progress.read().position if self._progress is not None else 0
        for attempt in reversed([attempt for attempt in self._reclaimed.values() if attempt.position > begun]):
            if self._workload.find(attempt.token) is not None:
                self._return(attempt)
        super()._end_all(status)

    def acknowledge(self, token: AttemptToken) -> None:
        self._settling.discard(token)
        super().acknowledge(token)
