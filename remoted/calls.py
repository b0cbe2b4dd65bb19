"""A call from its ticket to the end of its attempts: what durable jobs and direct calls have in common.

``CallRunner`` turns a call into a ticket, gives its attempts to workers, collects what they say and tells
whoever watches. What is durable, what is retried and what the caller finally gets is decided by the two
subclasses (``jobs``, ``direct``).
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from remoted.access import Access, Identity, Peer
from remoted.attempts import AttemptEnd, AttemptSpec, Content
from remoted.clock import Clock
from remoted.contents import Contents
from remoted.cradle import WorkerPlan
from remoted.endings import Ending
from remoted.engine import Engine
from remoted.environments import EnvironmentFailed, EnvironmentRequest, normalise
from remoted.errors import BadRequest, Conflict, Forbidden, NotFound
from remoted.items import Items
from remoted.limits import Limits
from remoted.logs import STDERR, JobLog
from remoted.model import AttemptToken, DeviceUuid, Reason, Status, Uid, WorkerId
from remoted.scheduler import matching
from remoted.scheduler.events import Assign, InstanceFound
from remoted.scheduler.state import Need, PoolPolicy, Ticket
from remoted.spec import Context, JobSpec, Options, kind_id
from remoted.usage import Span
from remoted.workers import Worker

_INSTALLER_VARIABLES = frozenset({"PATH", "HOME", "LANG", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"})
_INSTALLER_PREFIXES = ("UV_", "PIP_", "SSL_CERT_", "HTTP_", "HTTPS_", "ALL_PROXY", "NO_PROXY", "http_", "https_", "all_proxy", "no_proxy")
_KINDS_MOST = 4096
_NO_TOKEN = AttemptToken("")
_NO_WORKER = WorkerId("")
_C = TypeVar("_C", bound="Call")


@dataclass(frozen=True, slots=True)
class Request:
    """A submission as it came from a client, content by digest."""

    key: str
    spec: str
    code: str
    modules: str
    context: str
    arguments: str
    arguments_inline: bytes | None
    options: Options
    parent: str = ""
    instance: tuple[str, str, str] | None = None
    """(instance id, method, digest of the constructor's arguments)"""
    #: Arguments, result and items are bytes for the function itself, not pickles.
    is_raw: bool = False
    #: As whom its attempts run, where the daemon can become somebody else.
    identity: Identity | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """All content that it refers to."""
        constructor = self.instance[2] if self.instance else ""
        return tuple(digest for digest in (self.spec, self.code, self.modules, self.context, self.arguments, constructor) if digest)


class Watcher(Protocol):
    """Somebody who is told what happens to a call; never blocks."""

    def owns(self, call: Call) -> bool: ...
    def on_state(self, call: Call) -> None: ...
    def on_output(self, call: Call, stream: int, data: bytes, offset: int) -> None: ...
    def on_item(self, call: Call, number: int, content: Content) -> None: ...
    def on_mark(self, call: Call, number: int) -> None: ...
    def on_done(self, call: Call) -> None: ...


@dataclass(eq=False)
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

    def used_until(self, moment: float) -> Span:
        """By its newest attempt."""
        return Span(self.uid, self.attempt_started, moment, len(self.devices), self.ticket.cpus or 1.0)

    @property
    def max_retries(self) -> int:
        override = self.request.options.max_retries
        return self.spec.max_retries if override is None else override

    @property
    def timeout_seconds(self) -> float | None:
        limits = [self.request.options.timeout_seconds or self.spec.timeout_seconds, self.spec.pool.execution_timeout_seconds]
        return min((limit for limit in limits if limit is not None), default=None)


class Listener:
    """Binds what a worker says to one attempt of one call."""

    def __init__(self, runner: CallRunner, call: Call, token: AttemptToken) -> None:
        self._runner, self._call, self._token = runner, call, token

    def on_begin(self) -> None:
        self._runner.attempt_began(self._call)

    def on_lasting(self) -> None:
        self._runner.tell_state(self._call)

    def on_output(self, stream: int, data: bytes) -> None:
        self._runner.add_output(self._call, stream, data)

    def on_item(self, number: int, payload: bytes | int, size: int) -> None:
        self._runner.add_item(self._call, self._token, number, payload, size)

    def on_mark(self, number: int) -> None:
        for watcher in list(self._call.watchers):
            watcher.on_mark(self._call, number)

    def on_end(self, end: AttemptEnd) -> None:
        self._runner.attempt_ended(self._call, self._token, end)


class CallRunner:
    """The common half; also the engine's ``TicketOwner``."""

    #: Will anybody ask for an outcome after a restart?
    keeps_outcomes = False

    def __init__(self, engine: Engine, contents: Contents, clock: Clock, limits: Limits, kind_key: bytes) -> None:
        self.engine = engine
        self.contents = contents
        self.clock = clock
        self.limits = limits
        self.calls: dict[str, Call] = {}
        #: Every runner of this daemon: a nested call's parent may be of the other kind. Set by the composition root.
        self.others: tuple[CallRunner, ...] = (self,)
        #: Told of each call that is over.
        self.on_ended: Callable[[Ending], None] = lambda ending: None
        #: Whom the daemon serves. Set by the composition root where that is not its own user.
        self.access = Access(os.geteuid())
        self._kind_key = kind_key
        #: By (user, instance): ids are made by clients.
        self._homes: dict[str, WorkerId] = {}
        self._kinds: dict[tuple[int, str, str, Identity | None], tuple[str, str | None]] = {}
        self._constructed: set[str] = set()

    # -- in and out ----------------------------------------------------------------------------------------

    def new_call(self, kind: type[_C], peer: Peer, request: Request, call_id: str, log: Path, **more: Any) -> tuple[_C, PoolPolicy]:
        """A call of one's own, not known to anybody yet. Raises Refused."""
        if self.engine.is_stopping:
            raise Conflict("DRAINING", "cannot take new work: the daemon is being stopped; try again when it is back")
        request = self.identified(peer, request)
        spec = self.contents.spec(peer.uid, request.spec)
        ancestors = self.ancestors_of(peer, request.parent) if request.parent else ()
        if self.engine.is_closed_to(ancestors):
            self.engine.gate.admit(self.keeps_outcomes)
        ticket, policy = self.make_ticket(peer, call_id, request, spec, ancestors)
        call = kind(
            id=call_id,
            uid=Uid(peer.uid),
            request=request,
            spec=spec,
            name=request.options.name or spec.function.qualname,
            ticket=ticket,
            log=JobLog(log, self.limits.log_bytes_per_job),
            submitted_at=self.clock.wall(),
            **more,
        )
        return call, policy

    def identified(self, peer: Peer, request: Request) -> Request:
        """With the identity of who asks, where it decides as whom the body runs. Raises Forbidden (T04)."""
        if not self.access.may_run(peer):
            raise Forbidden("ROOT_REFUSED", "cannot run functions as root: call as a user (sudo -u USER ...), or let the administrator set allow_root = true in [users] of config.toml")
        return replace(request, identity=peer.identity) if self.access.serves_everybody else request

    def enter(self, call: Call) -> None:
        """It is live: what it refers to is kept, and its parent knows it."""
        self.calls[call.id] = call
        for digest in call.request.digests:
            self.contents.hold(call.uid, digest)
        parent = self.lookup(call.request.parent)
        if parent is not None and parent.uid == call.uid:
            parent.children.add(call.id)

    def leave(self, call: Call) -> None:
        """The opposite; the log stays where it is."""
        del self.calls[call.id]
        for digest in call.request.digests:
            self.contents.release(call.uid, digest)
        if call.retry_timer is not None:
            call.retry_timer.cancel()
        parent = self.lookup(call.request.parent)
        if parent is not None:
            parent.children.discard(call.id)

    # -- from a request to a ticket ------------------------------------------------------------------------

    def make_ticket(self, peer: Peer, call_id: str, request: Request, spec: JobSpec, ancestors: tuple[str, ...]) -> tuple[Ticket, PoolPolicy]:
        """Raises BadRequest when this host can never serve the call; names what the host has."""
        self.contents.require(peer.uid, *request.digests)
        context = self.contents.context(peer.uid, request.context)
        gpu = self._gpu_request(spec)
        self._refuse_what_is_missing(spec)
        kind, environment = self._kind(peer.uid, request, spec, context)
        need = Need(
            uid=Uid(peer.uid),
            pool=(peer.uid, spec.pool.class_, spec.pool.name),
            kind=kind,
            gpu=gpu,
            concurrency=spec.pool.max_concurrency,
            environment=environment,
            instance=_instance_key(peer.uid, request.instance[0]) if request.instance else None,
        )
        if spec.pool.workers_min:
            self.engine.holders.hold(need.pool, spec.pool.keep_warm_seconds)
        cpus = min(spec.pool.cpus or 0.0, self.engine.scheduler.cpus)
        policy = PoolPolicy(spec.pool.workers_min, spec.pool.workers_max, spec.pool.idle_timeout_seconds or 300.0)
        return Ticket(call_id, need, cpus, request.options.priority, ancestors), policy

    def _kind(self, uid: int, request: Request, spec: JobSpec, context: Context) -> tuple[str, str | None]:
        """(kind, environment); the engine knows from here on how such workers are started. Worked out once per spec and context."""
        key = (uid, request.spec, request.context, request.identity)
        if key not in self._kinds:
            kind = kind_id(self._kind_key, spec, context, spec.pool.gpus, request.identity)
            plan = self._plan(uid, spec, context, request.identity)
            self.engine.plan(kind, plan)
            if len(self._kinds) >= _KINDS_MOST:
                self._kinds.clear()
            self._kinds[key] = (kind, plan.environment.digest if plan.environment else None)
        return self._kinds[key]

    def _gpu_request(self, spec: JobSpec) -> matching.GpuRequest | None:
        if not spec.pool.gpu:
            return None
        request = matching.parse_request(spec.pool.gpus or ("ANY",), spec.pool.gpu_count)
        devices = self.engine.devices
        problem = matching.explain_impossible(request, devices.known) or matching.explain_old_driver(spec.pool.cuda_min, devices.cuda)
        if problem is not None:
            raise BadRequest("NO_MATCHING_GPU", problem + (f" ({devices.problem})" if devices.problem else ""))
        return request

    def _refuse_what_is_missing(self, spec: JobSpec) -> None:
        """What this version cannot do is refused before anything runs, never ignored."""
        if spec.pool.isolation != "subprocess" or spec.pool.image:
            raise BadRequest("NOT_SUPPORTED", "cannot run in a container: this version has isolation='subprocess' only; leave isolation and imageName out")
        if spec.pool.volume is not None:
            raise BadRequest("NOT_SUPPORTED", f"cannot mount the network volume {spec.pool.volume.id}: this version has no volumes; pass the path of a folder instead")

    def _plan(self, uid: int, spec: JobSpec, context: Context, identity: Identity | None) -> WorkerPlan:
        keep = ("HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "XDG_CACHE_HOME")
        environ = {name: context.environ[name] for name in keep if name in context.environ} | context.worker_variables()
        request = None
        if spec.dependencies:
            try:
                normalise(spec.dependencies)
            except EnvironmentFailed as error:
                raise BadRequest("BAD_REQUIREMENT", str(error)) from error
            request = EnvironmentRequest(
                uid=uid,
                executable=spec.executable,
                requirements=spec.dependencies,
                isolated=spec.pool.isolated,
                accelerate_downloads=spec.accelerate_downloads,
                identity=identity,
            )
        visible = {name: value for name, value in context.environ.items() if name in _INSTALLER_VARIABLES or name.startswith(_INSTALLER_PREFIXES)}
        return WorkerPlan(
            executable=spec.executable,
            environ=environ,
            memory_bytes=spec.pool.memory_bytes,
            cpus=min(spec.pool.cpus, self.engine.scheduler.cpus) if spec.pool.cpus else None,
            environment=request,
            descriptors=context.descriptors,
            version=spec.python,
            build_environ=visible,
            identity=identity,
            preload=spec.pool.preload,
            hints=frozenset(spec.function.imports),
            import_environ=context.import_variables(),
        )

    # -- the engine's owner --------------------------------------------------------------------------------

    def on_assigned(self, ticket_id: str, worker: Worker, devices: tuple[DeviceUuid, ...], how: Assign) -> None:
        call = self.calls[ticket_id]
        call.attempts += 1
        call.tries += 1
        call.token = AttemptToken(secrets.token_hex(16))
        call.worker, call.worker_id, call.devices, call.is_ahead = worker, worker.id, devices, how.ahead
        call.position = worker.take_position()
        call.attempt_started = self.clock.wall()
        call.started_at = call.started_at or call.attempt_started
        if call.request.instance is not None:
            self._homes[_instance_key(call.uid, call.request.instance[0])] = worker.id
        self.begin(call, how.inline)

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
        request = call.request
        instance = request.instance
        return AttemptSpec(
            token=call.token,
            call_id=call.id,
            code=self.contents.content(call.uid, request.code),
            modules=self.contents.content(call.uid, request.modules) if request.modules else None,
            context=self.contents.content(call.uid, request.context),
            arguments=Content(request.arguments, request.arguments_inline)
            if request.arguments_inline is not None
            else self.contents.content(call.uid, request.arguments),
            stream=call.spec.stream,
            is_kept=self.keeps_outcomes,
            timeout_seconds=call.timeout_seconds,
            concurrent=call.spec.pool.max_concurrency > 1,
            instance={"id": instance[0], "method": instance[1]} if instance else None,
            constructor=self.contents.content(call.uid, instance[2]) if instance else None,
            ahead=call.is_ahead,
            position=call.position,
            is_raw=request.is_raw,
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

    def on_build_output(self, ticket_id: str, data: bytes) -> None:
        call = self.calls.get(ticket_id)
        if call is not None:
            self.add_output(call, STDERR, data)

    # -- what the worker says ------------------------------------------------------------------------------

    def add_output(self, call: Call, stream: int, data: bytes) -> None:
        offset = call.log.size
        call.log.append(stream, data)
        for watcher in list(call.watchers):
            watcher.on_output(call, stream, data, offset)

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
        instance = _instance_key(call.uid, call.request.instance[0])
        if end.kind == "died":  # it does not say any more whether it constructed; whatever was there is gone
            self._constructed.add(instance)
            return
        call.reconstructed = call.reconstructed or instance in self._constructed
        self._constructed.add(instance)

    def drop_instance(self, peer: Peer, instance: str) -> None:
        """Its handle is gone: the worker that holds it forgets it."""
        key = _instance_key(peer.uid, instance)
        self._constructed.discard(key)
        home = self.engine.workers.get(self._homes.pop(key, WorkerId("")))
        if home is not None and self.engine.view(home.id) is not None:
            home.drop_instance(instance)
            self.engine.drop_instance(key)

    def remember_instance(self, worker: Worker, uid: int, instance: str) -> None:
        """It lives in a worker of an earlier daemon's: its calls go there."""
        key = _instance_key(uid, instance)
        if self._homes.setdefault(key, worker.id) == worker.id:
            self._constructed.add(key)
            self.engine.handle(InstanceFound(key, worker.id))

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


def _instance_key(uid: int, instance: str) -> str:
    """Ids are made by clients: nobody's id means another user's object."""
    return f"{uid}:{instance}"

