"""What a job prints: kept in order, stdout and stderr apart, byte for byte, up to a cap.

A log is a file of records (stream u8, length u32, bytes); where a job is tried again, a record says which attempt begins. Watchers read it by offset, so a slow one costs a
number and not memory. The cap is told in the log itself; what comes after it is counted, and the count is its last line.

What comes through a pipe goes from there into the file in one system call, behind a header that says how much it will be:
a daemon that is killed has it in one of the two, and the next one sets the header right (docs/decisions/0067).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from remoted.pipes import Unread

_RECORD = struct.Struct("!BI")
RECORD_OVERHEAD = _RECORD.size
#: ATTEMPT is nothing printed: what stands behind it is of another attempt, "2 4" of the second of at most four.
STDOUT, STDERR, ATTEMPT = 1, 2, 3
_STREAMS = (STDOUT, STDERR, ATTEMPT)
#: No record is larger; what is appended comes in reads of a pipe.
_RECORD_BYTES = 16 << 20
_SCAN_BYTES = 1 << 20


class JobLog:
    """The log of one job, written by the daemon only."""

    def __init__(self, folder: Path, call_id: str, cap_bytes: int, is_new: bool = True, owner: int = -1, take: Callable[[int], str] = lambda size: "") -> None:
        """``owner``: on whose account it is. ``take``: room for so many bytes, or why there is none."""
        self._folder, self._name = folder, f"{call_id}.log"
        self._cap = cap_bytes
        self._owner = owner
        self._take = take
        self._fd: int | None = None
        self.size = 0 if is_new else _mend(self.path)
        self.dropped = 0

    @property
    def path(self) -> Path:
        return self._folder / self._name

    def append(self, stream: int, said: bytes | Unread) -> None:
        """Add one record; beyond the cap one notice is added and the rest counted."""
        size = len(said) if isinstance(said, bytes) else said.size
        if self.dropped or self.size + size > self._cap:
            self._drop(said, f"output beyond {self._cap} bytes is not kept")
        elif why := self._take(RECORD_OVERHEAD + size):
            self._drop(said, f"from here on output is not kept: {why}")
        elif isinstance(said, bytes):
            self._write(stream, said)
        elif not self._move(stream, said):
            self._write(stream, said.data)

    def _drop(self, said: bytes | Unread, why: str) -> None:
        if not self.dropped:
            self._write(STDERR, f"\n[remoted: {why}]\n".encode())
        self.dropped += len(said if isinstance(said, bytes) else said.data)

    def _open(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if self._owner >= 0:
                os.fchown(self._fd, self._owner, -1)
        return self._fd

    def _move(self, stream: int, said: Unread) -> bool:
        """False: it is still in the pipe, and nothing of it is here."""
        promised = said.size
        try:
            file = self._open()
            os.pwrite(file, _RECORD.pack(stream, promised), self.size)
            said.move(file, self.size + RECORD_OVERHEAD)
            if said.size < promised:  # the disk is full; the rest comes again
                os.pwrite(file, _RECORD.pack(stream, said.size), self.size)
        except OSError:
            return False
        self.size += RECORD_OVERHEAD + said.size
        return True

    def _write(self, stream: int, data: bytes) -> None:
        record = _RECORD.pack(stream, len(data)) + data
        try:
            written = os.pwrite(self._open(), record, self.size)
        except OSError:  # a full disk must not end the job; the watcher's offset stays right
            written = 0
        if written == len(record):
            self.size += written
            return
        self.dropped += len(data)
        if self._fd is not None:
            os.ftruncate(self._fd, self.size)

    def cut(self, size: int) -> None:
        """What stands behind ``size`` bytes comes again."""
        if size < self.size:
            os.ftruncate(self._open(), size)
            self.size = size

    def close(self) -> None:
        if self.dropped and self._fd is not None:
            self._write(STDERR, f"[remoted: {self.dropped} bytes of output were not kept]\n".encode())
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _mend(path: Path) -> int:
    """Where the next record belongs. Of the last one there may be less than its header says, or nothing at all."""
    end, records = 0, True
    while records:
        found, end = read_records(path, end, _SCAN_BYTES)
        records = bool(found)
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        left = os.fstat(file).st_size - end - RECORD_OVERHEAD
        stream = os.pread(file, 1, end)
        if left <= 0 or left > _RECORD_BYTES or stream[0] not in _STREAMS:
            os.ftruncate(file, end)
            return end
        os.pwrite(file, _RECORD.pack(stream[0], left), end)
        return end + RECORD_OVERHEAD + left
    finally:
        os.close(file)


def size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def read_records(path: Path, offset: int, limit_bytes: int) -> tuple[list[tuple[int, bytes]], int]:
    """Whole records from ``offset`` up to about ``limit_bytes``, and the offset behind them."""
    records: list[tuple[int, bytes]] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return [], offset
    with file:
        file.seek(offset)
        taken = 0
        while taken < limit_bytes and len(head := file.read(RECORD_OVERHEAD)) == RECORD_OVERHEAD:
            stream, length = _RECORD.unpack(head)
            if length > _RECORD_BYTES or stream not in _STREAMS:
                break  # a reader's offset that is no record's beginning, or what a power cut has left
            data = file.read(length)
            if len(data) < length:
                break
            records.append((stream, data))
            taken += RECORD_OVERHEAD + length
            offset += RECORD_OVERHEAD + length
    return records, offset
