"""A call from its ticket to the end of its attempts: what durable jobs and direct calls have in common.

``CallRunner`` turns a call into a ticket, gives its attempts to workers, collects what they say and tells
whoever watches. What is durable, what is retried and what the caller finally gets is decided by the two
subclasses (``jobs``, ``direct``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from remoted.access import Access, Peer
from remoted.attempts import AttemptEnd, AttemptSpec, Content, Work
from remoted.clock import Clock
from remoted.contents import Contents
from remoted.cradle import WorkerPlan
from remoted.endings import Ending
from remoted.engine import Engine
from remoted.errors import BadRequest, Conflict, Forbidden, NotFound
from remoted.instances import Instances
from remoted.items import Items
from remoted.limits import Limits
from remoted.logs import ATTEMPT, STDERR, JobLog
from remoted.model import AttemptToken, DeviceUuid, Reason, Status, Uid, WorkerId
from remoted.needs import Needs, Wanted
from remoted.paths import Paths
from remoted.pipes import Unread
from remoted.requests import Request
from remoted.scheduler.events import Assign
from remoted.scheduler.state import PoolPolicy, Ticket
from remoted.spec import JobSpec
from remoted.usage import Span
from remoted.workers import Worker

_NO_TOKEN = AttemptToken("")
_NO_WORKER = WorkerId("")
_TOKEN_BYTES, _TOKENS_AT_ONCE = 16, 64
_NEWEST_MOST = 64
_C = TypeVar("_C", bound="Call")


class Watcher(Protocol):
    """Somebody who is told what happens to a call; never blocks."""

    def owns(self, call: Call) -> bool: ...
    def on_state(self, call: Call) -> None: ...
    def on_output(self, call: Call, stream: int, data: bytes, offset: int) -> None: ...
    def on_item(self, call: Call, number: int, content: Content) -> None: ...
    def on_mark(self, call: Call, number: int) -> None: ...
    def on_done(self, call: Call) -> None: ...


@dataclass(eq=False, slots=True)
class Call:
    """One live call. Mutable, owned by its runner."""

    id: str
    uid: Uid
    request: Request
    spec: JobSpec
    name: str
    ticket: Ticket
    log: JobLog
    submitted_at: float
    #: What it shares with those that came with it.
    admitted: Admitted | None = None
    #: The submission key, and its arguments where they are small: these are its own.
    key: str = ""
    arguments: bytes | None = None
    is_stored: bool = False
    #: It has begun, and another of the same key was stored long ago.
    is_double: bool = False
    #: The how manyth job it is; 0 for what is not stored.
    seq: int = 0
    status: Status = Status.IN_QUEUE
    reason: Reason | None = None
    attempts: int = 0
    #: Rows in ``attempts``; more than ``attempts`` when a stale worker refused one before any code ran.
    tries: int = 0
    token: AttemptToken = _NO_TOKEN
    worker: Worker | None = None
    worker_id: WorkerId = _NO_WORKER
    devices: tuple[DeviceUuid, ...] = ()
    #: Its worker begins it after others that it has; until then it is one that waits.
    is_ahead: bool = False
    #: The how manyth call of its worker it is.
    position: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    attempt_started: float = 0.0
    run_seconds: float = 0.0
    error: str = ""
    error_type: str = ""
    traceback: str = ""
    result: Content | None = None
    result_kind: str = ""
    result_size: int = 0
    items: Items = field(default_factory=Items)
    items_read: int = 0
    reconstructed: bool = False
    stop_requested: Reason | None = None
    watchers: set[Watcher] = field(default_factory=set)
    children: set[str] = field(default_factory=set)
    retry_timer: asyncio.TimerHandle | None = None
    caller: str = ""

    @property
    def kept_bytes(self) -> int:
        """Of its result and its items."""
        return self.result_size + self.items.inline_bytes if self.items else self.result_size

    def used_until(self, moment: float) -> Span:
        """By its newest attempt."""
        return Span(self.uid, self.attempt_started, moment, len(self.devices), self.ticket.cpus or 1.0)

    @property
    def max_retries(self) -> int:
        override = self.request.options.max_retries
        return self.spec.max_retries if override is None else override

    @property
    def timeout_seconds(self) -> float | None:
        own, most = self.request.options.timeout_seconds or self.spec.timeout_seconds, self.spec.pool.execution_timeout_seconds
        if own is None or most is None:
            return most if own is None else own
        return min(own, most)


class Listener:
    """Binds what a worker says to one attempt of one call."""

    def __init__(self, runner: CallRunner, call: Call, token: AttemptToken) -> None:
        self._runner, self._call, self._token = runner, call, token

    def on_begin(self) -> None:
        self._runner.attempt_began(self._call)

    def on_lasting(self) -> None:
        self._runner.tell_state(self._call)

    def on_output(self, stream: int, said: bytes | Unread) -> None:
        self._runner.add_output(self._call, stream, said)

    def on_item(self, number: int, payload: bytes | int, size: int) -> None:
        self._runner.add_item(self._call, self._token, number, payload, size)

    def on_mark(self, number: int) -> None:
        for watcher in list(self._call.watchers):
            watcher.on_mark(self._call, number)

    def on_end(self, end: AttemptEnd) -> None:
        self._runner.attempt_ended(self._call, self._token, end)


@dataclass(eq=False, slots=True)
class Admitted:
    """A request that may be served, and what it stands for. Calls with the same content that come together share one, and may with later ones."""

    request: Request
    uid: Uid
    spec: JobSpec
    ancestors: tuple[str, ...]
    wanted: Wanted
    #: When the newest of them came.
    now: float
    #: What their workers are asked for, once it is known.
    work: Work | None = None
    #: How many of them are live: they hold together what they refer to.
    live: int = 0


class CallRunner:
    """The common half; also the engine's ``TicketOwner``."""

    #: Will anybody ask for an outcome after a restart?
    keeps_outcomes = False

    def __init__(self, engine: Engine, contents: Contents, instances: Instances, clock: Clock, limits: Limits, kind_key: bytes, paths: Paths) -> None:
        self.engine = engine
        self.contents = contents
        self.instances = instances
        self.clock = clock
        self.limits = limits
        self._logs = paths.logs
        self.calls: dict[str, Call] = {}
        #: Every runner of this daemon: a nested call's parent may be of the other kind. Set by the composition root.
        self.others: tuple[CallRunner, ...] = (self,)
        #: Told of each call that is over.
        self.on_ended: Callable[[Ending], None] = lambda ending: None
        #: Whom the daemon serves. Set by the composition root where that is not its own user.
        self.access = Access(os.geteuid())
        self.needs = Needs(engine, contents, kind_key)
        self._tokens: list[AttemptToken] = []
        #: Of some users the request that was examined last, as it was asked, and what came of it: calls of one function follow one another.
        self._newest: dict[int, tuple[Request, Admitted]] = {}

    # -- in and out ----------------------------------------------------------------------------------------

    def admit(self, peer: Peer, request: Request) -> Admitted:
        """Raises Refused."""
        if self.engine.is_stopping:
            raise Conflict("DRAINING", "cannot take new work: the daemon is being stopped; try again when it is back")
        asked, request = request, self.identified(peer, request)
        newest, admitted = self._newest.get(peer.uid, (None, None))
        if admitted is None or newest is not asked or admitted.request.identity != request.identity:
            admitted = self._examine(peer, asked, request)
        else:
            self._require_open(admitted.ancestors)
            self.contents.require(peer.uid, *request.digests)
        admitted.now = self.clock.wall()
        return admitted

    def _examine(self, peer: Peer, asked: Request, request: Request) -> Admitted:
        """And remember it, if that holds for as long as what it refers to is here."""
        spec = self.contents.spec(peer.uid, request.spec)
        if request.instance is not None:
            self.instances.admit(peer.uid, request.instance[0])
        ancestors = self.ancestors_of(peer, request.parent) if request.parent else ()
        self._require_open(ancestors)
        admitted = Admitted(request, Uid(peer.uid), spec, ancestors, self.needs.of(peer.uid, request, spec), 0.0)
        is_common = request.arguments_inline is None and not request.arguments  # one that calls have in common
        if is_common and not (request.instance or request.parent or spec.pool.gpu or spec.pool.workers_min):
            if len(self._newest) >= _NEWEST_MOST and peer.uid not in self._newest:
                self._newest.clear()
            self._newest[peer.uid] = (asked, admitted)
        return admitted

    def _require_open(self, ancestors: tuple[str, ...]) -> None:
        if self.engine.is_closed_to(ancestors):
            self.engine.gate.admit(self.keeps_outcomes)

    def forget_newest(self, uid: int) -> None:
        """What was examined last holds its caller's surroundings, and that may have gone."""
        self._newest.pop(uid, None)

    def new_call(self, kind: type[_C], admitted: Admitted, call_id: str, arguments: bytes | None, **more: Any) -> _C:
        """A call that nobody knows yet; others that were admitted with it have other keys and arguments."""
        request, spec = admitted.request, admitted.spec
        return kind(
            id=call_id,
            uid=admitted.uid,
            request=request,
            spec=spec,
            name=request.options.name or spec.function.qualname,
            ticket=admitted.wanted.ticket(call_id, request, admitted.ancestors),
            log=self.new_log(call_id, admitted.uid),
            submitted_at=admitted.now,
            admitted=admitted,
            arguments=arguments,
            **more,
        )

    def new_log(self, call_id: str, uid: int, is_new: bool = True) -> JobLog:
        """Counted as its user's."""

        def take(size: int) -> str:
            problem = self.contents.quotas.refusal(uid, size)
            if problem is None:
                self.contents.quotas.add(uid, size)
            return str(problem or "")

        return JobLog(self._logs, call_id, self.limits.log_bytes_per_job, is_new, uid if self.access.serves_everybody else -1, take)

    def identified(self, peer: Peer, request: Request) -> Request:
        """With the identity of who asks, where it decides as whom the body runs. Raises Forbidden (T04)."""
        if not self.access.may_run(peer):
            raise Forbidden("ROOT_REFUSED", "cannot run functions as root: call as a user (sudo -u USER ...), or let the administrator set allow_root = true in [users] of config.toml")
        return request._replace(identity=peer.identity) if self.access.serves_everybody else request

    def enter(self, call: Call) -> None:
        """It is live: what it refers to is kept, and its parent knows it."""
        self.calls[call.id] = call
        self.contents.held.add(call.uid, len(call.arguments or b""))
        if call.admitted is None:
            self._hold(call)
        else:
            call.admitted.live += 1
            if call.admitted.live == 1:
                self._hold(call)
        if call.request.parent and (parent := self.lookup(call.request.parent)) is not None and parent.uid == call.uid:
            parent.children.add(call.id)

    def leave(self, call: Call) -> None:
        """The opposite; the log stays where it is."""
        del self.calls[call.id]
        self.contents.held.add(call.uid, -len(call.arguments or b""))
        if call.admitted is not None:
            call.admitted.live -= 1
        if call.admitted is None or not call.admitted.live:
            for digest in call.request.digests:
                self.contents.release(call.uid, digest)
            if not self.contents.has(call.uid, call.request.context):
                for runner in self.others:
                    runner.forget_newest(call.uid)
        if call.retry_timer is not None:
            call.retry_timer.cancel()
        if call.request.parent and (parent := self.lookup(call.request.parent)) is not None:
            parent.children.discard(call.id)

    def _hold(self, call: Call) -> None:
        for digest in call.request.digests:
            self.contents.hold(call.uid, digest)

    def make_ticket(self, peer: Peer, call_id: str, request: Request, spec: JobSpec, ancestors: tuple[str, ...]) -> tuple[Ticket, PoolPolicy]:
        """Raises BadRequest when this host can never serve the call; names what the host has."""
        wanted = self.needs.of(peer.uid, request, spec)
        return wanted.ticket(call_id, request, ancestors), wanted.policy

    # -- the engine's owner --------------------------------------------------------------------------------

    def on_assigned(self, ticket_id: str, worker: Worker, devices: tuple[DeviceUuid, ...], how: Assign) -> None:
        call = self.calls[ticket_id]
        call.attempts += 1
        call.tries += 1
        call.token = self._take_token()
        call.worker, call.worker_id, call.devices, call.is_ahead = worker, worker.id, devices, how.ahead
        call.position = worker.take_position()
        call.attempt_started = self.clock.wall()
        call.started_at = call.started_at or call.attempt_started
        self.begin(call, how.inline)

    def _take_token(self) -> AttemptToken:
        """Nobody can guess it; the kernel is asked for many at once."""
        if not self._tokens:
            drawn = os.urandom(_TOKEN_BYTES * _TOKENS_AT_ONCE).hex()
            self._tokens = [AttemptToken(drawn[start : start + 2 * _TOKEN_BYTES]) for start in range(0, len(drawn), 2 * _TOKEN_BYTES)]
        return self._tokens.pop()

    def begin(self, call: Call, inline: bool) -> None:
        """Make the attempt known (durably or not) and then ``run`` it."""
        raise NotImplementedError

    def run(self, call: Call, inline: bool) -> None:
        """Send the attempt to its worker, unless the call was stopped meanwhile."""
        assert call.worker is not None
        if not call.is_ahead:
            call.status, call.reason = Status.IN_PROGRESS, None
        try:
            spec = self._attempt_spec(call)
        except BadRequest as error:
            self.attempt_ended(call, call.token, AttemptEnd("died", message=str(error), reason=Reason.LOST))
            return
        call.worker.run(spec, Listener(self, call, call.token), inline)
        if not call.is_ahead:
            self.tell_state(call)
        if call.stop_requested is not None:
            call.worker.stop(call.token, call.stop_requested)

    def attempt_began(self, call: Call) -> None:
        """Its turn has come in the worker that was given it ahead. Nobody is told unless it lasts: such calls are short."""
        call.is_ahead = False
        call.status, call.reason = Status.IN_PROGRESS, None
        call.attempt_started = self.clock.wall()

    def _attempt_spec(self, call: Call) -> AttemptSpec:
        work = call.admitted.work if call.admitted is not None else None
        if work is None:
            work = self._work(call)
            if call.admitted is not None:
                call.admitted.work = work
        digest = call.request.arguments
        arguments = Content(digest, call.arguments) if call.arguments is not None else self.contents.content(call.uid, digest)
        return AttemptSpec(call.token, call.id, work, arguments, call.is_ahead, call.position)

    def _work(self, call: Call) -> Work:
        request = call.request
        instance = request.instance
        return Work(
            code=self.contents.content(call.uid, request.code),
            modules=self.contents.content(call.uid, request.modules) if request.modules else None,
            context=self.contents.content(call.uid, request.context),
            stream=call.spec.stream,
            is_kept=self.keeps_outcomes,
            timeout_seconds=call.timeout_seconds,
            concurrent=call.spec.pool.max_concurrency > 1,
            instance={"id": instance[0], "method": instance[1]} if instance else None,
            constructor=self.contents.content(call.uid, instance[2]) if instance else None,
            is_raw=request.is_raw,
            is_plain=request.is_plain,
        )

    def on_unplaceable(self, ticket_id: str, reason: Reason, message: str, detail: str) -> None:
        raise NotImplementedError

    def on_waiting(self, ticket_id: str, reason: Reason) -> None:
        call = self.calls.get(ticket_id)
        if call is not None and call.status is Status.IN_QUEUE:
            call.reason = reason
            self.tell_state(call)

    def caller_of(self, ticket_id: str) -> str:
        call = self.calls.get(ticket_id)
        return call.caller if call is not None else ""

    def plan_of(self, ticket_id: str) -> WorkerPlan | None:
        """None: the call is over, or its surroundings cannot be read any more."""
        call = self.calls.get(ticket_id)
        return self.needs.plan_again(call.uid, call.request, call.spec) if call is not None else None

    def on_build_output(self, ticket_id: str, data: bytes) -> None:
        call = self.calls.get(ticket_id)
        if call is not None:
            self.add_output(call, STDERR, data)

    # -- what the worker says ------------------------------------------------------------------------------

    def add_output(self, call: Call, stream: int, said: bytes | Unread) -> None:
        offset = call.log.size
        call.log.append(stream, said)
        for watcher in list(call.watchers):
            watcher.on_output(call, stream, said if isinstance(said, bytes) else said.data, offset)

    def divide_output(self, call: Call, end: AttemptEnd) -> None:
        """What comes from here on is of the next attempt. One that a stale worker refused was none; nothing is divided where nothing more is kept."""
        if end.kind != "stale" and not call.log.dropped:
            self.add_output(call, ATTEMPT, f"{call.attempts + 1} {call.max_retries + 1}".encode())

    def add_item(self, call: Call, token: AttemptToken, number: int, payload: bytes | int, size: int) -> None:
        raise NotImplementedError

    def attempt_ended(self, call: Call, token: AttemptToken, end: AttemptEnd) -> None:
        raise NotImplementedError

    # -- what callers ask ----------------------------------------------------------------------------------

    def find(self, peer: Peer, call_id: str) -> Call:
        """A live call of this peer's. Raises NotFound for unknown and for foreign ids alike (T10)."""
        call = self.calls.get(call_id)
        if call is None or call.uid != peer.uid:
            raise NotFound("NOT_FOUND", f"cannot find {call_id[:80]}: you have no live call with this id")
        return call

    def block(self, peer: Peer, call_id: str, waiting: bool) -> None:
        """The body of this call waits for a nested one (or goes on)."""
        call = self.calls.get(call_id)
        if call is not None and call.uid == peer.uid:
            if waiting and call.worker is not None:
                call.worker.recall()  # those behind it are not to wait for it too
            self.engine.blocked(call_id, waiting)

    def credit(self, call: Call, items: int) -> None:
        """The caller has read so many more items."""
        call.items_read += items
        if call.worker is not None and call.status is Status.IN_PROGRESS:
            call.worker.credit(call.token, items)

    def note_construction(self, call: Call, end: AttemptEnd) -> None:
        """Constructed for this call although it had been before: its state was lost, and the caller is told."""
        if call.request.instance is None or not (end.constructed or end.kind == "died"):
            return
        was_constructed = self.instances.note_construction(call.uid, call.request.instance[0])
        if end.kind != "died":  # that does not say any more whether it constructed; whatever was there is gone
            call.reconstructed = call.reconstructed or was_constructed

    def ancestors_of(self, peer: Peer, parent: str) -> tuple[str, ...]:
        """The chain above a nested call, outermost first. Raises BadRequest when it is too deep."""
        chain: list[str] = []
        current = self.lookup(parent)
        while current is not None and current.uid == peer.uid:
            chain.append(current.id)
            current = self.lookup(current.request.parent)
        if len(chain) > self.limits.nesting_depth:
            raise BadRequest("TOO_DEEP", f"cannot nest calls deeper than {self.limits.nesting_depth}: {' > '.join(reversed(chain))}")
        return tuple(reversed(chain))

    def lookup(self, call_id: str) -> Call | None:
        """A live call of any runner."""
        return next((runner.calls[call_id] for runner in self.others if call_id in runner.calls), None)

    def tell_state(self, call: Call) -> None:
        """Whoever watches hears what it is now."""
        for watcher in list(call.watchers):
            watcher.on_state(call)
