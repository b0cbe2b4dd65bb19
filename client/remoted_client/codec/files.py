"""Files that are none: a sink that drops, and bytes that are read where they lie."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast


class _Null:
    def write(self, data: Any) -> int:
        return len(data)


def null_file() -> BinaryIO:
    """A file that keeps nothing."""
    return cast("BinaryIO", _Null())


def opened(payload: Any) -> Any:
    """A file to read a payload from; files are returned as they are."""
    if isinstance(payload, bytes):
        return io.BytesIO(payload)
    return ByteReader(payload) if isinstance(payload, (bytearray, memoryview)) else payload


class ByteReader:
    """Reads any bytes-like object; ``io.BytesIO`` would copy all but ``bytes``."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size < 0 else self._at + size
        part = bytes(self._data[self._at : end])
        self._at += len(part)
        return part

    def readinto(self, target: Any) -> int:
        part = self._data[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)

    def readline(self) -> bytes:
        end = self._at
        while end < len(self._data) and self._data[end] != 0x0A:
            end += 1
        return self.read(end + 1 - self._at)
