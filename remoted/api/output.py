"""What a job printed, as a stream: the whole log, or followed to the job's end.

``stream=stdout`` or ``stderr`` gives the bytes as they were printed (application/octet-stream). ``both`` gives the
log's own records in the order of printing (application/x-remoted-log): stream u8 (1 stdout, 2 stderr), length u32
big endian, bytes; a record of stream 3 was not printed: another attempt begins, "2 4" is the second of at most four. ``offset`` counts bytes of such records from the beginning, so a client that comes back goes on
behind the last record that it has read whole. A stream that was cut off lacks its last chunk: it is not an end.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from remoted import logs
from remoted.api import jobs, schemas
from remoted.api.exchange import Ask
from remoted.api.services import Services
from remoted.api.watching import watching
from remoted.calls import Call

_RECORD = struct.Struct("!BI")
_READ_BYTES = 256 * 1024
_WANTED = {"stdout": (logs.STDOUT,), "stderr": (logs.STDERR,), "both": (logs.STDOUT, logs.STDERR, logs.ATTEMPT)}


async def read_logs(services: Services, ask: Ask) -> web.StreamResponse:
    """What the job has printed; with ``follow``, until it ends."""
    query = ask.query_as(schemas.LogsQuery)
    job_id = await jobs.resolve(services, ask)
    kind = "application/x-remoted-log" if query.stream == "both" else "application/octet-stream"
    response = web.StreamResponse(headers={"Content-Type": kind, "X-Remoted-Job": job_id})
    response.enable_chunked_encoding()
    await response.prepare(ask.request)
    async for records in _records(services, job_id, query):
        data = _encode(records, query.stream)
        if data:
            await response.write(data)
    await response.write_eof()
    return response


def _encode(records: list[tuple[int, bytes]], stream: str) -> bytes:
    wanted = [(number, data) for number, data in records if number in _WANTED[stream]]
    if stream == "both":
        return b"".join(_RECORD.pack(number, len(data)) + data for number, data in wanted)
    return b"".join(data for _, data in wanted)


async def _records(services: Services, job_id: str, query: schemas.LogsQuery) -> AsyncIterator[list[tuple[int, bytes]]]:
    call = jobs.live_call(services, job_id)
    path = services.paths.logs / f"{job_id}.log"
    if call is None or not query.follow:
        async for records, _ in _read(path, query.offset):
            yield records
    else:
        async for records in _follow(call, path, query.offset):
            yield records


async def _read(path: Path, offset: int) -> AsyncIterator[tuple[list[tuple[int, bytes]], int]]:
    """Everything that the log holds now, with the offset behind each batch."""
    while True:
        records, offset = await asyncio.to_thread(logs.read_records, path, offset, _READ_BYTES)
        if not records:
            return
        yield records, offset


async def _follow(call: Call, path: Path, offset: int) -> AsyncIterator[list[tuple[int, bytes]]]:
    """A slow reader costs an offset and no memory: it reads the file when it can."""
    with watching(call) as watcher:
        while True:
            over = watcher.is_over  # asked before reading: what comes after it is read in the next round
            watcher.news.clear()
            async for records, behind in _read(path, offset):
                offset = behind
                yield records
            if over:
                return
            if not watcher.is_over:
                await watcher.news.wait()
