"""First attempts that leave for a worker before their jobs are in the store: noted here before that, so that the next daemon puts them there if this one dies (docs/decisions/0099).

A note is written into a file and not brought to the disk: it outlives this process, and a power cut takes it along with the worker, the caller and all that nobody had
been told of. So notes of another boot say nothing. Those of what is stored are written over, and wiped soon: not much later such a job may be forgotten.
What stays of them behind the newer ones holds users' own bytes, so a note that counts has a number that no user can know.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import sqlite3
import struct
import zlib
from pathlib import Path
from typing import Any

from remoted.store import SCHEMA_VERSION, Statements
from remoted_client import wire

log = logging.getLogger(__name__)
_Row = tuple[Any, ...]
#: Generation, bytes of the rows and of the arguments beside them, and a checksum of both.
_HEAD = struct.Struct("=QIII")
_GENERATION_BYTES = 8
_WIPED = bytes(_HEAD.size)
#: Those in the file at once; who finds no room waits for the store.
_FILE_BYTES = 1 << 20
_WIPE_SECONDS = 1.0
#: Where the arguments stand in the row of a job (``add_jobs``).
_ARGUMENTS = 12


class RedoLog:
    """Use from one event loop, but for ``replay``."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._path = path
        self._boot_id = boot_id
        self._fd = -1
        #: All notes that count have the same: those of the one before may still lie behind them.
        self._generation = secrets.randbits(62) + 1
        self._end = self._notes = 0
        self._wiping: asyncio.TimerHandle | None = None
        #: The number of the newest job that was put into the store.
        self.last_seq = 0

    def replay(self, db: Statements) -> None:
        """What is noted and not stored is stored, before anything else."""
        for job, attempt in self._read():
            try:
                if db.many("add_jobs", [job]):
                    db.many("begin_attempts", [attempt])
                    self.last_seq = max(self.last_seq, job[0])
            except sqlite3.IntegrityError as error:  # one keeps no daemon from its start
                log.error("cannot store job %s, which the last daemon had begun: %s", job[1], error)

    def _read(self) -> list[tuple[_Row, _Row]]:
        found: list[tuple[_Row, _Row]] = []
        data = self._path.read_bytes() if self._path.exists() else b""
        first, offset = data[:_GENERATION_BYTES], 0
        while data[offset : offset + _GENERATION_BYTES] == first and len(data) >= offset + _HEAD.size:
            generation, row_bytes, argument_bytes, checksum = _HEAD.unpack_from(data, offset)
            start, middle = offset + _HEAD.size, offset + _HEAD.size + row_bytes
            offset = middle + argument_bytes
            if not generation or offset > len(data) or zlib.crc32(data[start:offset]) != checksum:
                break  # the daemon died over it, and so over the order to the worker behind it
            schema, boot_id, job, attempt = json.loads(data[start:middle])
            if (schema, boot_id) == (SCHEMA_VERSION, self._boot_id):
                job.insert(_ARGUMENTS, data[middle:offset])
                found.append((tuple(job), tuple(attempt)))
        return found

    def open(self) -> None:
        """All that was noted is stored. Raises OSError."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def note(self, job: _Row, attempt: _Row) -> bool:
        """Of a new job and its first attempt, as they will be stored. False: it could not be noted."""
        arguments = job[_ARGUMENTS]
        if self._fd < 0 or arguments is None:
            return False
        try:
            rows = wire.encode_json((SCHEMA_VERSION, self._boot_id, job[:_ARGUMENTS] + job[_ARGUMENTS + 1 :], attempt)).encode()
        except UnicodeEncodeError:  # nor will the store take it
            return False
        content = rows + arguments
        data = _HEAD.pack(self._generation, len(rows), len(arguments), zlib.crc32(content)) + content
        if self._end + len(data) > _FILE_BYTES:
            return False
        try:
            if os.pwrite(self._fd, data, self._end) < len(data):
                return False
        except OSError:  # no room on the disk
            return False
        self._end += len(data)
        self._notes += 1
        return True

    def settle(self) -> None:
        """One of those that are noted is stored."""
        self._notes -= 1
        if self._notes:
            return
        self._generation += 1
        self._end = 0
        if self._wiping is None:
            self._wiping = asyncio.get_running_loop().call_later(_WIPE_SECONDS, self._wipe)

    def _wipe(self) -> None:
        self._wiping = None
        if not self._notes and self._fd >= 0:
            with contextlib.suppress(OSError):  # what is stored is not stored again
                os.pwrite(self._fd, _WIPED, 0)

    def close(self) -> None:
        """Idempotent."""
        if self._wiping is not None:
            self._wiping.cancel()
            self._wipe()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
