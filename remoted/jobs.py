"""Durable calls: acknowledged means stored, and every job reaches exactly one terminal status.

Order is the whole trick (MECHANISMS 8). A submission is committed before it is acknowledged. An attempt, with
its token, is committed before its payload leaves for a worker, in the same commit as the submission when a
worker is free. An outcome is committed before anybody hears of it, and only then may the worker forget it. So a
crash at any point loses no job, runs no token twice, and counts every attempt that may have begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from itertools import islice
from typing import Any

from remoted.access import Peer
from remoted.attempts import AttemptEnd, Content
from remoted.blobs import Blobs
from remoted.calls import Call, CallRunner, Request
from remoted.clock import Clock
from remoted.contents import Contents
from remoted.endings import Ending, ending_of
from remoted.engine import Engine
from remoted.errors import OverLimit, RemotedError, StoreBroken, StoreError
from remoted.items import Items
from remoted.limits import Limits
from remoted.logs import JobLog
from remoted.model import AttemptToken, Reason, Status, Uid, WorkerId
from remoted.paces import Paces
from remoted.paths import Paths
from remoted.records import Records
from remoted.scheduler.state import PoolPolicy
from remoted.store import Row, Statements, Store
from remoted.usage import end_attempt
from remoted.verdicts import describe, stopped, verdict
from remoted.workers import Worker

log = logging.getLogger(__name__)


class Jobs(CallRunner):
    """The use case of queue classes: submit, wait, cancel, retry, result."""

    keeps_outcomes = True

    def __init__(self, engine: Engine, contents: Contents, clock: Clock, limits: Limits, kind_key: bytes, store: Store, blobs: Blobs, paths: Paths) -> None:
        super().__init__(engine, contents, clock, limits, kind_key)
        self.records = Records(store, blobs, paths, clock, limits)
        self._store = store
        self._blobs = blobs
        self._paths = paths
        self._boot_id = clock.boot_id()
        self._by_key: dict[tuple[int, str], asyncio.Future[str]] = {}
        self._per_uid: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._paces = Paces()
        self.completed = 0

    # -- submitting ----------------------------------------------------------------------------------------

    def submit(self, peer: Peer, request: Request, caller: str) -> asyncio.Future[str]:
        """The id, once the job is committed. The same key again gives the same id (T61). Raises Refused."""
        key = (peer.uid, request.key)
        if key not in self._by_key:
            self._by_key[key] = self._accept(peer, request, caller)
            self._by_key[key].add_done_callback(lambda _: self._by_key.pop(key, None))
        return self._by_key[key]

    def _accept(self, peer: Peer, request: Request, caller: str) -> asyncio.Future[str]:
        if self._per_uid[peer.uid] >= self.limits.queued_jobs(peer.uid):
            name = "queued_jobs_per_uid" if self.limits.share(peer.uid).queued_jobs is None else "queued_jobs"
            raise OverLimit("OVER_LIMIT", f"cannot queue another job: your limit {name} is {self.limits.queued_jobs(peer.uid)}; wait for some to end")
        call_id = secrets.token_hex(16)
        call, policy = self.new_call(Call, peer, request, call_id, self.records.log_path(call_id), caller=caller)
        stored = self._store.submit(self._insertion(call))
        accepted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stored.add_done_callback(lambda done: self._stored(call, done, accepted))
        self._adopt_call(call)
        self.engine.submit(call.ticket, policy, self)
        return accepted

    def _insertion(self, call: Call) -> Callable[[Statements], str]:
        request, spec = call.request, call.spec
        row = {
            "id": call.id,
            "uid": call.uid,
            "submission_key": request.key,
            "name": call.name,
            "function": f"{spec.function.module}:{spec.function.qualname}",
            "pool": spec.pool.name,
            "spec": request.spec,
            "code": request.code,
            "modules": request.modules,
            "context": request.context,
            "arguments": request.arguments,
            "arguments_inline": request.arguments_inline,
            "options": json.dumps({**request.options.model_dump(), "instance": request.instance, "identity": request.identity and astuple(request.identity)}),
            "parent": request.parent,
            "caller": call.caller,
            "submitted_at": call.submitted_at,
        }

        def insert(db: Statements) -> str:
            if db.run("add_job", **row):
                return call.id
            earlier = db.one("job_by_key", uid=call.uid, submission_key=request.key)
            assert earlier is not None
            return str(earlier["id"])

        return insert

    def _stored(self, call: Call, done: asyncio.Future[str], accepted: asyncio.Future[str]) -> None:
        """Committed, or refused; or the key was known from before a restart and this call is a double."""
        error = done.exception()
        if error is not None or done.result() != call.id:
            self._forget(call)
        if accepted.cancelled():
            return
        if error is not None:
            accepted.set_exception(error)
            accepted.exception()
        else:
            accepted.set_result(done.result())

    def _adopt_call(self, call: Call) -> None:
        self.enter(call)
        self._per_uid[call.uid] += 1

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
        worker = call.worker
        assert worker is not None
        row: dict[str, Any] = {
            "token": call.token,
            "job": call.id,
            "number": call.tries,
            "worker": call.worker_id,
            "worker_pid": worker.pid,
            "worker_started": worker.born,
            "boot_id": self._boot_id,
            "devices": " ".join(call.devices),
            "position": call.position,
            "now": call.attempt_started,
        }

        def begin(db: Statements) -> None:
            db.run("begin_attempt", **row)
            db.run("mark_running", job=call.id, attempts=call.attempts, worker=row["worker"], devices=row["devices"], now=row["now"])

        self._store.submit(begin).add_done_callback(lambda done: self._begun(call, inline, done))

    def _begun(self, call: Call, inline: bool, done: asyncio.Future[None]) -> None:
        if call.id not in self.calls:
            return
        if done.exception() is None:
            self.run(call, inline)
            if not call.is_ahead:
                self._run_ahead(call.worker)
            return
        # Not stored, so not started: the worker is free, and the job waits for a store that takes it.
        log.error("cannot begin an attempt of %s: %s", call.id, done.exception())
        self.engine.ended(call.id)
        call.attempts -= 1
        call.worker = None
        self._retry_later(call, self.limits.retry_cap_seconds)

    def attempt_ended(self, call: Call, token: AttemptToken, end: AttemptEnd) -> None:
        """A worker's last word about an attempt; an old token's is discarded (T56)."""
        if self.calls.get(call.id) is not call or call.token != token:
            if isinstance(end.payload, int):
                os.close(end.payload)
            return
        worker, call.worker = call.worker, None
        if end.kind == "unbegun":
            self._take_back(call, token)
            return
        if end.kind == "stale" and worker is not None:
            self.engine.retire(worker, end.message)
        seconds = max(0.0, self.clock.wall() - call.attempt_started)
        call.run_seconds += seconds
        self._paces.note(call.request.code, seconds)
        self.engine.ended(call.id)
        self._run_ahead(worker)
        self._spawn(self._settle(call, token, end, worker))

    # -- running ahead -------------------------------------------------------------------------------------

    def _run_ahead(self, worker: Worker | None) -> None:
        """Short calls follow one another in a worker without a word from here, and share a commit (docs/decisions/0030)."""
        most = self.limits.ahead_calls
        if worker is None or not worker.is_alive or worker.ahead_count > most // 2:
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
        if call is None or call.spec.stream or call.request.instance is not None or call.request.arguments_inline is None:
            return float("inf")
        return self._paces.expected(call.request.code)

    def _take_back(self, call: Call, token: AttemptToken) -> None:
        """Nothing of it ran, so it was no attempt: it waits again, or was cancelled meanwhile."""
        call.status, call.is_ahead = Status.IN_QUEUE, False
        call.attempts -= 1
        call.tries -= 1

        def take_back(db: Statements) -> None:
            db.run("drop_attempt", token=token)
            db.run("return_job", job=call.id, attempts=call.attempts)

        self._store_now(take_back, lambda: self.engine.spool.settle(token))
        if call.stop_requested is not None:
            self.engine.ended(call.id)
            self._end_unbegun(call, call.stop_requested)
        elif not self.engine.returned(call.id, self):
            self._retry_later(call, 0.0)

    async def _settle(self, call: Call, token: AttemptToken, end: AttemptEnd, worker: Any) -> None:
        """Decide, store, tell, in this order; and at the very end let the worker forget."""
        try:
            await self._keep_result(call, end)
        except RemotedError as error:
            end = AttemptEnd("unsendable", message=str(error), reason=Reason.RESULT_LOST, stopped_by=end.stopped_by)
        call.attempts -= end.kind == "stale"
        status, reason = verdict(end, call.attempts, call.max_retries, len(call.items))
        call.error, call.error_type, call.traceback = describe(end, status, reason, call.timeout_seconds, len(call.items))
        self.note_construction(call, end)
        if status is None:
            await self._requeue(call, token, end, reason)
        else:
            await self._finish(call, token, end, status, reason)
        if worker is None:  # found after a restart: what it left behind is committed now
            self.engine.spool.settle(token)
        elif worker.is_alive:
            worker.acknowledge(token)

    async def _keep_result(self, call: Call, end: AttemptEnd) -> None:
        call.result_kind, call.result_size = end.kind, end.size
        if isinstance(end.payload, int):
            path = self._blobs.result_path(call.id)
            await self._blobs.store_descriptor(end.payload, path)
            call.result = Content("", None, str(path))
        else:
            call.result = Content("", end.payload, None)

    async def _requeue(self, call: Call, token: AttemptToken, end: AttemptEnd, reason: Reason | None) -> None:
        now = self.clock.wall()

        def requeue(db: Statements) -> None:
            end_attempt(db, call.used_until(now), token, end, call.error or end.message)
            db.run("requeue_job", job=call.id, state_reason=reason or "", run_seconds=now - call.attempt_started, error=call.error, error_type=call.error_type, traceback=call.traceback)

        await self._persist(requeue)
        call.status, call.reason = Status.IN_QUEUE, reason
        for watcher in list(call.watchers):
            watcher.on_state(call)
        if call.stop_requested is not None:
            await self._finish(call, token, end, Status.CANCELLED, call.stop_requested)
        elif end.kind == "stale":
            self._retry_later(call, 0.0)
        else:
            self._retry_later(call, self._back_off(call.attempts))

    def _back_off(self, attempts: int) -> float:
        """Exponential with full jitter on the upper half: two failing jobs do not come back together."""
        full = min(self.limits.retry_cap_seconds, self.limits.retry_base_seconds * 2 ** (attempts - 1))
        return float(full * random.uniform(0.5, 1.0))

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

    async def _finish(self, call: Call, token: AttemptToken, end: AttemptEnd, status: Status, reason: Reason | None) -> None:
        """The one terminal status, stored first."""
        call.ended_at = self.clock.wall()
        result = call.result
        row: dict[str, Any] = {
            "job": call.id,
            "status": status.value,
            "state_reason": reason.value if reason else "",
            "now": call.ended_at,
            "run_seconds": call.run_seconds,
            "result_inline": result.inline if result else None,
            "result_size": call.result_size + sum(len(item.inline or b"") for item in call.items),
            "result_kind": call.result_kind,
            "items": len(call.items),
            "reconstructed": int(call.reconstructed),
            "error": call.error,
            "error_type": call.error_type,
            "traceback": call.traceback,
        }

        def finish(db: Statements) -> None:
            if token:
                end_attempt(db, call.used_until(row["now"]), token, end, call.error)
            db.run("finish_job", **row)

        await self._persist(finish)
        call.status, call.reason = status, reason
        self.completed += 1
        self.on_ended(ending_of(call, "queue"))
        self._forget(call)
        self._cancel_children(call)
        for watcher in list(call.watchers):
            watcher.on_done(call)
        call.watchers.clear()

    def _store_now(self, operation: Callable[[Statements], None], then: Callable[[], None] = lambda: None) -> None:
        """In the store's line before whatever the job does next; again later if it is not taken. ``then``: once it is."""

        def stored(done: asyncio.Future[None]) -> None:
            if done.exception() is None:
                then()
            if isinstance(done.exception(), StoreError) and not isinstance(done.exception(), StoreBroken):
                self._spawn(self._persist(operation))

        self._store.submit(operation).add_done_callback(stored)

    async def _persist(self, operation: Callable[[Statements], None]) -> None:
        """Again and again until the store takes it: an outcome is never dropped because a disk was full."""
        delay = 0.2
        while True:
            try:
                await self._store.submit(operation)
            except StoreBroken:
                raise  # nothing is told and no worker forgets: the next daemon finds what it leaves
            except StoreError as error:
                log.error("%s; trying again in %.1f s", error, delay)
                await asyncio.sleep(delay)
                delay = min(5.0, delay * 2)
            else:
                return

    def add_item(self, call: Call, token: AttemptToken, number: int, payload: bytes | int, size: int) -> None:
        """One item of a stream: stored, numbered, then told."""
        if call.token != token or number != len(call.items):
            if isinstance(payload, int):
                os.close(payload)
            return
        self._spawn(self._keep_item(call, number, payload, size))
        placeholder = Content("", payload, None) if isinstance(payload, bytes) else Content("", None, str(self._blobs.item_path(call.id, number)))
        call.items.add(placeholder)

    async def _keep_item(self, call: Call, number: int, payload: bytes | int, size: int) -> None:
        if isinstance(payload, int):
            await self._blobs.store_descriptor(payload, self._blobs.item_path(call.id, number))
        inline = payload if isinstance(payload, bytes) else None

        def add(db: Statements) -> None:
            db.run("add_item", job=call.id, number=number, size=size, inline=inline)

        await self._persist(add)
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
            self._retry_later(call, self._back_off(call.attempts))
            return
        text = f"{message}\n{detail}".strip()
        call.error, call.result = text, Content("", b"", None)
        self._spawn(self._finish(call, AttemptToken(""), AttemptEnd("died", message=text), Status.FAILED, reason))

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
        self._spawn(self._finish(call, AttemptToken(""), AttemptEnd("cancelled"), Status.CANCELLED, why))

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
            log=JobLog(self.records.log_path(row["id"]), self.limits.log_bytes_per_job),
            submitted_at=row["submitted_at"],
            attempts=row["attempts"],
            tries=row["tries"],
            started_at=row["started_at"],
            run_seconds=row["run_seconds"],
            worker_id=WorkerId(row["worker"]),
            items=Items(items),
            caller=row["caller"],
        )
        self._adopt_call(call)
        return call

    async def bury(self, row: Row, message: str) -> None:
        """A job from before that can never run here any more ends as FAILED, never silently."""
        values = {"result_inline": None, "result_size": 0, "result_kind": "died", "items": row["items"], "reconstructed": 0, "error": message, "error_type": "", "traceback": ""}

        def finish(db: Statements) -> None:
            db.run("finish_job", job=row["id"], status=Status.FAILED.value, state_reason=Reason.LOST.value, now=self.clock.wall(), run_seconds=0.0, **values)

        await self._persist(finish)
        waited = max(0.0, (row["started_at"] or self.clock.wall()) - row["submitted_at"])
        self.on_ended(
            Ending("queue", row["id"], row["uid"], row["name"], row["pool"], Status.FAILED, Reason.LOST.value, row["attempts"], waited, row["run_seconds"], tuple(row["gpus"].split()), row["worker"], 0)
        )

    def queue_revived(self, call: Call) -> None:
        policy = PoolPolicy(call.spec.pool.workers_min, call.spec.pool.workers_max, call.spec.pool.idle_timeout_seconds or 300.0)
        self.engine.submit(call.ticket, policy, self)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the queue failed", exc_info=task.exception())

    async def settle_begun(self) -> None:
        """Attempts that are being stored are stored and sent."""
        with contextlib.suppress(StoreError):
            await self._store.submit(lambda db: None)

    async def close(self) -> None:
        """Outcomes that are being stored are stored."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)
