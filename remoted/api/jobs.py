"""Jobs: list, show, wait, result, cancel, retry. An id may be given by its beginning.

Another user's job and an unknown one are the same answer from the same code path (T10).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from fnmatch import fnmatchcase

from aiohttp import web

from remoted import retrying
from remoted.api import schemas, views
from remoted.api.exchange import Ask, reply
from remoted.api.services import Services
from remoted.api.watching import watching
from remoted.attempts import Content
from remoted.calls import Call
from remoted.errors import Conflict, NotFound
from remoted.model import Reason, Status

log = logging.getLogger(__name__)
_KIND = re.compile(r"[a-z]{1,20}")
_CHUNK_BYTES = 256 * 1024


async def list_jobs(services: Services, ask: Ask) -> web.StreamResponse:
    """Your jobs, newest first: the live ones, or all that are kept."""
    query = ask.query_as(schemas.JobsQuery)
    wanted = {"status": query.status, "pool": query.pool, "name": query.name}
    rows = await services.jobs.records.rows(ask.peer, query.all, query.limit, after=query.after, **wanted)
    direct = [call for call in services.direct.calls.values() if call.uid == ask.peer.uid and _is_wanted(call, query)]
    found = views.of_many(services, direct, rows)
    found.sort(key=lambda job: job.submitted_at, reverse=True)
    return reply(schemas.Jobs(jobs=found[: query.limit]))


def _is_wanted(call: Call, query: schemas.JobsQuery) -> bool:
    """Direct calls are in no page but the first: they are not in the store."""
    return (
        not query.after
        and (not query.status or call.status.value in query.status.split(","))
        and query.pool in ("", call.spec.pool.name)
        and (not query.name or fnmatchcase(call.name, query.name))
    )


async def show(services: Services, ask: Ask) -> web.StreamResponse:
    """One job with its attempts."""
    return reply(await _detail(services, ask, await resolve(services, ask)))


async def wait(services: Services, ask: Ask) -> web.StreamResponse:
    """One job once it has ended, or as it is after ``timeout`` seconds: ask again then."""
    query = ask.query_as(schemas.WaitQuery)
    job_id = await resolve(services, ask)
    call = live_call(services, job_id)
    if call is not None:
        with watching(call) as watcher, contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(watcher.over.wait(), query.timeout)
    if call is not None and call.id not in services.jobs.calls and job_id not in services.direct.calls:
        # It ended here and now: a direct call has no row to be read again.
        return reply(await _with_attempts(services, views.of_live(services, call), call.traceback))
    return reply(await _detail(services, ask, job_id))


async def result(services: Services, ask: Ask) -> web.StreamResponse:
    """The raw payload of a finished job; only the job's own Python should read it."""
    row = await services.jobs.records.row(ask.peer, await resolve(services, ask))
    if not Status(row["status"]).is_terminal:
        raise Conflict("NOT_FINISHED", f"cannot give the result of {row['id']}: it is {row['status']}; wait for it first")
    kind = row["result_kind"] if _KIND.fullmatch(row["result_kind"]) else "unknown"
    headers = {"X-Remoted-Status": row["status"], "X-Remoted-Kind": kind}
    content = services.jobs.records.stored_result(row)
    if content.inline is not None:
        return web.Response(body=content.inline, headers=headers, content_type="application/octet-stream")
    return await _send_file(ask, content, headers, row["id"])


async def _send_file(ask: Ask, content: Content, headers: dict[str, str], job_id: str) -> web.StreamResponse:
    try:
        fd = await asyncio.to_thread(content.open)
    except OSError:
        raise NotFound("NO_RESULT", f"cannot give the result of {job_id}: it ended without one") from None
    try:
        response = web.StreamResponse(headers={**headers, "Content-Type": "application/octet-stream"})
        response.content_length = os.fstat(fd).st_size
        await response.prepare(ask.request)
        while chunk := await asyncio.to_thread(os.read, fd, _CHUNK_BYTES):
            await response.write(chunk)
        await response.write_eof()
    finally:
        os.close(fd)
    return response


async def cancel(services: Services, ask: Ask) -> web.StreamResponse:
    """Ask for the end of a job: interrupt, then TERM, then KILL within ten seconds."""
    job_id = await resolve(services, ask)
    call = live_call(services, job_id)
    if call is None:
        row = await services.jobs.records.row(ask.peer, job_id)
        return reply(schemas.Asked(id=job_id, status=row["status"], cancelling=False))
    (services.direct if job_id in services.direct.calls else services.jobs).cancel(call)
    return reply(schemas.Asked(id=job_id, status=call.status.value, cancelling=True))


async def end(services: Services, ask: Ask) -> web.StreamResponse:
    """An administrator asks for the end of anybody's live job. What it was given, printed and returned stays its owner's."""
    call = _anybodys(services, ask.parameters["id"])
    (services.direct if call.id in services.direct.calls else services.jobs).cancel(call, Reason.ADMINISTRATOR)
    log.info("job %s of uid %d is cancelled by uid %d", call.id, call.uid, ask.peer.uid)
    return reply(schemas.Asked(id=call.id, status=call.status.value, cancelling=True))


def _anybodys(services: Services, prefix: str) -> Call:
    """Raises NotFound, Conflict AMBIGUOUS."""
    found = [call for runner in (services.jobs, services.direct) for call in runner.calls.values() if prefix and call.id.startswith(prefix)]
    if len(found) > 1:
        raise Conflict("AMBIGUOUS", f"cannot choose: several users' jobs begin with {prefix[:80]}")
    if not found:
        raise NotFound("NOT_FOUND", f"cannot find job {prefix[:80]!r}: nobody has a live job with this id")
    return found[0]


async def retry(services: Services, ask: Ask) -> web.StreamResponse:
    """Submit a finished job again as a new one, in the environment given here."""
    job_id = await resolve(services, ask)
    new_id = await retrying.retry(services.jobs, ask.peer, job_id, ask.body_as(schemas.RetryBody).environ)
    return reply(schemas.Retried(id=new_id, retry_of=job_id))


async def resolve(services: Services, ask: Ask) -> str:
    """The full id of the path's job. Raises NotFound, Conflict AMBIGUOUS."""
    prefix = ask.parameters["id"]
    direct = [call.id for call in services.direct.calls.values() if call.uid == ask.peer.uid and call.id.startswith(prefix)]
    return direct[0] if len(direct) == 1 else await services.jobs.records.resolve(ask.peer, prefix)


def live_call(services: Services, job_id: str) -> Call | None:
    """A live call of either kind, by an id that ``resolve`` gave."""
    return services.jobs.calls.get(job_id) or services.direct.calls.get(job_id)


async def _detail(services: Services, ask: Ask, job_id: str) -> schemas.JobDetail:
    call = live_call(services, job_id)
    if call is not None:
        return await _with_attempts(services, views.of_live(services, call), call.traceback)
    row = await services.jobs.records.row(ask.peer, job_id)
    return await _with_attempts(services, views.of_row(row), row["traceback"])


async def _with_attempts(services: Services, job: schemas.Job, traceback: str) -> schemas.JobDetail:
    rows = await services.jobs.records.attempts(job.id)
    return schemas.JobDetail(**job.model_dump(), traceback=traceback, attempt_list=[views.of_attempt(row) for row in rows])
