"""The only user of SQLite: one thread, one connection, one transaction for everything that waits.

An operation is acknowledged when its transaction is committed with ``synchronous=FULL`` (measured: NORMAL loses
acknowledged commits at a power cut, reference/security.md section 7), but for what nobody is told of before the next flush
(docs/decisions/0098): what is committed so outlives this process, and the next commit that waits for the disk takes it along. What one turn of the event loop asks for
goes to the thread together, so a map of thousands of calls shares its commits. One connection, EXCLUSIVE: a
second daemon on the same state cannot start, and the WAL-reset bug of SQLite before 3.51.3 needs two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from remoted import turn
from remoted.errors import StartupError, StoreBroken, StoreError
from remoted.tally import commit_histogram

log = logging.getLogger(__name__)
T = TypeVar("T")
Row = sqlite3.Row
SCHEMA_VERSION = 4
#: SQLITE_IOERR_FSYNC and SQLITE_IOERR_DIR_FSYNC.
_FSYNC_FAILED = frozenset({1034, 1290})
#: Rows of one statement, in powers of two: few texts to prepare, and SQLite takes the interpreter's lock once for all of them.
_ROWS_MOST = 256
_STATEMENTS_KEPT = 256
#: One that it works on, and one that it finds when that is done.
_IN_HAND_MOST = 2
#: What nobody waits for is put off so long: it may be done with what comes next.
_HELD_SECONDS = 0.003


def load_statements() -> dict[str, str]:
    """The named statements of ``store.sql``."""
    text = resources.files("remoted").joinpath("store.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


class Statements:
    """The connection, by statement name. Lives in the store's thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._sql = load_statements()
        #: Those of many rows, by name and number of rows.
        self._of_many: dict[tuple[str, int], str] = {}

    def run(self, name: str, /, **values: Any) -> int:
        """Execute; returns how many rows changed."""
        return self._connection.execute(self._sql[name], values).rowcount

    def all(self, name: str, /, **values: Any) -> list[Row]:
        return self._connection.execute(self._sql[name], values).fetchall()

    def one(self, name: str, /, **values: Any) -> Row | None:
        found: Row | None = self._connection.execute(self._sql[name], values).fetchone()
        return found

    def many(self, name: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """The same for many rows, which stand for ``:rows`` in the statement."""
        changed, done = 0, 0
        while done < len(rows):
            count = min(_ROWS_MOST, 1 << ((len(rows) - done).bit_length() - 1))
            sql = self._of_many.get((name, count)) or self._write_out(name, count, len(rows[0]))
            changed += self._connection.execute(sql, list(chain.from_iterable(rows[done : done + count]))).rowcount
            done += count
        return changed

    def _write_out(self, name: str, count: int, width: int) -> str:
        row = f"({', '.join('?' * width)})"
        sql = self._of_many[name, count] = self._sql[name].replace(":rows", ", ".join([row] * count))
        return sql

    def touch(self) -> None:
        """A change that changes nothing."""
        self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def script(self, name: str) -> None:
        self._connection.executescript(self._sql[name])


class Operation(Protocol):
    """What somebody wants done in one transaction. ``settle`` is called on the loop with the result or the error."""

    @property
    def needs_disk(self) -> bool:
        """Must it be on the disk when it is settled? If nothing of the transaction must, that is left to the next flush."""
        ...

    @property
    def may_wait(self) -> bool:
        """Does nobody wait for it? More may be added to it meanwhile (``Store.newest``)."""
        ...

    def run(self, db: Statements, /) -> Any: ...
    def settle(self, result: Any, /) -> None: ...
    def parts(self) -> Sequence[Operation]:
        """What can be done without the rest, if all of it cannot: at least itself."""
        ...


class _Single(Generic[T]):
    """One function, and the future of its result."""

    needs_disk, may_wait = True, False

    def __init__(self, run: Callable[[Statements], T], future: asyncio.Future[T]) -> None:
        self.run = run
        self._future = future

    def parts(self) -> Sequence[Operation]:
        return (self,)

    def settle(self, result: Any) -> None:
        if self._future.cancelled():
            return
        if isinstance(result, Exception):
            self._future.set_exception(result)
            self._future.exception()  # whoever does not look has decided so
        else:
            self._future.set_result(result)


class _Flush:
    """Brings what lies before it to the disk: that takes a transaction that changes something."""

    needs_disk, may_wait = True, False

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def run(self, db: Statements) -> None:
        db.touch()

    def parts(self) -> Sequence[Operation]:
        return (self,)

    def settle(self, result: Any) -> None:
        if not isinstance(result, Exception):
            self._then()


class _Lot(NamedTuple):
    """What one transaction or several have made of a batch."""

    results: list[tuple[Operation, Any]]
    is_on_disk: bool


class Store:
    """Durable state. Use from one event loop; ``close`` from it too."""

    def __init__(self, path: Path, on_broken: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._on_broken = on_broken
        self._broken = ""
        #: Device and inode of what is written, by name.
        self._files: dict[Path, tuple[int, int]] = {}
        self._loop = asyncio.get_running_loop()
        self._turn = turn.current()
        self._pending: list[Operation] = []
        self._is_posting = False
        #: Since when it is put off, by the loop's clock, and the timer that ends that: it may ring too early.
        self._held_at = 0.0
        self._holding: asyncio.TimerHandle | None = None
        #: What was asked for last, as long as it has not gone to the thread: there may be added to it.
        self.newest: Operation | None = None
        #: Lots that the thread has and has not answered.
        self._in_hand = 0
        self._queue: queue.SimpleQueue[list[Operation] | None] = queue.SimpleQueue()
        #: What the thread has done, and how the loop hears of it: its own way to be woken costs twice as much.
        self._done: queue.SimpleQueue[_Lot] = queue.SimpleQueue()
        #: Is anything that was settled not on the disk yet?
        self.is_behind = False
        #: The thread's: does a commit wait for the disk?
        self._waits = True
        self._bell = -1
        self._thread = threading.Thread(target=self._serve, name="store", daemon=True)
        self._opened: asyncio.Future[None] = self._loop.create_future()
        #: The number of the newest job, as it was when the store was opened.
        self.last_seq = 0
        #: How long each transaction took; its thread writes, anybody reads.
        self.commits = commit_histogram()

    async def open(self) -> None:
        """Raises StartupError when another daemon holds the database, or it is corrupt or newer than this code."""
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop.add_reader(self._bell, self._turn.run, self._hear)
        self._thread.start()
        try:
            await self._opened
        except StartupError:
            self._unhang()
            raise

    @property
    def is_in_place(self) -> bool:
        """Do the files that are written still have their names? What is in others the next daemon will not find."""
        return all(_identity(path) == found for path, found in self._files.items())

    def submit(self, operation: Callable[[Statements], T]) -> asyncio.Future[T]:
        """Run in the next transaction. The future holds the result once it is committed, or a StoreError."""
        future: asyncio.Future[T] = self._loop.create_future()
        self.add(_Single(operation, future))
        return future

    def add(self, operation: Operation) -> None:
        """The same without a future."""
        self._pending.append(operation)
        self.newest = operation
        self.hurry()

    def hurry(self) -> None:
        """Somebody waits now for what may have been put off."""
        if not self._is_posting:
            self._is_posting = True
            self._turn.soon(self.post)  # behind all that this turn of the loop brings

    def flush(self, then: Callable[[], None]) -> None:
        """Call it when all that was settled is on the disk, which may be now. Never, if that fails."""
        if self.is_behind:
            self.add(_Flush(then))
        else:
            then()

    def has_only(self, operation: Operation) -> bool:
        """Is nothing else on its way?"""
        return not self._in_hand and self._pending == [operation]

    @property
    def puts_off(self) -> bool:
        """Is everything that was asked for put off?"""
        return bool(self._held_at)

    def post(self) -> None:
        """While the thread has enough to do, what comes is put together: fewer commits, and fewer statements."""
        self._is_posting = False
        if not self._pending or self._in_hand >= _IN_HAND_MOST:
            return
        if all(operation.may_wait for operation in self._pending):
            self._hold()
        else:
            self._hand_over()

    def _hold(self) -> None:
        self._held_at = self._held_at or self._loop.time()
        if self._holding is None:
            self._holding = self._loop.call_at(self._held_at + _HELD_SECONDS, self._turn.run, self._end_hold)

    def _end_hold(self) -> None:
        """Nobody has come for it: whoever asked for it shall hear of it at last, which takes the disk."""
        self._holding = None
        if self._held_at and self._loop.time() - self._held_at < _HELD_SECONDS / 2:
            self._hold()
        elif self._held_at:
            self._pending.append(_Flush(lambda: None))
            self.post()

    def _hand_over(self) -> None:
        pending, self._pending, self._held_at = self._pending, [], 0.0
        self.newest = None
        self._in_hand += 1
        self._queue.put(pending)

    def _hear(self) -> None:
        """The thread has rung, perhaps for several lots."""
        with contextlib.suppress(OSError):  # it rings on
            os.eventfd_read(self._bell)
        self._take()

    def _take(self) -> None:
        """All that the thread has done, which is nothing where somebody has taken it before."""
        while not self._done.empty():  # nobody takes but the loop
            self._in_hand -= 1
            self.post()
            lot = self._done.get()
            self.is_behind = not lot.is_on_disk
            for operation, result in lot.results:
                operation.settle(result)

    async def close(self) -> None:
        """Everything asked for so far is committed first."""
        if self._pending:
            self._hand_over()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._turn.run(self._take)
        self._unhang()

    def _unhang(self) -> None:
        self._loop.remove_reader(self._bell)
        os.close(self._bell)

    # -- the thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            connection = self._connect()
        except (sqlite3.Error, StartupError) as error:
            problem = error if isinstance(error, StartupError) else StartupError(f"cannot open {self._path}: {error}")
            self._loop.call_soon_threadsafe(self._opened.set_exception, problem)
            return
        statements = Statements(connection)
        self.last_seq = int(statements.all("last_seq")[0]["seq"])
        self._loop.call_soon_threadsafe(self._opened.set_result, None)
        while (batch := self._queue.get()) is not None:
            self._done.put(_Lot(self._commit(connection, statements, batch), self._waits))
            self._ring()
        connection.close()

    def _ring(self) -> None:
        try:
            os.eventfd_write(self._bell, 1)
        except OSError:  # nobody may wait for a lot that lies there
            self._loop.call_soon_threadsafe(self._turn.run, self._take)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=1.0, cached_statements=_STATEMENTS_KEPT)
        connection.row_factory = sqlite3.Row
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            connection.close()
            if "locked" in str(error):
                raise StartupError(f"cannot open {self._path}: another daemon uses it") from error
            raise
        self._check(connection)
        self._path.chmod(0o600)
        self._files = {path: found for path in (self._path, self._path.with_name(f"{self._path.name}-wal")) if (found := _identity(path))}
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        """Never repair, never delete: say what is wrong and stop (T52)."""
        verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
        if verdict != "ok":
            raise StartupError(f"cannot use {self._path}: it is damaged ({verdict}); move it away and restore a copy")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StartupError(f"cannot use {self._path}: it was written by a newer remoted (schema {version}, this one knows {SCHEMA_VERSION})")
        if version == 0:
            Statements(connection).script("schema")
        elif version < SCHEMA_VERSION:
            self._migrate(connection, version)
        if version != SCHEMA_VERSION:
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # in the file's head, where an installer reads it

    def _migrate(self, connection: sqlite3.Connection, version: int) -> None:
        """One schema after the other; how it was before stays beside the database (T52)."""
        copy = self._path.with_name(f"{self._path.name}.schema-{version}")
        copy.unlink(missing_ok=True)
        connection.execute("VACUUM INTO ?", (str(copy),))
        copy.chmod(0o600)
        log.warning("the database has schema %d: it is changed to %d, and a copy of it kept as %s", version, SCHEMA_VERSION, copy)
        for step in range(version, SCHEMA_VERSION):
            Statements(connection).script(f"migrate_{step}")
            connection.execute(f"PRAGMA user_version={step + 1}")

    def _commit(self, connection: sqlite3.Connection, statements: Statements, batch: list[Operation]) -> list[tuple[Operation, Any]]:
        """All in one transaction; if one fails, each in its own, so that one's failure is nobody else's."""
        results: list[Any]
        began = time.monotonic()
        try:
            results = self._transact(connection, statements, batch)
        except Exception as error:
            if _lost_an_fsync(error):
                self._break(error)
                results = [self._refusal()] * len(batch)
            elif len(parts := [part for operation in batch for part in operation.parts()]) > 1:
                return [settled for part in parts for settled in self._commit(connection, statements, [part])]
            else:
                results = [_translate(error)]
        self.commits.note(time.monotonic() - began)
        return list(zip(batch, results, strict=True))

    def _transact(self, connection: sqlite3.Connection, statements: Statements, batch: list[Operation]) -> list[Any]:
        if self._broken:
            raise self._refusal()
        if (waits := any(operation.needs_disk for operation in batch)) is not self._waits:
            connection.execute(f"PRAGMA synchronous={'FULL' if waits else 'NORMAL'}")
            self._waits = waits
        connection.execute("BEGIN IMMEDIATE")
        try:
            results = [operation.run(statements) for operation in batch]
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return results

    def _break(self, error: Exception) -> None:
        """After a failed fsync the kernel drops the pages and calls them clean: a second try would succeed and store nothing."""
        self._broken = str(error)
        log.critical("the disk did not keep a change (fsync of %s failed: %s): this daemon stores nothing more and ends; the next one starts from what is on the disk", self._path, error)
        self._loop.call_soon_threadsafe(self._on_broken)

    def _refusal(self) -> StoreBroken:
        return StoreBroken(f"cannot store the change: an fsync failed before ({self._broken}), and the daemon ends")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _lost_an_fsync(error: Exception) -> bool:
    if not isinstance(error, sqlite3.OperationalError):
        return False
    code = getattr(error, "sqlite_errorcode", None)  # Python 3.11
    return code in _FSYNC_FAILED if code is not None else "disk I/O error" in str(error)


def _translate(error: Exception) -> Exception:
    if isinstance(error, sqlite3.Error):
        problem = StoreError(f"cannot store the change: {error}")
        problem.__cause__ = error
        return problem
    return error
