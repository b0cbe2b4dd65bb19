"""Direct calls of load-balanced classes: no record, no retry, the fast answer or an honest refusal.

Most of them travel on a lease (``leases``): the client's own connection, handed to a worker. Those that need the daemon
on their way (calls made inside a body, HTTP requests) pass through here one by one.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import socket
import struct
from typing import Any

from remoted.access import Peer
from remoted.adopted import AdoptedWorker, FoundLease
from remoted.attempts import AttemptEnd, Content
from remoted.calls import Call, CallRunner, Listener
from remoted.clock import Clock
from remoted.contents import Contents
from remoted.endings import ending_of
from remoted.engine import Engine
from remoted.errors import BadRequest
from remoted.instances import Instances
from remoted.leases import Door, Lease, Leases, is_page
from remoted.limits import Limits
from remoted.model import AttemptToken, DeviceUuid, Reason, Status, Uid
from remoted.paths import Paths
from remoted.peers import peer_of
from remoted.requests import Request
from remoted.scheduler.state import Need, Ticket
from remoted.spawn.reaper import ticks_of
from remoted.spec import JobSpec, parse_options
from remoted.usage import Pending
from remoted.verdicts import stopped
from remoted.workers import Worker
from remoted.workload import Attempt

_ID = re.compile(r"[0-9a-f]{32}")
#: Waiting for these is the pool's business, not a busy pool: the time does not count (SURFACE F06).
_NOT_BUSY = frozenset({Reason.STARTING, Reason.WAITING_ENV})


class DirectCalls(CallRunner):
    """The use case of load-balanced classes."""

    def __init__(self, engine: Engine, contents: Contents, instances: Instances, clock: Clock, limits: Limits, kind_key: bytes, paths: Paths) -> None:
        super().__init__(engine, contents, instances, clock, limits, kind_key, paths)
        #: What was held and is not charged yet: nothing of these calls is in the store.
        self.used = Pending()
        self._leases = Leases(clock, limits, lambda: engine.is_contended)
        engine.on_contention = self._leases.make_room

    def submit(self, peer: Peer, request: Request, caller: str) -> Call:
        """A call that waits for a worker from now on. Raises Refused."""
        call_id = secrets.token_hex(16)
        return self._start(peer, request, Call, call_id, caller=caller)

    def check(self, peer: Peer, request: Request) -> JobSpec:
        """The spec of calls that will come, if this host can serve such. Raises Refused."""
        spec = self.contents.spec(peer.uid, request.spec)
        if not spec.pool.load_balanced:
            raise BadRequest("BAD_REQUEST", f"cannot call {spec.function.qualname} directly: {spec.pool.class_} is a queue class")
        self.make_ticket(peer, "", self.identified(peer, request), spec, ())
        return spec

    def lease(self, peer: Peer, request: Request, lease_id: str, door: Door, caller: str) -> Call:
        """A connection that waits for a worker from now on. Raises Refused."""
        if self.lookup(lease_id) is not None:
            raise BadRequest("BAD_REQUEST", "cannot open the lease: its id is in use")
        return self._start(peer, request, Lease, lease_id, caller=caller, door=door)

    def settle(self, peer: Peer, lease_id: str, instance: str) -> Worker | None:
        """The worker in which an instance lives: if nowhere yet, that of this lease. None: the lease is none any more. Raises OverLimit."""
        lease = self.calls.get(lease_id)
        if not isinstance(lease, Lease) or lease.uid != peer.uid or lease.worker is None:
            return None
        return self.instances.settle(lease.worker, lease.uid, instance)

    def _start(self, peer: Peer, request: Request, kind: type[Call], call_id: str, **more: Any) -> Call:
        admitted = self.admit(peer, request)
        if problem := self.contents.held.refusal(peer.uid, len(request.arguments_inline or b"")):
            raise problem
        call = self.new_call(kind, admitted, call_id, request.arguments_inline, **more)
        self.enter(call)
        self._watch_busy(call, self.limits.pool_busy_seconds)
        self.engine.submit(call.ticket, admitted.wanted.policy, self)
        return call

    def drain(self) -> None:
        """Clients that are served by a worker directly ask for their next call here, and are refused."""
        self._leases.revoke_all()

    def _watch_busy(self, call: Call, remaining: float) -> None:
        """Count the seconds in which other calls were in the way, and give up after so many."""
        loop = asyncio.get_running_loop()
        step = min(1.0, remaining)
        call.retry_timer = loop.call_later(step, self._count_busy, call, remaining, step)

    def _count_busy(self, call: Call, remaining: float, step: float) -> None:
        if call.status is not Status.IN_QUEUE or call.id not in self.calls:
            return
        waiting = self.engine.waiting_for(call.id)
        counted = waiting is not None and waiting[0] not in _NOT_BUSY
        remaining -= step if counted else 0.0
        if remaining > 0:
            self._watch_busy(call, remaining)
            return
        why = f"{waiting[0].value}: {waiting[1]}" if waiting else ""
        self.engine.withdraw(call.id)
        call.error, call.error_type = f"cannot run {call.name}: no worker became free within {self.limits.pool_busy_seconds:g} s ({why})", "POOL_BUSY"
        self._finish(call, Status.FAILED, Reason.WAITING_WORKER)

    def begin(self, call: Call, inline: bool) -> None:
        if isinstance(call, Lease):
            self._grant(call)
        else:
            self.run(call, inline)

    def _grant(self, lease: Lease) -> None:
        assert lease.door is not None
        assert lease.worker is not None
        lease.status, lease.reason = Status.IN_PROGRESS, None
        connection, lease.door = lease.door.hand_over(), None
        if connection is None:
            self.attempt_ended(lease, lease.token, AttemptEnd("ended", message="its client had gone"))
            return
        context = self.contents.content(lease.uid, lease.request.context)
        lease.worker.lend(self._leases.grant(lease, connection, context), Listener(self, lease, lease.token))
        self.tell_state(lease)

    # -- after a restart -----------------------------------------------------------------------------------

    def resume(self, worker: AdoptedWorker, need: Need, devices: tuple[DeviceUuid, ...], found: FoundLease) -> Lease:
        """A lease that this worker has of the last daemon's. The descriptors are taken. Raises Refused, and then they are not."""
        spec = self.contents.spec(need.uid, found.spec)
        peer = _client_of(found, need.uid)
        if not _ID.fullmatch(found.lease_id) or self.lookup(found.lease_id) is not None or not spec.pool.load_balanced:
            raise BadRequest("BAD_REQUEST", "cannot go on with the lease: it is none")
        request = Request("", found.spec, "", "", "", "", b"", parse_options({}))
        ticket = Ticket(found.lease_id, need, min(spec.pool.cpus or 0.0, self.engine.scheduler.cpus))
        log, now = self.new_log(found.lease_id, need.uid, is_new=False), self.clock.wall()
        lease = Lease(found.lease_id, need.uid, request, spec, spec.function.qualname, ticket, log, now, status=Status.IN_PROGRESS)
        lease.token, lease.worker, lease.worker_id, lease.devices = found.token, worker, worker.id, devices
        lease.started_at = lease.attempt_started = now
        lease.caller = json.dumps([peer.pid, ticks_of(peer.pid)])
        self.enter(lease)
        self._leases.resume(lease, socket.socket(fileno=found.connection), found.page)
        worker.lent(Attempt(found.token, Listener(self, lease, found.token), self.clock.boottime()))
        return lease

    def add_item(self, call: Call, token: AttemptToken, number: int, payload: bytes | int, size: int) -> None:
        content = _content(payload)
        for watcher in list(call.watchers):
            watcher.on_item(call, number, content)
        if isinstance(payload, int):
            os.close(payload)

    def attempt_ended(self, call: Call, token: AttemptToken, end: AttemptEnd) -> None:
        worker, call.worker = call.worker, None
        if end.kind == "stale" and worker is not None:
            self.engine.retire(worker, end.message)
        self.engine.ended(call.id)
        if isinstance(call, Lease):
            self._leases.end(call)
        elif end.kind == "stale" and worker is not None:
            self._queue_again(call)
            return
        call.result, call.result_kind, call.result_size = _content(end.payload), end.kind, end.size
        call.error, call.error_type, call.traceback = end.message, end.error_type, end.traceback
        status, reason = _verdict(end)
        if status is Status.TIMED_OUT:
            call.error = f"the call ran longer than its timeout of {_timeout_of(call):g} s and was stopped"
        self._finish(call, status, reason)
        if isinstance(end.payload, int):
            os.close(end.payload)
        if worker is not None and worker.is_alive and not isinstance(call, Lease):
            worker.acknowledge(token)

    def _queue_again(self, call: Call) -> None:
        call.status = Status.IN_QUEUE
        call.ticket, policy = self.make_ticket(Peer(call.uid, call.uid, 0), call.id, call.request, call.spec, call.ticket.ancestors)
        self.engine.submit(call.ticket, policy, self)

    def on_unplaceable(self, ticket_id: str, reason: Reason, message: str, detail: str) -> None:
        call = self.calls.get(ticket_id)
        if call is not None:
            call.error = f"{message}\n{detail}".strip()
            self._finish(call, Status.FAILED, reason)

    def cancel(self, call: Call, why: Reason = Reason.CANCELLED, number: int | None = None) -> None:
        """``number``: which call of a lease; None is the one in hand."""
        if isinstance(call, Lease) and call.worker is not None:
            self._leases.stop_call(call, number, why)
            return
        if call.stop_requested is not None:
            return
        call.stop_requested = why
        if call.worker is not None:
            call.worker.stop(call.token, why)
        elif call.id in self.calls:
            self.engine.withdraw(call.id)
            call.error = stopped(why)
            self._finish(call, Status.CANCELLED, why)

    def leave_alone(self, call: Call) -> None:
        """Nobody wants what would still come of it: a stream is told so at its next item, anything else is stopped."""
        if call.spec.stream and call.worker is not None:
            call.worker.close_stream(call.token)
        else:
            self.cancel(call, Reason.CALLER_GONE)

    def _finish(self, call: Call, status: Status, reason: Reason | None) -> None:
        call.status, call.reason, call.ended_at = status, reason, self.clock.wall()
        if call.started_at is not None:
            call.run_seconds = max(0.0, call.ended_at - call.attempt_started)
            self.used.add(call.used_until(call.ended_at))
        self.on_ended(ending_of(call, "lease" if isinstance(call, Lease) else "direct"))
        self.leave(call)
        for watcher in list(call.watchers):
            watcher.on_done(call)
        call.watchers.clear()
        call.log.close()
        call.log.path.unlink(missing_ok=True)


def _client_of(found: FoundLease, uid: Uid) -> Peer:
    """Who opened the connection of a lease. Raises BadRequest unless it is a client's of this user's, with a page that can be read."""
    try:
        with socket.socket(fileno=os.dup(found.connection)) as sock:
            if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM and (peer := peer_of(sock)).uid == uid and is_page(found.page):
                return peer
    except (OSError, ValueError, struct.error):
        pass
    raise BadRequest("BAD_REQUEST", "cannot go on with the lease: its connection or its page is none")


def _content(payload: bytes | int) -> Content:
    """Readable until the payload's descriptor is closed: the watchers open their own."""
    if isinstance(payload, int):
        return Content("", None, fd=payload)
    return Content("", payload, None)


def _timeout_of(call: Call) -> float | None:
    """A lease is named after the call that opened it; the one that was stopped has its own, which stands in the page."""
    return (call.last_page.timeout_seconds if isinstance(call, Lease) else 0.0) or call.timeout_seconds


def _verdict(end: AttemptEnd) -> tuple[Status, Reason | None]:
    if end.kind in ("returned", "ended", "stale"):
        return Status.COMPLETED, None
    if end.stopped_by is Reason.TIMEOUT:
        return Status.TIMED_OUT, Reason.TIMEOUT
    if end.stopped_by is not None:
        return Status.CANCELLED, end.stopped_by
    return Status.FAILED, end.reason or (Reason.EXITED if end.kind == "exited" else Reason.EXCEPTION)
