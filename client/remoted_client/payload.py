"""Pickled bytes on their way out: in memory while small, in a memfd from 64 KiB on."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from remoted_client import wire


class PayloadWriter:
    """A writable binary file that moves to a memfd by itself; gigabytes never exist twice in this process."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fd = -1

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._fd < 0 and len(self._buffer) + len(view) <= wire.INLINE_BYTES:
            self._buffer += view
            return len(view)
        if self._fd < 0:
            self._fd = wire.memfd("remoted-arguments", bytes(self._buffer))
            os.lseek(self._fd, 0, os.SEEK_END)
            self._buffer.clear()
        written = 0
        while written < len(view):
            written += os.write(self._fd, view[written:])
        return written

    def finish(self) -> Payload:
        if self._fd < 0:
            return Payload(bytes(self._buffer))
        return FilePayload(self._fd)

    def take(self) -> bytes | int:
        """What was written, inline or as a descriptor that is the caller's from here on."""
        return bytes(self._buffer) if self._fd < 0 else self._fd

    def abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class Payload:
    """Finished bytes: ``inline``, or in a file."""

    fd = -1

    def __init__(self, inline: bytes) -> None:
        self.inline = inline

    @property
    def digest(self) -> str:
        """SHA-256 of what is in the file; "" for inline bytes, which travel with their call."""
        return ""


class FilePayload(Payload):
    """In a memfd that is closed with this object."""

    def __init__(self, fd: int) -> None:
        super().__init__(b"")
        self.fd = fd
        self._digest = ""

    @property
    def digest(self) -> str:
        if not self._digest:
            self._digest = _digest_of(self.fd)
        return self._digest

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _digest_of(fd: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(fd, 1 << 20, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
