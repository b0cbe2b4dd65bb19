"""One client process: what it asks, and by whom it is done.

Its frames are handled strictly in order, so a submission may refer to content sent just before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import remoted
from remoted.access import Peer
from remoted.accounts import Accounts
from remoted.calls import Call
from remoted.data.callers import Client, Clients, Runners, watch_caller
from remoted.data.following import Following
from remoted.data.holding import Holding
from remoted.data.messages import SubmissionParser, instance_of, parse_lease
from remoted.data.publishing import Publishing
from remoted.data.transport import Transport
from remoted.errors import BadRequest, NotFound, OverLimit, Refused, RemotedError, StoreError
from remoted.limits import Limits
from remoted.model import Reason
from remoted.peers import peer_pidfd
from remoted.rates import Rate
from remoted.tally import Tally
from remoted_client import wire

log = logging.getLogger(__name__)
_ID_DIGITS = 32
#: Of what a refusal repeats: keys, ids and digests are shorter.
_NAME_LETTERS = 64


class Connection:
    """Says hello first; afterwards each frame goes to its handler in ``_HANDLERS``."""

    def __init__(self, sock: socket.socket, peer: Peer, runners: Runners, clients: Clients, limits: Limits, accounts: Accounts, tally: Tally, rate: Rate, on_gone: Callable[[Connection], None]) -> None:
        self.peer = peer
        self._clients = clients
        self._runners = runners
        self._contents = runners.jobs.contents
        self._limits = limits
        self._accounts = accounts
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._greeted = False
        self._caller = ""
        self._client = ""
        self._secrets: list[str] = []
        self._parser = SubmissionParser()
        #: Submissions that are not committed yet: their calls are not known as ours before.
        self._submitting = 0
        #: What this connection waits to become.
        self._lease: Call | None = None
        self._pidfd = peer_pidfd(sock, peer.pid)
        self._transport = Transport(sock, limits, self._handle, self._on_failure, self._on_room, self._on_closed, tally.note_refusal, lambda count: rate.owe(peer.uid, count))
        self._following = Following(self._transport, runners.jobs.records, peer)
        self._holding = Holding(runners.jobs.engine, runners.jobs.contents, peer)
        self._publishing = Publishing(self._transport, runners.endpoints, peer)

    @property
    def foreign(self) -> asyncio.Future[None] | None:
        """Done once what it has sent and cannot be taken is closed; None if there is nothing of the kind."""
        return self._transport.foreign

    @property
    def has_greeted(self) -> bool:
        return self._greeted

    def turn_away(self, code: str, message: str) -> None:
        """It hears why, and that is the end."""
        self._transport.refuse_and_close(code, message)

    def close(self) -> None:
        """Idempotent: forget everything about this client but its jobs."""
        self._transport.close()

    def _on_room(self) -> None:
        self._following.on_room()

    def _handle(self, frame: wire.Frame) -> Awaitable[None] | None:
        handler = _HANDLERS.get(frame.op) if self._greeted or frame.op == "hello" else None
        if handler is None:
            raise BadRequest("UNKNOWN_OP", f"cannot handle {frame.op[:40]!r}" + ("" if self._greeted else ": say hello first"))
        return handler(self, frame)

    def _on_failure(self, frame: wire.Frame, error: Exception) -> None:
        """What cannot be done is told to who asked for it. Whatever it is: the others go on."""
        if isinstance(error, Refused):
            self._refuse(frame, error.code, str(error))
        elif isinstance(error, RemotedError):
            self._refuse(frame, "STORE_ERROR" if isinstance(error, StoreError) else "FAILED", str(error))
        elif isinstance(error, (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)):
            self._refuse(frame, "BAD_REQUEST", f"cannot read {frame.op[:40]!r}: {type(error).__name__} {error}")
        else:
            log.error("cannot handle %r", frame.op[:40], exc_info=error)
            self._refuse(frame, "FAILED", f"cannot handle {frame.op[:40]!r}: {type(error).__name__} in the daemon; its log says more")

    def _refuse(self, frame: wire.Frame, code: str, message: str) -> None:
        reference = {name: frame.header[name][:_NAME_LETTERS] for name in ("key", "id", "digest") if isinstance(frame.header.get(name), str)}
        calls = frame.header.get("calls")
        keys = [key for key in calls[: wire.FRAME_CALLS] if isinstance(key, str)] if isinstance(calls, list) else []
        for about in [{"key": key[:64]} for key in keys] or [reference]:
            self._transport.send({"op": "refused", "about": frame.op[:40], "code": code, "message": message[:4000], **about})

    # -- what clients ask ----------------------------------------------------------------------------------

    async def _on_hello(self, frame: wire.Frame) -> None:
        if self._greeted:
            raise BadRequest("BAD_REQUEST", "cannot greet you: you have said hello already")
        if frame.header["protocol"] != wire.PROTOCOL:
            message = f"cannot talk: you speak protocol {str(frame.header['protocol'])[:20]}, this daemon {wire.PROTOCOL}; install the same remoted on both sides"
            self._transport.refuse_and_close("VERSION_MISMATCH", message)
            return
        try:
            self.peer = replace(self.peer, name=await self._accounts.require(self.peer.uid))
        except Refused as error:
            self._transport.refuse_and_close(error.code, str(error))
            return
        self._greeted = True
        self._transport.introduced()
        started = int(frame.header.get("started", 0))
        self._caller = json.dumps([self.peer.pid, started])
        self._client = str(frame.header.get("client", ""))[:64]
        self._following.folds = frame.header.get("folds") is True
        if self._client:
            self._clients[(self.peer.uid, self._client)] = Client(self._following, self._holding)
        welcome = {"protocol": wire.PROTOCOL, "version": remoted.__version__, "pid": os.getpid(), "uid": os.geteuid(), "pool_busy_seconds": self._limits.pool_busy_seconds}
        self._transport.send({"op": "welcome", **welcome})

    async def _on_put(self, frame: wire.Frame) -> None:
        digest, role = str(frame.header["digest"]), str(frame.header["role"])
        if len(frame.fds) > 1:
            raise BadRequest("BAD_CONTENT", "cannot store content: it is one descriptor at most")
        copy = frame._replace(fds=tuple(map(os.dup, frame.fds)))
        await self._contents.put(self.peer.uid, digest, role, copy, self._runners.jobs.clock.wall())
        if role == "context":
            self._secrets.append(digest)
        if (room := self._contents.backlog.room(self.peer.uid)) is not None:
            await room

    def _on_submit(self, frame: wire.Frame) -> Awaitable[None] | None:
        """Each call of the frame is accepted or refused for itself; what they have in common is looked at once."""
        submission = self._parser.parse(frame)
        jobs, detach = self._runners.jobs, submission.common.options.detach
        self._holding.use(submission.common.spec)
        admitted = jobs.admit(self.peer, submission.common)
        output = bool(frame.header.get("output", True))
        self._submitting += len(submission.calls)
        jobs.accept(admitted, submission.calls, "" if detach else self._caller, partial(self._accepted, detach, output), needs_disk=detach or not self._following.folds, is_fresh=frame.header.get("fresh") is True and self._is_newest)
        return self._contents.backlog.room(self.peer.uid)

    @property
    def _is_newest(self) -> bool:
        """Has its process no later connection, over which it would send again what it has sent here?"""
        known = self._clients.get((self.peer.uid, self._client))
        return known is not None and known.following is self._following

    def _accepted(self, detach: bool, output: bool, key: str, found: str | Exception) -> None:
        self._submitting -= 1
        if isinstance(found, Exception):
            self._refuse_call("submit", key, found)
        else:
            self._acknowledge(key, detach, output, found)
        if not self._transport.is_open:
            self._leave_calls()

    def _refuse_call(self, op: str, key: str, error: Exception) -> None:
        code = error.code if isinstance(error, Refused) else "STORE_ERROR"
        self._transport.send({"op": "refused", "about": op, "key": key, "code": code, "message": str(error)[:4000]})

    def _acknowledge(self, key: str, detach: bool, output: bool, job_id: str) -> None:
        call = self._runners.jobs.calls.get(job_id)
        if call is not None and call.status.is_terminal:
            call = None  # everybody has been told, and it is forgotten in this turn
        if call is not None and not detach:
            self._following.claim(call)
        if not self._transport.is_open:
            return
        self._following.acknowledge(job_id, key, hurry=detach or call is None, is_over=call is not None and call.ended_at is not None)
        if call is not None:
            self._following.watch(call, output, is_new=True)
        else:
            self._loop.create_task(self._following.tell_finished(job_id))

    def _on_call(self, frame: wire.Frame) -> None:
        submission = self._parser.parse(frame)
        self._holding.use(submission.common.spec)
        output = bool(frame.header.get("output", True))
        for request in submission.requests(submission.common):
            try:
                call = self._runners.direct.submit(self.peer, request, self._caller)
            except Refused as error:
                self._refuse_call("call", request.key, error)
                continue
            self._transport.send_call("accepted", [request.key, call.id])
            self._following.claim(call)
            self._following.watch(call, output, is_new=True)

    def _on_route(self, frame: wire.Frame) -> None:
        """HTTP requests for this path become calls, for as long as this connection lives."""
        self._publishing.add(frame)

    def _on_lease(self, frame: wire.Frame) -> None:
        """The last that is read here: from the grant on the connection is a worker's.

        What happens meanwhile, and what its calls print, is told on the client's first connection.
        """
        lease_id, client = frame.header["lease"], str(frame.header["client"])
        if not isinstance(lease_id, str) or len(lease_id) != 32 or set(lease_id) - set("0123456789abcdef"):
            raise BadRequest("BAD_REQUEST", "cannot open the lease: its id must have 32 hexadecimal digits")
        known = self._clients.get((self.peer.uid, client))
        if known is None:
            raise BadRequest("BAD_REQUEST", "cannot open the lease: its client has no other connection")
        request = parse_lease(frame)
        known.holding.use(request.spec)
        call = self._runners.direct.lease(self.peer, request, lease_id, self, self._caller)
        if not call.status.is_terminal:
            known.following.claim(call)
            known.following.watch(call, output=True)
            self._lease = call if self._transport.is_open else None

    def hand_over(self) -> socket.socket | None:
        """``Door``: out of this connection's hands."""
        self._lease = None
        return self._transport.detach()

    async def _on_watch(self, frame: wire.Frame) -> None:
        """Attach to a job of this user's, live or over: ``Job.from_id`` and a client that came back."""
        asked = str(frame.header["id"])
        job_id = asked if len(asked) == _ID_DIGITS else await self._runners.jobs.records.resolve(self.peer, asked)
        if job_id != asked:
            self._transport.send_call("accepted", [asked, job_id])
        try:
            call = self._find(job_id)
        except NotFound:
            await self._following.tell_finished(job_id, int(frame.header.get("offset", 0)))
            return
        if frame.header.get("mine"):
            self._following.claim(call)
        for number, content in call.items.told_from(int(frame.header.get("items", 0))):
            self._following.on_item(call, number, content)
        self._following.watch(call, bool(frame.header.get("output", True)), max(0, int(frame.header.get("offset", 0))))

    def _on_cancel(self, frame: wire.Frame) -> None:
        call, number = self._find(str(frame.header["id"])), frame.header.get("number")
        if number is None:
            self._runners.of(call.id).cancel(call)
        else:
            self._runners.direct.cancel(call, number=int(number))

    def _on_waiting(self, frame: wire.Frame) -> None:
        for runner in (self._runners.jobs, self._runners.direct):
            runner.block(self.peer, str(frame.header["id"]), bool(frame.header["waiting"]))

    def _on_credit(self, frame: wire.Frame) -> None:
        with contextlib.suppress(NotFound):  # the stream may be over while the caller still reads
            call = self._find(str(frame.header["id"]))
            self._runners.of(call.id).credit(call, max(0, min(int(frame.header["items"]), 1 << 20)))

    def _on_close_stream(self, frame: wire.Frame) -> None:
        with contextlib.suppress(NotFound):
            call = self._find(str(frame.header["id"]))
            if call.worker is not None:
                call.worker.close_stream(call.token)

    def _on_ping(self, frame: wire.Frame) -> None:
        """Answered behind everything that was told before."""
        self._transport.send({"op": "pong"})

    def _on_settle(self, frame: wire.Frame) -> None:
        """Calls of an instance go over leases of the worker in which it lives: which is it?"""
        lease, instance = str(frame.header["lease"]), instance_of(frame.header)
        found: dict[str, str | int] = {"worker": "", "drops": 0}
        try:
            if (home := self._runners.direct.settle(self.peer, lease, instance)) is not None:
                found = {"worker": home.id, "drops": home.drops}
        except OverLimit as error:
            found |= {"code": error.code, "message": str(error)}
        self._transport.send({"op": "settled", "id": lease[:_ID_DIGITS], "instance": instance, **found})

    def _on_drop_instance(self, frame: wire.Frame) -> None:
        self._runners.jobs.instances.drop(self.peer.uid, str(frame.header["instance"]))

    def _find(self, call_id: str) -> Call:
        return self._runners.of(call_id).find(self.peer, call_id)

    # -- the end -------------------------------------------------------------------------------------------

    def _on_closed(self) -> None:
        if self._is_newest:
            del self._clients[(self.peer.uid, self._client)]
        if self._lease is not None:
            self._runners.direct.cancel(self._lease, Reason.CALLER_GONE)  # it gave up waiting
        self._following.stop()
        self._holding.close()
        self._publishing.stop()
        for digest in self._secrets:
            self._contents.release(self.peer.uid, digest)
        for runner in (self._runners.jobs, self._runners.direct):
            runner.forget_newest(self.peer.uid)
        self._on_gone(self)
        self._leave_calls()

    def _leave_calls(self) -> None:
        """Blocking calls end with their caller's process, not with its connection."""
        if self._submitting:
            return  # comes back here when the last of them is known
        mine = [call for call in map(self._runners.lookup, self._following.own) if call is not None]
        pidfd, self._pidfd = self._pidfd, None
        watch_caller(self._runners, pidfd, mine)


_Handler = Callable[[Connection, wire.Frame], Awaitable[None] | None]
_HANDLERS: dict[str, _Handler] = {
    "hello": Connection._on_hello,
    "put": Connection._on_put,
    "submit": Connection._on_submit,
    "call": Connection._on_call,
    "lease": Connection._on_lease,
    "route": Connection._on_route,
    "watch": Connection._on_watch,
    "cancel": Connection._on_cancel,
    "waiting": Connection._on_waiting,
    "credit": Connection._on_credit,
    "close_stream": Connection._on_close_stream,
    "ping": Connection._on_ping,
    "settle": Connection._on_settle,
    "drop_instance": Connection._on_drop_instance,
}
