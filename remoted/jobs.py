"""Durable calls: acknowledged means stored, and every job reaches exactly one terminal status.

Order is the whole trick (MECHANISMS 8). A submission is committed before it is acknowledged. An attempt, with
its token, is committed before its payload leaves for a worker, in the same commit as the submission when a
worker is free; or, where it may begin at once, noted for the next daemon with its job (``redo``). An outcome is committed before anybody hears of it, and only then may the worker forget it. So a
crash at any point loses no job, runs no token twice, and counts every attempt that may have begun.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from remoted import turn
from remoted.access import Peer
from remoted.attempts import AttemptEnd, Content
from remoted.blobs import Blobs, memory_bytes
from remoted.calls import Admitted, Call, CallRunner
from remoted.clock import Clock
from remoted.contents import Contents
from remoted.docket import AlreadyKnown, Docket, job_id
from remoted.endings import Ending, ending_of
from remoted.engine import Engine
from remoted.errors import RemotedError, StoreError
from remoted.instances import Instances
from remoted.items import Items
from remoted.keeping import ItemKeeper
from remoted.limits import Limits
from remoted.model import AttemptToken, Reason, Status, Uid, WorkerId
from remoted.paces import Paces
from remoted.paths import Paths
from remoted.persisting import Persisting
from remoted.quotas import ROW_BYTES, too_many_jobs
from remoted.records import Records
from remoted.redo import RedoLog
from remoted.replies import close_payload
from remoted.requests import Request
from remoted.scheduler.state import PoolPolicy
from remoted.store import Row, Statements, Store
from remoted.usage import Pending, Span, charge_all
from remoted.verdicts import describe, stopped, verdict
from remoted.workers import Worker

log = logging.getLogger(__name__)
#: Between two tries to store an outcome.
_CLOSE_SECONDS = 5.0
#: With a submission's key the id, once the job is committed, or why it is not.
Told = Callable[[str, str | Exception], None]


class Jobs(CallRunner):
    """The use case of queue classes: submit, wait, cancel, retry, result."""

    keeps_outcomes = True

    def __init__(self, engine: Engine, contents: Contents, instances: Instances, clock: Clock, limits: Limits, kind_key: bytes, store: Store, redo: RedoLog, blobs: Blobs, paths: Paths) -> None:
        super().__init__(engine, contents, instances, clock, limits, kind_key, paths)
        self.records = Records(store, blobs, paths, clock, limits)
        self._blobs = blobs
        #: Who waits to hear that a job is stored that another one has submitted.
        self._accepting: dict[str, list[Told]] = {}
        #: Calls that run although their jobs were stored long ago, with whom to tell of those.
        self._doubles: dict[str, Told] = {}
        self._per_uid: Counter[int] = Counter()
        self._persisting = Persisting(store)
        self._docket = Docket(store, redo, clock.boot_id(), self._persisting.again)
        self._keeper = ItemKeeper(self._docket, blobs, contents.quotas, self._persisting.spawn, self._item_kept, self._persisting.again)
        self._finishing = 0  #: Outcomes that are not committed yet.
        self._paces = Paces()
        self._turn = turn.current()
        self.completed = 0

    # -- submitting ----------------------------------------------------------------------------------------

    async def submit(self, peer: Peer, request: Request, caller: str) -> str:
        """The id, once the job is committed. Raises Refused."""
        accepted: asyncio.Future[str | Exception] = asyncio.get_running_loop().create_future()
        self.accept(self.admit(peer, request), [(request.key, request.arguments_inline)], caller, lambda key, found: accepted.set_result(found))
        found = await accepted
        if isinstance(found, Exception):
            raise found
        return found

    def accept(self, admitted: Admitted, calls: Sequence[tuple[str, bytes | None]], caller: str, told: Told, needs_disk: bool = True, is_fresh: bool = False) -> None:
        """Each by its key and arguments. The same key again gives the same id (T61). ``needs_disk``: else whoever is ``told`` asks for a flush before its caller is. ``is_fresh``: their keys were never used before."""
        uid, quotas, size = admitted.uid, self.contents.quotas, 0
        new: list[Call] = []
        room = self.limits.queued_jobs(uid) - self._per_uid[uid]
        for key, arguments in calls:
            call_id, its_size = job_id(uid, key), ROW_BYTES + len(arguments or b"")
            if (known := self.calls.get(call_id)) is not None:
                self._tell_known(known, key, told)
            elif len(new) >= room:
                told(key, too_many_jobs(self.limits, uid))
            elif problem := quotas.refusal(uid, its_size, beside=size) or self.contents.held.refusal(uid, len(arguments or b"")):
                told(key, problem)
            else:
                size += its_size
                call = self.new_call(Call, admitted, call_id, arguments, key=key, caller=caller, seq=self._docket.next_seq())
                self.enter(call)
                new.append(call)
        if new:
            quotas.add(uid, size)
            self._per_uid[uid] += len(new)
            self.contents.backlog.enter(uid, size)
            self._docket.add(admitted, new, partial(self._stored, told), needs_disk, is_fresh and not self.contents.is_behind)
            self.engine.submit(new[0].ticket, admitted.wanted.policy, self, behind=tuple(call.ticket for call in new[1:]))

    def _tell_known(self, call: Call, key: str, told: Told) -> None:
        if call.is_stored and not call.is_double:
            self.records.flush(partial(told, key, call.id))
        else:
            self._accepting.setdefault(call.id, []).append(told)

    def _stored(self, told: Told, call: Call, error: Exception | None) -> None:
        """Committed, or refused; or the key was known from before and this call is a double."""
        call.is_stored = True
        self.contents.backlog.leave(call.uid, ROW_BYTES + len(call.arguments or b""))
        if call.is_double:
            self._doubles[call.id] = told
            if call.worker is None:
                self._end_double(call)
            else:
                call.worker.stop(call.token, Reason.CANCELLED)
            return
        if error is not None:
            self._forget(call)
        self._tell_stored(call, told, call.id if error is None or isinstance(error, AlreadyKnown) else error)

    def _end_double(self, call: Call) -> None:
        """It ran all the same, and that is charged; nothing else of it is kept."""
        used = Pending()
        used.add(call.used_until(call.ended_at or self.clock.wall()))
        self._persisting.spawn(self.records.charge(used))
        self._cancel_children(call)
        self._forget(call)
        self._tell_stored(call, self._doubles.pop(call.id), call.id)

    def _tell_stored(self, call: Call, told: Told, found: str | Exception) -> None:
        told(call.key, found)
        for other in self._accepting.pop(call.id, ()):
            self.records.flush(partial(other, call.key, found))

    def _forget(self, call: Call) -> None:
        """The call is over, or never was: give back everything that it holds in memory."""
        if call.id not in self.calls:
            return
        self.leave(call)
        self._per_uid[call.uid] -= 1
        self.engine.forget(call.id)
        call.log.close()

    # -- attempts ------------------------------------------------------------------------------------------

    def begin(self, call: Call, inline: bool) -> None:
        self._docket.begin(call, partial(self._begun, inline=True) if inline else self._begun)

    def _begun(self, call: Call, error: Exception | None, inline: bool = False) -> None:
        if self.calls.get(call.id) is not call:
            return
        if error is None:
            self.run(call, inline)
            if not call.is_ahead:
                self._run_ahead(call.worker)
            return
        # Not stored, so not started: the worker is free, and the job waits for a store that takes it.
        log.error("cannot begin an attempt of %s: %s", call.id, error)
        self.engine.ended(call.id)
        call.attempts -= 1
        call.worker = None
        self._retry_later(call, self.limits.retry_cap_seconds)

    def attempt_ended(self, call: Call, token: AttemptToken, end: AttemptEnd) -> None:
        """A worker's last word about an attempt; an old token's is discarded (T56)."""
        if self.calls.get(call.id) is not call or call.token != token:
            close_payload(end.payload)
            return
        worker, call.worker = call.worker, None
        if call.is_double:
            close_payload(end.payload)
            self._end_double(call)
            self._let_forget(token, worker)
            return
        if end.kind == "unbegun":
            self._take_back(call, token)
            return
        if end.kind == "stale" and worker is not None:
            self.engine.retire(worker, end.message)
        seconds = end.lasted(call.attempt_started, self.clock.wall())
        call.run_seconds += seconds
        self._paces.note(call.request.code, seconds)
        try:
            self._settle_soon(call, token, end, worker)  # the store's thread wakes up meanwhile
        finally:
            if call.spec.stream or not end.is_small or not self.engine.spent(call.id, worker):
                self.engine.ended(call.id)
                self._run_ahead(worker)

    def _settle_soon(self, call: Call, token: AttemptToken, end: AttemptEnd, worker: Worker | None) -> None:
        if isinstance(end.payload, int) or self._keeper.under_way(call) is not None or call.items.problem is not None:
            self._persisting.spawn(self._settle_large(call, token, end, worker))
        else:
            call.result, call.result_kind, call.result_size = Content("", end.payload, None), end.kind, end.size
            self._settle(call, token, end, worker)

    # -- running ahead -------------------------------------------------------------------------------------

    def _run_ahead(self, worker: Worker | None) -> None:
        """Short calls follow one another in a worker without a word from here, and share a commit (docs/decisions/0030)."""
        most = self.limits.ahead_calls
        if worker is None or worker.ahead_count > most // 2 or not worker.is_alive:
            return
        count, left = 0, self.limits.ahead_seconds
        for ticket_id in islice(self.engine.line_behind(worker), most - worker.ahead_count):
            left -= self._expected_seconds(self.calls.get(ticket_id))
            if left < 0:
                break
            count += 1
        if count:
            self.engine.run_ahead(worker, count)

    def _expected_seconds(self, call: Call | None) -> float:
        """Of such a call; infinite where nothing is known, or more than its body is to be reckoned with."""
        if call is None or call.spec.stream or call.request.instance is not None or call.arguments is None:
            return float("inf")
        return self._paces.expected(call.request.code)

    def _take_back(self, call: Call, token: AttemptToken) -> None:
        """Nothing of it ran, so it was no attempt: it waits again, or was cancelled meanwhile."""
        call.status, call.is_ahead = Status.IN_QUEUE, False
        call.attempts -= 1
        call.tries -= 1
        job, number = call.seq, call.tries + 1

        def take_back(db: Statements) -> None:
            db.run("drop_attempt", job=job, number=number)

        self._persisting.store_now(take_back, lambda: self.engine.spool.settle(token))
        if call.stop_requested is not None:
            self.engine.ended(call.id)
            self._end_unbegun(call, call.stop_requested)
        elif not self.engine.returned(call.id, self):
            self._retry_later(call, 0.0)

    async def _settle_large(self, call: Call, token: AttemptToken, end: AttemptEnd, worker: Worker | None) -> None:
        """Items and result are files before anything is told of the end."""
        if await self._is_double(call):  # a file has the job's name
            close_payload(end.payload)
            self._let_forget(token, worker)
            return
        if (items := self._keeper.under_way(call)) is not None:
            await asyncio.wait([items])
        call.result_kind, call.result_size = end.kind, end.size
        try:
            call.result = await self._keep_result(call, end.payload)
        except RemotedError as error:
            call.result_size, by_us = 0, end.stopped_by is Reason.RESULT_LOST
            end = AttemptEnd("unsendable", message=str(error), reason=Reason.RESULT_LOST, stopped_by=None if by_us else end.stopped_by)
        self._settle(call, token, end, worker)

    async def _keep_result(self, call: Call, payload: bytes | int) -> Content:
        try:
            if call.items.problem is not None:
                raise call.items.problem
            if isinstance(payload, bytes):
                return Content("", payload, None)
            self.contents.quotas.take(call.uid, memory_bytes(payload, call.id))
        except RemotedError:
            close_payload(payload)
            raise
        path = self._blobs.result_path(call.id)
        await self._blobs.store_descriptor(call.uid, payload, path)
        return Content("", None, str(path))

    def _settle(self, call: Call, token: AttemptToken, end: AttemptEnd, worker: Worker | None) -> None:
        """Decide, store, tell, in this order; and at the very end let the worker forget."""
        status: Status | None = Status.COMPLETED
        reason: Reason | None = None
        if end.kind != "returned":
            call.attempts -= end.kind == "stale"
            status, reason = verdict(end, call.attempts, call.max_retries, len(call.items))
            call.error, call.error_type, call.traceback = describe(end, status, reason, call.timeout_seconds, len(call.items))
        else:
            call.error = call.error_type = call.traceback = ""
        self.note_construction(call, end)
        then = partial(self._let_forget, token, worker)
        if status is None:
            self._persisting.spawn(self._requeue(call, end, reason, then))
        else:
            self._finish(call, status, reason, self._used(call, end), then)

    def _let_forget(self, token: AttemptToken, worker: Worker | None) -> None:
        if worker is None:  # found after a restart: what it left behind is committed now
            self.engine.spool.settle(token)
        elif worker.is_alive:
            worker.acknowledge(token)

    def _used(self, call: Call, end: AttemptEnd) -> Span | None:
        """Of an attempt that was lost nobody knows when it ended: it is not charged."""
        return None if end.reason is Reason.LOST else call.used_until(self.clock.wall())

    async def _is_double(self, call: Call) -> bool:
        """Of one that began before it was stored that is known once it is."""
        if not call.is_stored:
            await self._persisting.settle()
        return call.is_double

    async def _requeue(self, call: Call, end: AttemptEnd, reason: Reason | None, then: Callable[[], None]) -> None:
        if await self._is_double(call):
            then()
            return
        now, used = self.clock.wall(), Pending()
        if (span := self._used(call, end)) is not None:
            used.add(span)
        charged = used.take()
        row: dict[str, Any] = {"job": call.seq, "state_reason": reason or "", "attempts": call.attempts, "run_seconds": call.run_seconds, "worker": call.worker_id}
        row |= {"gpus": " ".join(call.devices), "started_at": call.started_at, "error": call.error, "error_type": call.error_type, "traceback": call.traceback}
        ended = {"job": call.seq, "number": call.tries, "now": now, "outcome": end.kind, "message": call.error or end.message}

        def requeue(db: Statements) -> None:
            if db.run("end_attempt", **ended):
                charge_all(db, charged)
            if not db.run("requeue_job", **row) and db.one("has_job", seq=call.seq) is None and not call.is_double:
                raise StoreError("cannot store that a job waits again: the job itself is not stored yet")

        await self._persisting.store(requeue)
        if call.is_double:
            then()
            return
        call.status, call.reason = Status.IN_QUEUE, reason
        for watcher in list(call.watchers):
            watcher.on_state(call)
        if call.stop_requested is not None:
            self._finish(call, Status.CANCELLED, call.stop_requested, None, then)
            return
        self.divide_output(call, end)
        self._retry_later(call, 0.0 if end.kind == "stale" else self.limits.retry_pause(call.attempts))
        then()

    def _retry_later(self, call: Call, delay: float) -> None:
        call.retry_timer = asyncio.get_running_loop().call_later(delay, self._queue_again, call)

    def _queue_again(self, call: Call) -> None:
        call.retry_timer = None
        if self.calls.get(call.id) is not call:
            return
        peer = Peer(call.uid, call.uid, 0)
        try:
            call.ticket, policy = self.make_ticket(peer, call.id, call.request, call.spec, call.ticket.ancestors)
        except RemotedError as error:
            self.on_unplaceable(call.id, Reason.LOST, str(error), "")
            return
        self.engine.submit(call.ticket, policy, self)

    def _finish(self, call: Call, status: Status, reason: Reason | None, span: Span | None = None, then: Callable[[], None] = lambda: None) -> None:
        """The one terminal status, stored first. ``then``: once it is and everybody has been told."""
        call.ended_at = self.clock.wall()
        self._finishing += 1
        self._docket.finish(call, status, reason, span, partial(self._finished, status, reason, span, then))

    def _finished(self, status: Status, reason: Reason | None, span: Span | None, then: Callable[[], None], call: Call, error: Exception | None) -> None:
        self._finishing -= 1
        if self.calls.get(call.id) is not call:
            then()
            return
        if error is not None:
            self.engine.ended(call.id)
            self._persisting.again(error, self._finish, call, status, reason, span, then)
            self.tell_state(call)  # its end may be long in coming
            return
        call.status, call.reason = status, reason
        self.completed += 1
        call.log.close()  # its last words are output too
        for watcher in list(call.watchers):
            watcher.on_done(call)
        call.watchers.clear()
        self._turn.soon(partial(self._leave_behind, call, then))

    def _leave_behind(self, call: Call, then: Callable[[], None]) -> None:
        """What nobody waits for, before anything else is heard."""
        self.on_ended(ending_of(call, "queue"))
        self._forget(call)
        if call.children:
            self._cancel_children(call)
        then()

    def add_item(self, call: Call, token: AttemptToken, number: int, payload: bytes | int, size: int) -> None:
        """One item of a stream: stored, numbered, then told."""
        if call.token != token or number != len(call.items) or call.is_double:
            close_payload(payload)
            return
        self._keeper.add(call, number, payload, size)

    def _item_kept(self, call: Call, number: int) -> None:
        if call.request.options.detach:
            self.credit(call, 1)  # nobody has to read along; the store holds what was delivered
        for told, content in call.items.stored(number):
            if call.worker is not None:
                call.worker.forget_item(call.token, told)
            for watcher in list(call.watchers):
                watcher.on_item(call, told, content)

    def on_unplaceable(self, ticket_id: str, reason: Reason, message: str, detail: str) -> None:
        """No worker can be had: that counts as an attempt only where another try might help."""
        call = self.calls.get(ticket_id)
        if call is None:
            return
        call.attempts += reason is Reason.WORKER_START_FAILED
        if reason is Reason.WORKER_START_FAILED and call.attempts <= call.max_retries:
            call.reason = Reason.WAITING_RETRY
            self._retry_later(call, self.limits.retry_pause(call.attempts))
            return
        text = f"{message}\n{detail}".strip()
        call.error, call.result = text, Content("", b"", None)
        self._finish(call, Status.FAILED, reason)

    # -- stopping ------------------------------------------------------------------------------------------

    def cancel(self, call: Call, why: Reason = Reason.CANCELLED) -> None:
        """Stop it, and what it called. A running body gets the ladder of MECHANISMS 13."""
        if call.stop_requested is not None:
            return
        call.stop_requested = why
        self._cancel_children(call)
        if call.worker is not None:
            call.worker.stop(call.token, why)
        elif call.id in self.calls and call.status is Status.IN_QUEUE:
            self.engine.withdraw(call.id)
            self._end_unbegun(call, why)

    def _end_unbegun(self, call: Call, why: Reason) -> None:
        """It was stopped where nothing of it ran."""
        call.error = stopped(why)
        call.result_kind, call.result = "cancelled", Content("", b"", None)
        self._finish(call, Status.CANCELLED, why)

    def _cancel_children(self, call: Call) -> None:
        for child_id in list(call.children):
            child = self.calls.get(child_id)
            if child is not None and not child.request.options.detach:
                self.cancel(child, Reason.PARENT_ENDED)

    # -- after a restart -----------------------------------------------------------------------------------

    def revive(self, row: Row, request: Request, items: list[Content]) -> Call:
        """A live call from its row; queued by the caller of this method."""
        spec = self.contents.spec(row["uid"], request.spec)
        peer = Peer(row["uid"], row["uid"], 0)
        ticket, _ = self.make_ticket(peer, row["id"], request, spec, ())
        call = Call(
            id=row["id"],
            uid=Uid(row["uid"]),
            request=request,
            spec=spec,
            name=row["name"],
            ticket=ticket,
            log=self.new_log(row["id"], row["uid"], is_new=False),
            submitted_at=row["submitted_at"],
            arguments=request.arguments_inline,
            is_stored=True,
            seq=row["seq"],
            attempts=row["all_attempts"],
            tries=row["tries"],
            started_at=row["first_started_at"],
            run_seconds=row["run_seconds"],
            worker_id=WorkerId(row["worker"]),
            items=Items(items),
            caller=row["caller"],
        )
        self.enter(call)
        self._per_uid[call.uid] += 1
        return call

    async def bury(self, row: Row, message: str) -> None:
        """A job from before that can never run here any more ends as FAILED, never silently."""
        now = self.clock.wall()
        end: tuple[Any, ...] = (row["seq"], Status.FAILED.value, Reason.LOST.value, row["all_attempts"], row["worker"], row["gpus"], row["first_started_at"], now)
        end += (row["run_seconds"], None, 0, "died", row["items"], 0, message, "", "")
        await self._persisting.store(lambda db: db.many("finish_jobs", [end]))
        waited = max(0.0, (row["first_started_at"] or now) - row["submitted_at"])
        self.on_ended(
            Ending("queue", row["id"], row["uid"], row["name"], row["pool"], Status.FAILED, Reason.LOST.value, row["all_attempts"], waited, row["run_seconds"], tuple(row["gpus"].split()), row["worker"], 0)
        )

    def queue_revived(self, call: Call) -> None:
        policy = PoolPolicy(call.spec.pool.workers_min, call.spec.pool.workers_max, call.spec.pool.idle_timeout_seconds or 300.0)
        self.engine.submit(call.ticket, policy, self)

    async def settle_begun(self) -> None:
        """Attempts that are being stored are stored and sent."""
        await self._persisting.settle()

    async def close(self) -> None:
        """Outcomes that are being stored are stored."""
        await self._persisting.close(asyncio.get_running_loop().time() + _CLOSE_SECONDS, lambda: self._finishing > 0)
