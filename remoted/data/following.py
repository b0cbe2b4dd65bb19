"""What happens to calls, told to one client: states, output, items, outcomes, at the pace at which it reads."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from remoted import logs
from remoted.access import Peer
from remoted.attempts import Content
from remoted.calls import Call
from remoted.data.messages import done_word, done_word_of_row
from remoted.data.transport import Transport
from remoted.errors import RemotedError
from remoted.model import Status
from remoted.records import Records

log = logging.getLogger(__name__)
_OUTPUT_CHUNK_BYTES = 48 * 1024
#: Of a call that ends sooner its client hears that alone.
_NEWS_SECONDS = 0.003


class Following:
    """The calls that one client looks at, and which of them are its own. Their ``Watcher``."""

    def __init__(self, transport: Transport, records: Records, peer: Peer) -> None:
        self._transport = transport
        self._records = records
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        #: Does it hear of the end of a call alone that it was accepted? And of which it has not heard yet, with their keys.
        self.folds = False
        self._accepted: dict[str, str] = {}
        self._is_flushing = False
        #: How far into a call's log its reader is.
        self._followed: dict[str, int] = {}
        self._watching: set[Call] = set()
        #: Whose readers have not taken all of the output.
        self._behind: set[Call] = set()
        #: By lease, the newest call that has ended in its log, and where.
        self._marks: dict[str, tuple[int, int]] = {}
        self._mine: set[str] = set()
        #: Calls whose state has changed, and when all this is told.
        self._news: dict[str, Call] = {}
        self._news_timer: asyncio.TimerHandle | None = None
        #: News that found no room: a live call, or None for a job that is over and is read from the store.
        self._late: dict[str, Call | None] = {}
        self._telling_late = False

    def claim(self, call: Call) -> None:
        """This client waits for the call itself, rather than look on."""
        self._mine.add(call.id)

    def owns(self, call: Call) -> bool:
        return call.id in self._mine

    @property
    def own(self) -> list[str]:
        """The ids of the calls that end with this client's process."""
        return list(self._mine)

    def acknowledge(self, call_id: str, key: str, hurry: bool, is_over: bool) -> None:
        """The call is stored. Whoever waits for its end need not be woken for that. ``is_over``: its end is told as soon as that is stored."""
        if hurry or not self.folds:
            self._transport.send_call("accepted", [key, call_id], hurry=hurry)
        else:
            self._accepted[call_id] = key
            if not is_over:
                self._tell_soon()

    def watch(self, call: Call, output: bool, offset: int = 0, is_new: bool = False) -> None:
        """Tell of everything from now on, and of the output from ``offset`` on. Of a new call it is known that it waits, and its end comes by itself."""
        call.watchers.add(self)
        self._watching.add(call)
        if output:
            self._followed[call.id] = offset
            if call.log.size > offset:
                self._pump_output(call)
        if not is_new or (call.ended_at is None and (call.reason is not None or call.status is not Status.IN_QUEUE)):
            self.on_state(call)

    def stop(self) -> None:
        """The client is gone."""
        for call in self._watching:
            call.watchers.discard(self)
        self._watching.clear()
        self._behind.clear()
        self._late.clear()
        self._news.clear()
        self._accepted.clear()

    # -- a watcher -----------------------------------------------------------------------------------------

    def on_state(self, call: Call) -> None:
        self._news[call.id] = call
        self._tell_soon()

    def _tell_soon(self) -> None:
        if self._news_timer is None:
            self._news_timer = self._loop.call_later(_NEWS_SECONDS, self._tell_news)

    def _introduce(self, call_id: str) -> None:
        """The client knows a call by its key until it has heard of the id, which comes before anything else about it."""
        if key := self._accepted.pop(call_id, ""):
            self._transport.send_call("accepted", [key, call_id])

    def _is_untold(self, call: Call) -> bool:
        """Nothing can be told of it yet: that it was accepted is not on the disk. Its output comes then."""
        if call.id not in self._accepted or not self._records.is_behind:
            return False
        self._behind.add(call)
        if not self._is_flushing:
            self._is_flushing = True
            self._records.flush(self._tell_held)
        return True

    def _tell_held(self) -> None:
        self._is_flushing = False
        self._tell_all()
        self.on_room()

    def _tell_news(self) -> None:
        self._news_timer = None
        if self._accepted:
            self._records.flush(self._tell_all)
        else:
            self._tell_all()

    def _tell_all(self) -> None:
        for call_id in list(self._accepted):
            self._introduce(call_id)
        news, self._news = self._news, {}
        for call in news.values():
            self._tell_state(call)

    def _tell_state(self, call: Call) -> None:
        if self._transport.is_full:
            self._late.setdefault(call.id, call)
            return
        reason = call.reason.value if call.reason else ""
        self._transport.send({"op": "state", "id": call.id, "status": call.status.value, "reason": reason, "worker": call.worker_id, **_about_preload(call)})

    def on_output(self, call: Call, stream: int, data: bytes, offset: int) -> None:
        """Straight on when the reader keeps up; else the log is read when it has caught up."""
        if call.id not in self._followed or self._is_untold(call):
            return
        if self._followed[call.id] != offset or not self._transport.has_room_for_output:
            self._behind.add(call)
            return
        if call.log.size == offset + logs.RECORD_OVERHEAD + len(data):
            self._send_output(call, stream, data, call.log.size)
        else:
            self._pump_output(call)

    def on_item(self, call: Call, number: int, content: Content) -> None:
        self._send_item(call.id, number, content)

    def on_mark(self, call: Call, number: int) -> None:
        """What a leased call printed ends here in the log; told once the reader is there."""
        self._marks[call.id] = (number, call.log.size)
        self._tell_mark(call)

    def _tell_mark(self, call: Call) -> None:
        number, end = self._marks.get(call.id, (0, 0))
        if number and self._followed.get(call.id, end) >= end:
            del self._marks[call.id]
            self._transport.send({"op": "printed", "id": call.id, "number": number})

    def on_done(self, call: Call) -> None:
        """Log and result of a direct call are gone after this; a reader that lags behind keeps its own descriptors."""
        result = call.result or Content("", b"", None)
        if self._followed.get(call.id, call.log.size) >= call.log.size:
            self._tell_done(call, result)
            return
        self._introduce(call.id)
        try:
            log_fd = os.open(call.log.path, os.O_RDONLY | os.O_CLOEXEC)
            kept = result._replace(fd=os.dup(result.fd)) if result.fd is not None else result
        except OSError as error:
            log.error("cannot keep the output of %s for its reader: %s", call.id, error)
            self._tell_done(call, result)
            return
        self._loop.create_task(self._finish_output(call, log_fd, kept))

    # -- output --------------------------------------------------------------------------------------------

    def _send_output(self, call: Call, stream: int, data: bytes, behind: int) -> None:
        """One record of the log; ``behind`` is the offset from which a client that comes back goes on."""
        self._followed[call.id] = behind
        self._send_record(call.id, stream, data, behind)
        if call.id in self._marks:
            self._tell_mark(call)

    def _send_record(self, call_id: str, stream: int, data: bytes, behind: int) -> None:
        if stream == logs.ATTEMPT:
            return
        self._introduce(call_id)
        for start in range(0, len(data), _OUTPUT_CHUNK_BYTES):
            last = start + _OUTPUT_CHUNK_BYTES >= len(data)
            header = {"op": "output", "id": call_id, "stream": stream, **({"offset": behind} if last else {})}
            self._transport.send(header, data[start : start + _OUTPUT_CHUNK_BYTES])

    def _pump_output(self, call: Call, path: Path | None = None) -> None:
        """Send what the log holds beyond this reader's offset, as far as there is room."""
        if self._is_untold(call):
            return
        while self._transport.is_open and call.id in self._followed and self._transport.has_room_for_output:
            offset = self._followed[call.id]
            records, _ = logs.read_records(path or call.log.path, offset, _OUTPUT_CHUNK_BYTES)
            if not records:
                return
            for stream, data in records:
                offset += logs.RECORD_OVERHEAD + len(data)
                self._send_output(call, stream, data, offset)
        if self._followed.get(call.id, call.log.size) < call.log.size:
            self._behind.add(call)

    async def _finish_output(self, call: Call, log_fd: int, result: Content) -> None:
        """All of the output comes before the outcome, at the reader's pace."""
        try:
            while self._transport.is_open and self._followed.get(call.id, call.log.size) < call.log.size:
                before = self._followed[call.id]
                self._pump_output(call, Path(f"/proc/self/fd/{log_fd}"))
                if self._followed.get(call.id) == before:
                    if self._transport.is_empty:
                        break
                    await self._transport.drained()
            self._tell_done(call, result)
        finally:
            os.close(log_fd)
            if result.fd is not None:
                os.close(result.fd)

    async def _replay_output(self, job_id: str, offset: int) -> None:
        """What a finished job printed beyond ``offset``, at the reader's pace."""
        path = self._records.log_path(job_id)
        while self._transport.is_open:
            records, end = logs.read_records(path, offset, _OUTPUT_CHUNK_BYTES)
            if not records:
                return
            for stream, data in records:
                offset += logs.RECORD_OVERHEAD + len(data)
                self._send_record(job_id, stream, data, offset)
            offset = end
            if not self._transport.has_room_for_output:
                await self._transport.drained()

    # -- outcomes ------------------------------------------------------------------------------------------

    def _tell_done(self, call: Call, result: Content) -> None:
        self._followed.pop(call.id, None)
        self._marks.pop(call.id, None)
        self._behind.discard(call)
        self._mine.discard(call.id)
        self._watching.discard(call)
        self._late.pop(call.id, None)
        self._news.pop(call.id, None)
        durable = not call.spec.pool.load_balanced
        if durable and self._transport.is_full:
            self._introduce(call.id)
            self._late[call.id] = None
            return
        # A direct result is nowhere else; it takes no more room than its call's arguments did.
        word = done_word(call)
        if key := self._accepted.pop(call.id, ""):
            word["key"] = key
        self._send_done(word, result, bounded=durable)

    async def tell_finished(self, job_id: str, offset: int = 0) -> None:
        """The whole story of a job that was over before anybody here asked."""
        await self._tell_outcome(job_id, partial(self._retell, job_id, offset))

    async def _tell_outcome(self, job_id: str, before: Callable[[], Awaitable[None]] | None = None) -> None:
        """Of a job that is over, as it is stored; who watched it has heard all that came ``before``."""
        try:
            row = await self._records.row(self._peer, job_id)
            if before is not None:
                await before()
        except RemotedError as error:
            self._transport.send({"op": "refused", "about": "watch", "id": job_id, "code": "NOT_FOUND", "message": str(error)})
            return
        self._send_done(done_word_of_row(row), self._records.stored_result(row))

    async def _retell(self, job_id: str, offset: int) -> None:
        await self._replay_output(job_id, offset)
        for number, content in enumerate(await self._records.stored_items(job_id)):
            self._send_item(job_id, number, content)

    def on_room(self) -> None:
        """The client has taken everything: what waited for that comes now."""
        behind, self._behind = self._behind, set()
        for call in behind:
            self._pump_output(call)
        if self._late and not self._telling_late:
            self._loop.create_task(self._tell_late())

    async def _tell_late(self) -> None:
        """Oldest first."""
        self._telling_late = True
        try:
            while self._late and self._transport.is_open and not self._transport.is_full:
                call_id = next(iter(self._late))
                call = self._late.pop(call_id)
                if call is None:
                    await self._tell_outcome(call_id)
                else:
                    self._tell_state(call)
        finally:
            self._telling_late = False

    def _send_done(self, word: dict[str, Any], content: Content, bounded: bool = True) -> None:
        try:
            if content.inline is not None:
                self._transport.send_call("done", word, content.inline, bounded=bounded)
            else:
                self._transport.send_call("done", word, fds=(content.open(),), bounded=bounded)
        except OSError as error:
            self._transport.send_call("done", {**word, "lost": f"cannot read the stored payload: {error}"})

    def _send_item(self, call_id: str, number: int, content: Content) -> None:
        self._introduce(call_id)
        header = {"op": "item", "id": call_id, "number": number}
        try:
            if content.inline is not None:
                self._transport.send(header, content.inline)
            else:
                self._transport.send(header, fds=(content.open(),))
        except OSError as error:
            self._transport.send({**header, "lost": f"cannot read the stored payload: {error}"})


def _about_preload(call: Call) -> dict[str, str]:
    """Why the worker at work has not what its config preloads: its user asked for it, and would not hear of it."""
    born = call.worker.born_as if call.worker is not None and call.spec.pool.preload else None
    return {"no_preload": born.reason} if born is not None and born.reason else {}
