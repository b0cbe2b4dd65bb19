"""What workers leave behind while no daemon is there: outcomes and output, in two files for each worker.

The daemon makes the files before the worker starts and hands over descriptors; the worker never learns their names,
and no folder of the daemon's is open to it. So what is read here is always our own regular file, wherever the worker
ran and whatever it became; only what stands in it is the worker's, and not trusted.

An outcome is a record: length of the head (u32), head (JSON), payload, mark. Without the mark at its end it was not
finished, and is none.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from remoted import logs
from remoted.attempts import AttemptEnd
from remoted.errors import BadRequest
from remoted.model import Reason
from remoted.replies import end_of
from remoted_client import wire

log = logging.getLogger(__name__)
_WORKER = re.compile(r"w[0-9a-f]{1,16}-[0-9]{1,12}")
_LENGTH_BYTES = 4
#: As ``worker/streams.py`` keeps it, with room for the heads of records.
_OUTPUT_BYTES = 80 << 20
_PAGE_BYTES = 64 << 10
#: What an attempt ends with whose worker did.
OVERFULL = "it wrote more into the files in which workers leave outcomes and output than is kept there, or than its user may store"
#: A worker that was given all its calls ahead leaves fewer.
_OUTCOMES = 1024
_T = TypeVar("_T")


class Spool:
    """The files in one folder, named by worker."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        #: Attempts whose outcomes are being read, by worker: the last one takes the files with it.
        self._claims: dict[str, set[str]] = {}

    def open(self, worker: str) -> tuple[int, int]:
        """Descriptors of new files for outcomes and for output; the caller's to close. Raises OSError."""
        outcomes = _create(self.outcomes_path(worker))
        try:
            return outcomes, _create(self.output_path(worker))
        except OSError:
            os.close(outcomes)
            raise

    def outcomes_path(self, worker: str) -> Path:
        return self._folder / f"{_checked(worker)}.outcomes"

    def output_path(self, worker: str) -> Path:
        return self._folder / f"{_checked(worker)}.output"

    def progress_path(self, worker: str) -> Path:
        """How far it has come with what it was given (``progress``)."""
        return self._folder / f"{_checked(worker)}.begun"

    def _place_path(self, worker: str) -> Path:
        return self._folder / f"{_checked(worker)}.place"

    def taken_bytes(self, worker: str) -> int:
        """On the disk, by all of them."""
        return sum(_taken(path) for path in (self.outcomes_path(worker), self.output_path(worker), self.progress_path(worker)))

    def is_overfull(self, worker: str, outcome_bytes: int | None) -> bool:
        """Does a worker without a daemon leave more than an honest one? ``outcome_bytes``: how much its user may still store; None is anything."""
        is_too_much = outcome_bytes is not None and _taken(self.outcomes_path(worker)) > outcome_bytes
        return is_too_much or _taken(self.output_path(worker)) > _OUTPUT_BYTES

    def remove(self, worker: str) -> None:
        """Nobody will ask any more."""
        for path in (self.outcomes_path(worker), self.output_path(worker), self.progress_path(worker), self._place_path(worker)):
            path.unlink(missing_ok=True)

    def sweep(self, live: set[str]) -> None:
        """Drop the files of all other workers."""
        for path in self._folder.iterdir():
            if path.suffix in (".outcomes", ".output", ".begun", ".place") and path.stem not in live:
                path.unlink(missing_ok=True)

    # -- for the next daemon -------------------------------------------------------------------------------

    def claim(self, worker: str, token: str) -> None:
        """This attempt's outcome will be looked for."""
        self._claims.setdefault(worker, set()).add(token)

    def settle(self, token: str) -> None:
        """What became of this attempt is committed."""
        for worker, tokens in list(self._claims.items()):
            tokens.discard(token)
            if not tokens:
                del self._claims[worker]
                self.remove(worker)

    def output(self, worker: str, offset: int) -> tuple[list[tuple[int, bytes]], int]:
        """Some of what was printed while no daemon was there, and where it goes on. An honest worker writes no more than is read."""
        if offset >= _OUTPUT_BYTES:
            return [], offset
        records, end = logs.read_records(self.output_path(worker), offset, _PAGE_BYTES)
        return [(stream, data) for stream, data in records if data and stream in (logs.STDOUT, logs.STDERR)], end

    def place(self, worker: str, log_bytes: int) -> int | None:
        """Where its output belongs in a log that is so long now: where an earlier daemon began that was killed over it. None: there is no more to give."""
        if not self.output_path(worker).exists():
            return None
        path = self._place_path(worker)
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text(encoding="ascii"))
        path.write_text(f"{log_bytes}", encoding="ascii")
        return log_bytes

    def drop_output(self, worker: str) -> None:
        """It is given once."""
        self.output_path(worker).unlink(missing_ok=True)

    def holds(self, worker: str, token: str) -> bool:
        """Is the attempt's outcome there, whole?"""
        return self._look(worker, token, lambda record: True) or False

    def outcome(self, worker: str, token: str, stopped_by: Reason | None) -> AttemptEnd | None:
        """How the attempt ended; None if there is nothing, or nothing whole."""
        return self._look(worker, token, lambda record: record.end(stopped_by))

    def _look(self, worker: str, token: str, read: Callable[[_Record], _T]) -> _T | None:
        try:
            fd = os.open(self.outcomes_path(worker), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            return next((read(record) for record in islice(_records(fd), _OUTCOMES) if record.head.get("attempt") == token), None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, wire.WireError):
            return None
        except Exception:  # whatever stands there: it must keep no daemon from its start
            log.exception("what worker %s has left cannot be read", worker)
            return None
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class _Record:
    fd: int
    head: dict[str, Any]
    offset: int
    size: int

    def end(self, stopped_by: Reason | None) -> AttemptEnd:
        payload = os.pread(self.fd, self.size, self.offset) if self.size <= wire.INLINE_BYTES else _copied(self.fd, self.offset, self.size)
        return end_of(self.head, payload, self.size, stopped_by)


def _records(fd: int) -> Iterator[_Record]:
    """Raises WireError or ValueError at something that is no record; what comes before it counts."""
    end, offset = os.fstat(fd).st_size, 0
    while offset < end:
        length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, offset), "big")
        if length > wire.HEADER_BYTES:
            raise ValueError("the head of an outcome is too long")
        head = wire.parse_header(os.pread(fd, length, offset + _LENGTH_BYTES))
        start, size = offset + _LENGTH_BYTES + length, head["payload_size"]
        if not isinstance(size, int) or not 0 <= size <= end:
            raise ValueError("the payload of an outcome is not in its file")
        offset = start + size + len(wire.OUTCOME_MARK)
        if os.pread(fd, len(wire.OUTCOME_MARK), start + size) == wire.OUTCOME_MARK:
            yield _Record(fd, head, start, size)


def _taken(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _create(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # of a worker long ago that happened to have the same name
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _checked(worker: str) -> str:
    if not _WORKER.fullmatch(worker):
        raise BadRequest("BAD_NAME", f"cannot use {worker[:80]!r} as a name: it is not a worker's")
    return worker


def _copied(source: int, offset: int, size: int) -> int:
    """A descriptor of the payload alone, as a worker would have sent it, with the holes that the file has.

    A file of nothing but a hole may claim any size, and memory shall not be filled with what nobody has written.
    """
    target = wire.memfd("remoted-outcome")
    try:
        os.ftruncate(target, size)
        for start, end in _extents(source, offset, offset + size):
            os.lseek(target, start - offset, os.SEEK_SET)
            while start < end and (count := os.sendfile(target, source, start, min(1 << 30, end - start))):
                start += count
        os.lseek(target, 0, os.SEEK_SET)
    except OSError:
        os.close(target)
        raise
    return target


def _extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What was written of this part of a file."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        hole = os.lseek(fd, start, os.SEEK_HOLE)
        if start < end:
            yield start, min(hole, end)
        start = hole
