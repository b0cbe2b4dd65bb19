"""What a job prints: kept in order, stdout and stderr apart, byte for byte, up to a cap.

A log is a file of records (stream u8, length u32, bytes). Watchers read it by offset, so a slow one costs a
number and not memory. The cap is told in the log itself; what comes after it is counted, and the count is its last line.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

_RECORD = struct.Struct("!BI")
RECORD_OVERHEAD = _RECORD.size
STDOUT, STDERR = 1, 2
#: No record is larger; what is appended comes in reads of a pipe.
_RECORD_BYTES = 16 << 20


class JobLog:
    """The log of one job, written by the daemon only."""

    def __init__(self, folder: Path, call_id: str, cap_bytes: int, is_new: bool = True, owner: int = -1, take: Callable[[int], str] = lambda size: "") -> None:
        """``owner``: on whose account it is. ``take``: room for so many bytes, or why there is none."""
        self._folder, self._name = folder, f"{call_id}.log"
        self._cap = cap_bytes
        self._owner = owner
        self._take = take
        self._fd: int | None = None
        self.size = 0 if is_new else size_of(self.path)
        self.dropped = 0

    @property
    def path(self) -> Path:
        return self._folder / self._name

    def append(self, stream: int, data: bytes) -> None:
        """Add one record; beyond the cap one notice is added and the rest counted."""
        if self.dropped or self.size + len(data) > self._cap:
            self._drop(len(data), f"output beyond {self._cap} bytes is not kept")
        elif why := self._take(RECORD_OVERHEAD + len(data)):
            self._drop(len(data), f"from here on output is not kept: {why}")
        else:
            self._write(stream, data)

    def _drop(self, count: int, why: str) -> None:
        if not self.dropped:
            self._write(STDERR, f"\n[remoted: {why}]\n".encode())
        self.dropped += count

    def _write(self, stream: int, data: bytes) -> None:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if self._owner >= 0:
                os.fchown(self._fd, self._owner, -1)
        record = _RECORD.pack(stream, len(data)) + data
        try:
            written = os.write(self._fd, record)
        except OSError:  # a full disk must not end the job; the watcher's offset stays right
            written = 0
        if written < len(record):
            os.ftruncate(self._fd, self.size)
            self.dropped += len(data)
            return
        self.size += len(record)

    def close(self) -> None:
        if self.dropped and self._fd is not None:
            self._write(STDERR, f"[remoted: {self.dropped} bytes of output were not kept]\n".encode())
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


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
            if length > _RECORD_BYTES:
                break  # a reader's offset that is no record's beginning
            data = file.read(length)
            if len(data) < length:
                break
            records.append((stream, data))
            taken += RECORD_OVERHEAD + length
            offset += RECORD_OVERHEAD + length
    return records, offset
