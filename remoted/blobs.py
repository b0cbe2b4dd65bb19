"""Content, results, items and secrets as files: written whole, named by digest or id, never read by the daemon.

Copying happens in threads with sendfile: nothing is mapped, so a peer that truncates its memfd gives a short copy
and no SIGBUS (T21). What was stored is hashed while it is written; a digest that the sender claims is checked.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import shutil
from functools import partial
from pathlib import Path

from remoted.copying import Copying
from remoted.errors import BadRequest, OverLimit, StoreError
from remoted.foreign import is_memory
from remoted.paths import Paths
from remoted.quotas import disk_full

_NAME = re.compile(r"[0-9a-f]{16,64}(\.[0-9]{1,9})?")
_CHUNK_BYTES = 1 << 20


class Blobs:
    """The files below the state directory. Names are checked: nothing but hexadecimal ids gets here (T38)."""

    def __init__(self, paths: Paths, free_disk_reserve_bytes: int) -> None:
        self._paths = paths
        self._reserve = free_disk_reserve_bytes
        self._copying = Copying()

    def content_path(self, uid: int, digest: str) -> Path:
        return self._paths.contents / str(uid) / _checked(digest)

    def secret_path(self, uid: int, digest: str) -> Path:
        return self._paths.secrets / str(uid) / _checked(digest)

    def result_path(self, job: str) -> Path:
        return self._paths.outcomes / f"{_checked(job)}.result"

    def item_path(self, job: str, number: int) -> Path:
        return self._paths.outcomes / f"{_checked(job)}.{number}.item"

    @property
    def place(self) -> str:
        """What names the disk."""
        return os.fspath(self._paths.state)

    def free_bytes(self) -> int:
        """What may still be stored. Raises StoreError."""
        try:
            return shutil.disk_usage(self._paths.state).free - self._reserve
        except OSError as error:
            raise StoreError(f"cannot look at {self._paths.state}: {error.strerror}") from error

    def check_space(self, size: int) -> None:
        """Raises OverLimit when storing ``size`` bytes would leave too little of the disk."""
        free = self.free_bytes()
        if free < size:
            raise disk_full(size, self.place, free, self._reserve)

    async def store_descriptor(self, uid: int, fd: int, target: Path, expected_digest: str | None = None) -> int:
        """Copy this user's descriptor into ``target`` and close it. Returns the size. Raises OverLimit, BadRequest, StoreError."""
        # Shielded: whoever waits may be cancelled, the descriptor is closed all the same.
        return await asyncio.shield(self._copying.do(uid, partial(self._store_descriptor, fd, target, expected_digest)))

    def _store_descriptor(self, fd: int, target: Path, expected_digest: str | None) -> int:
        try:
            size = memory_bytes(fd, target.name)
            self.check_space(size)
            return self._write(target, lambda out: _copy(fd, out, size, expected_digest))
        finally:
            os.close(fd)

    async def store_bytes(self, uid: int, data: bytes, target: Path) -> None:
        await self._copying.do(uid, partial(self.store_bytes_now, data, target))

    def store_bytes_now(self, data: bytes, target: Path) -> None:
        self.check_space(len(data))
        self._write(target, lambda out: os.write(out, data))

    def _write(self, target: Path, fill: object) -> int:
        """tmp + fsync + rename + fsync(dir): the file is there whole or not at all (T49)."""
        part = target.with_name(f"{target.name}.{os.getpid()}.{id(fill):x}.part")
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            out = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                size: int = fill(out)  # type: ignore[operator]
                os.fsync(out)
            finally:
                os.close(out)
            part.rename(target)
            _sync_directory(target.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OverLimit("DISK_FULL", f"cannot store {target.name}: {error.strerror} on the disk that holds {self.place}; free some space there") from error
            raise StoreError(f"cannot store {target.name}: {error}") from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return size

    def remove(self, *paths: Path) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def secrets(self) -> list[tuple[int, str]]:
        """Every secret that lies here, whole or not."""
        return [(int(folder.name), path.name) for folder in self._paths.secrets.iterdir() if folder.name.isdecimal() for path in folder.iterdir()]

    def remove_secret(self, uid: int, name: str) -> None:
        (self._paths.secrets / str(uid) / name).unlink(missing_ok=True)

    def remove_job(self, job: str) -> None:
        """Result, items and leftovers of one job."""
        for path in self._paths.outcomes.glob(f"{_checked(job)}.*"):
            path.unlink(missing_ok=True)


def memory_bytes(fd: int, name: str) -> int:
    """The size of what somebody passed as ``name``. Raises BadRequest, StoreError."""
    if not is_memory(fd):
        raise BadRequest("BAD_CONTENT", f"cannot store {name}: its descriptor is not that of a memfd")
    try:
        return os.fstat(fd).st_size
    except OSError as error:
        raise StoreError(f"cannot store {name}: {error}") from error


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise BadRequest("BAD_NAME", f"cannot use {name[:80]!r} as a name: it is not an id or a digest")
    return name


def _copy(source: int, target: int, size: int, expected_digest: str | None) -> int:
    """sendfile without a digest; read and hash with one. Never more than ``size``: the sender may still write."""
    if expected_digest is None:
        return _sendfile(source, target, size)
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(source, min(_CHUNK_BYTES, size - offset), offset):
        digest.update(chunk)
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
        offset += len(chunk)
    if digest.hexdigest() != expected_digest:
        raise BadRequest("BAD_DIGEST", "cannot store the content: it is not what its digest says")
    return offset


def _sendfile(source: int, target: int, size: int) -> int:
    offset = 0
    while count := os.sendfile(target, source, offset, min(1 << 30, size - offset)):
        offset += count
    return offset


def _sync_directory(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
