"""After a restart: from the store to a running daemon again.

What a dead daemon left behind is a database, outcome files, and perhaps workers. In user mode a worker that loses
its daemon finishes the body it runs, leaves the outcome in a file and ends (``worker/runtime.py``). So for every
attempt that had begun there are three cases, tried in this order:

1. the outcome file is there: the attempt is over, with that outcome;
2. the worker still runs (same pid, same start time, same boot): it is watched through a pidfd, its devices stay
   lent to it, and when it ends its outcome file is read;
3. neither: the attempt is LOST. It counts, because its body may have begun (MECHANISMS 8).

Only then are queued jobs given to workers, so nothing is lent before everything that still runs is known.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from remoted import logs
from remoted.attempts import AttemptEnd, clean
from remoted.blobs import Blobs
from remoted.calls import Call, Request
from remoted.clock import Clock
from remoted.contents import Contents
from remoted.engine import Engine
from remoted.errors import RemotedError
from remoted.jobs import Jobs
from remoted.model import AttemptToken, DeviceUuid, Reason, Status, WorkerId
from remoted.scheduler import events
from remoted.spawn import reaper
from remoted.spec import parse_options
from remoted.store import Row, Store
from remoted_client import wire

log = logging.getLogger(__name__)
_START_TOLERANCE_SECONDS = 0.011


class Adoption:
    """One use: ``run`` before the sockets are opened."""

    def __init__(self, store: Store, blobs: Blobs, contents: Contents, engine: Engine, jobs: Jobs, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._contents = contents
        self._engine = engine
        self._jobs = jobs
        self._clock = clock

    async def run(self, on_caller: Callable[[Call], None]) -> int:
        """Bring every live job back. ``on_caller`` hears of each job whose caller must still live. Returns how many."""
        rows = await self._store.submit(lambda db: db.all("live_jobs"))
        attempts = {row["job"]: row for row in await self._store.submit(lambda db: db.all("live_attempts"))}
        begun: list[Call] = []
        queued: list[Call] = []
        for row in rows:
            call = await self._revive(row)
            if call is None:
                continue
            on_caller(call)
            (begun if row["id"] in attempts else queued).append(call)
        await asyncio.to_thread(self._blobs.sweep_outcomes, {attempt["token"] for attempt in attempts.values()})
        await self._contents.sweep_secrets()
        # Only now: a call that ends takes the secrets with it that nobody else holds, and all hold theirs by now.
        for call in begun:
            self._resume(call, attempts[call.id])
        for call in queued:
            self._jobs.queue_revived(call)
        return len(rows)

    async def _revive(self, row: Row) -> Call | None:
        request = _request(row)
        digests = {digest for digest in (request.spec, request.code, request.modules, request.arguments) if digest}
        if request.instance is not None:
            digests.add(request.instance[2])
        await self._contents.recover(row["uid"], digests, request.context)
        try:
            return self._jobs.revive(row, request, await self._jobs.records.stored_items(row["id"]))
        except RemotedError as error:
            await self._jobs.bury(row, str(error))
            return None

    def _resume(self, call: Call, attempt: Row) -> None:
        call.token = AttemptToken(attempt["token"])
        call.attempt_started = attempt["started_at"]
        pidfd = self._still_runs(attempt)
        if pidfd is None:
            self._engine.spawn(self._conclude(call))
            return
        worker_id = WorkerId(f"adopted-{attempt['worker']}")
        devices = tuple(DeviceUuid(uuid) for uuid in attempt["devices"].split())
        call.status = Status.IN_PROGRESS
        log.info("job %s still runs in pid %d", call.id, attempt["worker_pid"])
        self._engine.handle(events.WorkerAdopted(worker_id, call.ticket, devices))
        self._engine.spawn(self._watch(call, attempt["worker_pid"], pidfd, worker_id))

    def _still_runs(self, attempt: Row) -> int | None:
        """A pidfd of the attempt's worker if it is that very process."""
        if attempt["boot_id"] != self._clock.boot_id() or self._blobs.outcome_path(attempt["token"]).exists():
            return None
        try:
            pidfd = os.pidfd_open(attempt["worker_pid"])
        except ProcessLookupError:
            return None
        if abs(reaper.started_at(attempt["worker_pid"]) - attempt["worker_started"]) > _START_TOLERANCE_SECONDS:
            os.close(pidfd)
            return None
        return pidfd

    async def _watch(self, call: Call, pid: int, pidfd: int, worker_id: WorkerId) -> None:
        """Until it ends, or its time is over, or it is cancelled."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(pidfd, _set, ended)
        limit = call.timeout_seconds
        remaining = None if limit is None else max(0.0, call.attempt_started + limit - self._clock.wall())
        stopped_by: Reason | None = None
        try:
            while not ended.done():
                await asyncio.wait([ended], timeout=min(0.5, remaining or 0.5) if remaining != 0 else 0)
                if remaining is not None:
                    remaining = max(0.0, call.attempt_started + (limit or 0) - self._clock.wall())
                if not ended.done() and (call.stop_requested or remaining == 0):
                    stopped_by = call.stop_requested or Reason.TIMEOUT
                    await asyncio.to_thread(reaper.kill_descendants, pid)
                    reaper.send(pidfd, 9)
                    await ended
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        self._engine.handle(events.WorkerEnded(worker_id))
        await self._conclude(call, stopped_by)

    async def _conclude(self, call: Call, stopped_by: Reason | None = None) -> None:
        """The attempt is over: as its outcome file says, else as lost. The files go when that is committed."""
        for stream, data in logs.iterate(self._blobs.output_path(call.token)):
            self._jobs.add_output(call, stream, data)
        end = await asyncio.to_thread(read_outcome, self._blobs.outcome_path(call.token), stopped_by) or AttemptEnd(
            "died", message="the daemon was restarted and the worker's outcome is lost", reason=Reason.LOST, stopped_by=stopped_by
        )
        self._jobs.attempt_ended(call, call.token, end)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _request(row: Row) -> Request:
    document = json.loads(row["options"])
    instance = document.pop("instance", None)
    return Request(
        key=row["submission_key"],
        spec=row["spec"],
        code=row["code"],
        modules=row["modules"],
        context=row["context"],
        arguments=row["arguments"],
        arguments_inline=row["arguments_inline"],
        options=parse_options(document),
        parent=row["parent"],
        instance=tuple(instance) if instance else None,
    )


def read_outcome(path: Path, stopped_by: Reason | None) -> AttemptEnd | None:
    """What a worker left behind; None if there is nothing, or nothing whole. The worker is not trusted."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with open(fd, "rb") as file:
        try:
            header = json.loads(file.read(int.from_bytes(file.read(4), "big")))
            size = os.fstat(fd).st_size - file.tell()
            payload = file.read() if size <= wire.INLINE_BYTES else _copied(fd, file.tell(), size)
            return AttemptEnd(
                kind=clean(header["kind"]),
                message=clean(header["message"]),
                error_type=clean(header["error_type"]),
                traceback=clean(header["traceback"]),
                exit_code=header["exit_code"] if isinstance(header["exit_code"], int) else None,
                payload=payload,
                size=size,
                stopped_by=stopped_by,
            )
        except (OSError, ValueError, KeyError, TypeError, MemoryError):
            return None


def _copied(source: int, offset: int, size: int) -> int:
    """A descriptor of the payload alone, as a worker would have sent it."""
    target = wire.memfd("remoted-outcome")
    end = offset + size
    while offset < end and (count := os.sendfile(target, source, offset, min(1 << 30, end - offset))):
        offset += count
    return target


