"""What is to be stored of jobs: thousands of rows a second, so those of one turn of the loop go as one statement of each kind.

A job has one when it comes, one for each attempt that begins, one for each item of a stream, and its end. On one page they
are stored in this order; what else is asked of the store meanwhile begins a new page, so nothing overtakes anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

from remoted import turn
from remoted.calls import Admitted, Call
from remoted.errors import StoreError
from remoted.model import Reason, Status
from remoted.redo import RedoLog
from remoted.requests import Request
from remoted.spec import Options
from remoted.store import Statements, Store
from remoted.usage import Pending, Span, charge_all

log = logging.getLogger(__name__)
_Row = tuple[Any, ...]
#: Called once the row is committed, or will not be, with what it is about.
Then = Callable[[Any, Exception | None], None]
_STATEMENTS = ("add_jobs", "begin_attempts", "add_items", "finish_jobs")
_ADD, _BEGIN, _ITEM, _FINISH = range(4)
#: Where the row of a job has it, and that of its end.
_STATUS_OF_JOB, _STATUS_OF_END = 6, 1
#: Where an attempt's row has it.
_TOKEN = 2
#: A worker that waits for its order hears before a client that waits for the end.
_SOONEST_FIRST = (_BEGIN, _ADD, _ITEM, _FINISH)
_COMPLETED = Status.COMPLETED.value  # a look-up of an enum's value is a function call


class AlreadyKnown(Exception):
    """The job was stored before: an acknowledgement was lost, and its client asked again (T61)."""


def job_id(uid: int, key: str) -> str:
    """The same submission of the same user is the same job: its id tells so without another index."""
    return hashlib.sha256(f"{uid}:{key}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


class _Page:
    """Rows of one transaction, each with who waits for it. An ``Operation`` of the store."""

    def __init__(self) -> None:
        self.rows: tuple[list[_Row], ...] = ([], [], [], [])
        self.thens: tuple[list[tuple[Then, Any]], ...] = ([], [], [], [])
        self.spans: list[Span | None] = []
        #: The first of the jobs that are new on it.
        self.first_new = 0
        #: False while it holds nothing but new jobs of which nobody has been told, and their first attempts: a power cut takes them and their callers together.
        self.needs_disk = False
        #: How many of its rows somebody waits for.
        self.awaited = 0
        #: The newest of them, if it came alone and was never submitted before.
        self.fresh: Call | None = None

    @property
    def may_wait(self) -> bool:
        return not self.awaited

    def is_new(self, call: Call) -> bool:
        return 0 < self.first_new <= call.seq

    def run(self, db: Statements) -> set[int]:
        """The places of new jobs that were known."""
        known: set[int] = set()
        #: Their numbers and ids: what else is here of them is left out, for these jobs have had theirs.
        doubles: set[Any] = set()
        for kind, statement, rows in self._steps():
            new = [row for row in rows if row[0] not in doubles] if doubles else rows
            if not new or db.many(statement, new) == len(new):
                continue
            if kind == _ADD:
                known = {place for place, row in enumerate(rows) if _is_other(db, row)}
                doubles = {column for place in known for column in rows[place][:2]}
                if not known and statement != _STATEMENTS[_ADD]:  # it is here already, and its end is not
                    db.many(_STATEMENTS[_FINISH], [end for end in self.rows[_FINISH] if end[0] == rows[0][0]])
            elif kind == _FINISH and any(db.one("has_job", seq=row[0]) is None for row in new):
                raise StoreError("cannot store how a job ended: the job itself is not stored yet")
        used = Pending()
        for row, span in zip(self.rows[_FINISH], self.spans, strict=True):
            if span is not None and row[0] not in doubles:
                used.add(span)
        charge_all(db, used.take())
        return known

    def _steps(self) -> Iterable[tuple[int, str, list[_Row]]]:
        """Each kind of rows with its statement. A single job that is over already is written once."""
        jobs, ends = self.rows[_ADD], self.rows[_FINISH]
        if len(jobs) != 1 or not (ended := [end for end in ends if end[0] == jobs[0][0]]):
            return zip(range(len(_STATEMENTS)), _STATEMENTS, self.rows, strict=True)
        whole = jobs[0][:_STATUS_OF_JOB] + ended[0][_STATUS_OF_END : _STATUS_OF_END + 1] + jobs[0][_STATUS_OF_JOB + 1 :] + ended[0][_STATUS_OF_END + 1 :]
        others = [end for end in ends if end is not ended[0]]
        return ((_ADD, "add_ended_jobs", [whole]), *((kind, _STATEMENTS[kind], self.rows[kind]) for kind in (_BEGIN, _ITEM)), (_FINISH, _STATEMENTS[_FINISH], others))

    def parts(self) -> Sequence[_Page]:
        parts = []
        for kind, rows in enumerate(self.rows):
            for place, row in enumerate(rows):
                part = _Page()
                part.needs_disk, part.awaited = True, 1
                part.rows[kind].append(row)
                part.thens[kind].append(self.thens[kind][place])
                if kind == _FINISH:
                    part.spans.append(self.spans[place])
                parts.append(part)
        return parts

    def settle(self, result: Any) -> None:
        error: Exception | None = None
        known: set[int] = set()
        if isinstance(result, Exception):
            error = result
        else:
            known = result
        for kind in (_ADD, _BEGIN, _ITEM, _FINISH) if known or error else _SOONEST_FIRST:
            for place, (then, about) in enumerate(self.thens[kind]):
                try:
                    then(about, AlreadyKnown() if known and kind == _ADD and place in known else error)
                except Exception:  # one's failure is nobody else's
                    log.exception("cannot go on with what was stored")


def _is_other(db: Statements, row: _Row) -> bool:
    found = db.one("seq_of", id=row[1])
    return found is None or found["seq"] != row[0]


class Docket:
    """Collects; use from the event loop."""

    def __init__(self, store: Store, redo: RedoLog, boot_id: str, again: Callable[..., None]) -> None:
        """``again``: as ``Persisting.again``, for what has begun and must be stored."""
        self._store = store
        self._redo = redo
        self._boot_id = boot_id
        self._again = again
        self._turn = turn.current()
        self._seq = max(store.last_seq, redo.last_seq)
        self._newest = _Page()
        #: Jobs that have begun and that the store does not take. Until it does, nothing begins before it is stored.
        self._untaken: set[int] = set()
        #: Those of the newest call, as they are stored.
        self._options: tuple[Options | None, str] = (None, "")

    def next_seq(self) -> int:
        """In the order in which jobs come; no other daemon numbers them."""
        self._seq += 1
        return self._seq

    def _page(self) -> _Page:
        """One that nothing else has come behind, and that the thread has not been given."""
        if self._store.newest is not self._newest:
            self._newest = _Page()
            self._store.add(self._newest)
        return self._newest

    def _enter(self, kind: int, row: _Row, then: Then, about: Any, needs_disk: bool = True) -> _Page:
        page = self._newest if self._store.newest is self._newest else self._page()
        page.needs_disk |= needs_disk
        page.fresh = None
        page.rows[kind].append(row)
        page.thens[kind].append((then, about))
        self._await(page, 1)
        return page

    def _await(self, page: _Page, count: int) -> None:
        if not page.awaited:
            self._store.hurry()
        page.awaited += count

    def add(self, admitted: Admitted, calls: list[Call], then: Then, needs_disk: bool, is_fresh: bool) -> None:
        """New jobs that were admitted together. ``needs_disk``: is somebody told of them at once? ``is_fresh``: they were never submitted before."""
        request, spec, page = admitted.request, admitted.spec, self._page()
        page.needs_disk |= needs_disk
        page.first_new = page.first_new or calls[0].seq
        # Alone, for what it refers to may be on its way to the store too.
        page.fresh = calls[0] if is_fresh and len(calls) == 1 and not needs_disk and not spec.stream and self._store.has_only(page) else None
        self._await(page, len(calls))
        about = (calls[0].name, f"{spec.function.module}:{spec.function.qualname}", spec.pool.name, Status.IN_QUEUE.value)
        content = (request.spec, request.code, request.modules, request.context, request.arguments)
        options = self._options_of(request)
        for call in calls:
            page.rows[_ADD].append((call.seq, call.id, call.uid, *about, *content, call.arguments, options, request.parent, call.caller, call.submitted_at))
            page.thens[_ADD].append((then, call))

    def _options_of(self, request: Request) -> str:
        if request.options is not self._options[0]:
            self._options = (request.options, request.options.model_dump_json(exclude_defaults=True))
        return _options(self._options[1], request.instance, request.identity)

    def begin(self, call: Call, then: Then) -> None:
        """The newest attempt of a call that has a worker."""
        worker = call.worker
        assert worker is not None
        process = (call.worker_id, worker.pid, worker.born, self._boot_id)
        row = (call.seq, call.tries, call.token, *process, " ".join(call.devices), call.position, call.attempt_started)
        page = self._page()
        if page.fresh is call and not self._untaken and self._redo.note(page.rows[_ADD][-1], row):
            self._begin_noted(page, call, row, then)
        else:
            self._enter(_BEGIN, row, then, call, needs_disk=not page.is_new(call))

    def _begin_noted(self, page: _Page, call: Call, row: _Row, then: Then) -> None:
        """It begins now, and is stored when it ends if that is soon: nobody waits for either row."""
        job, (stored, _) = page.rows[_ADD][-1], page.thens[_ADD][-1]
        page.fresh, page.awaited = None, page.awaited - 1
        page.thens[_ADD][-1] = (partial(self._noted_job_kept, job, stored), call)
        page.rows[_BEGIN].append(row)
        page.thens[_BEGIN].append((partial(self._noted_attempt_kept, row), call))
        self._turn.soon(partial(then, call, None))

    def _noted_job_kept(self, row: _Row, then: Then, call: Call, error: Exception | None) -> None:
        """What has begun is not refused any more."""
        call.is_double = isinstance(error, AlreadyKnown)
        if not isinstance(error, StoreError):
            self._untaken.discard(call.seq)
            then(call, error)
        else:
            self._untaken.add(call.seq)
            self._again(error, self._enter, _ADD, row, partial(self._noted_job_kept, row, then), call)

    def _noted_attempt_kept(self, row: _Row, call: Call, error: Exception | None) -> None:
        if error is None or call.is_double or call.token != row[_TOKEN]:
            self._redo.settle()
        else:
            self._again(error, self._enter, _BEGIN, row, partial(self._noted_attempt_kept, row), call)

    def add_item(self, call: Call, number: int, size: int, inline: bytes | None, then: Then) -> None:
        """One item of a stream."""
        self._enter(_ITEM, (call.id, number, size, inline), then, call)

    def finish(self, call: Call, status: Status, reason: Reason | None, span: Span | None, then: Then) -> None:
        """The one terminal status. ``span``: what its last attempt used."""
        result = call.result
        row = (
            call.seq, _COMPLETED if status is Status.COMPLETED else status.value, reason.value if reason else "", call.attempts, call.worker_id, " ".join(call.devices), call.started_at, call.ended_at,
            call.run_seconds, result.inline if result else None, call.kept_bytes, call.result_kind, len(call.items), int(call.reconstructed),
            call.error, call.error_type, call.traceback,
        )  # fmt: skip
        page = self._page()
        is_put_off = page.may_wait and self._store.puts_off
        page.spans.append(span)
        self._enter(_FINISH, row, then, call)
        if is_put_off:
            self._store.post()  # nothing else is to be expected of this turn, and its thread takes a while to wake up


def _options(options: str, instance: tuple[str, str, str] | None, identity: Any) -> str:
    if instance is None and identity is None:
        return options
    return json.dumps({**json.loads(options), "instance": instance, "identity": identity and astuple(identity)})
