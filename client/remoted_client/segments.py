"""Large buffers between two processes without copying them through Python: memfds that are filled, lent and used again.

The out-of-band buffers of one message (PEP 574) are packed into one segment: a table of offsets and sizes, then the
buffers. The sender keeps it mapped and copies into it; the receiver maps it privately, so its arrays are writable and
what it writes stays its own. A segment is used again once the receiver says that nothing of it is alive there: the
first use of a page costs as much as copying it several times over.

Standard library only; client and worker use the same code.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import struct
import threading
from collections import deque
from typing import Any

from remoted_client.errors import QuotaExceeded

#: Buffers smaller than this travel in the pickle.
LEAST_BYTES = 32 * 1024
_ENTRY = struct.Struct("=QQ")
_ALIGNMENT = 64
_STEP_BYTES = 2 << 20
#: Free segments that are kept for the next message, in all.
_IDLE_BYTES = 1 << 30
_F_SEAL_FUTURE_WRITE = 0x0010  # linux 5.1, include/uapi/linux/fcntl.h: nobody else may map it writably and shared
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


class BadSegment(Exception):
    """What came is not a segment that can be read safely."""


class Segment:
    """A sealed memfd, mapped by its owner."""

    def __init__(self, number: int, capacity: int) -> None:
        self.number = number
        self.capacity = capacity
        self.fd = os.memfd_create("remoted-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, capacity)
            self._map = mmap.mmap(self.fd, capacity)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise

    def fill(self, parts: list[memoryview]) -> None:
        offset = _ENTRY.size * len(parts)
        for index, part in enumerate(parts):
            offset = _aligned(offset)
            _ENTRY.pack_into(self._map, index * _ENTRY.size, offset, part.nbytes)
            with memoryview(self._map) as view:
                view[offset : offset + part.nbytes] = part
            offset += part.nbytes

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


class SegmentPool:
    """The segments that this process owns. Thread-safe."""

    def __init__(self, budget_bytes: int | None = None) -> None:
        self._lock = threading.Lock()
        self._free: list[Segment] = []
        self._lent: dict[int, Segment] = {}
        self._next = 0
        self.budget_bytes = budget_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

    @property
    def used_bytes(self) -> int:
        """All that is mapped, lent or free."""
        return sum(segment.capacity for segment in (*self._free, *self._lent.values()))

    def pack(self, buffers: list[pickle.PickleBuffer]) -> Segment:
        """A segment that holds copies of them, lent from now on. Raises QuotaExceeded."""
        parts = [buffer.raw() for buffer in buffers]
        size = _ENTRY.size * len(parts) + sum(part.nbytes + _ALIGNMENT for part in parts)
        segment = self._take(size)
        try:
            segment.fill(parts)
        except BaseException:
            self.take_back(segment.number)
            raise
        return segment

    def _take(self, size: int) -> Segment:
        with self._lock:
            fitting = [segment for segment in self._free if segment.capacity >= size]
            if fitting:
                segment = min(fitting, key=lambda found: found.capacity)
                self._free.remove(segment)
            else:
                segment = self._make(size)
            self._lent[segment.number] = segment
            return segment

    def _make(self, size: int) -> Segment:
        capacity = -(-size // _STEP_BYTES) * _STEP_BYTES
        while self._free and self.used_bytes + capacity > self.budget_bytes:
            self._free.pop().close()
        if self.used_bytes + capacity > self.budget_bytes:
            lent = sum(segment.capacity for segment in self._lent.values())
            raise QuotaExceeded(
                f"cannot send {size} bytes of arrays: this process may share {self.budget_bytes} bytes with its workers and {lent} are in use; "
                "wait for calls that are on their way, or send less at once"
            )
        self._next += 1
        return Segment(self._next, capacity)

    def take_back(self, number: int) -> None:
        """The receiver has nothing of it any more."""
        with self._lock:
            segment = self._lent.pop(number, None)
            if segment is None:
                return
            if sum(free.capacity for free in self._free) + segment.capacity <= _IDLE_BYTES:
                self._free.append(segment)
            else:
                segment.close()

    def give_up(self, number: int) -> None:
        """The receiver keeps it, or is gone: it is not ours any more. What is mapped there stays there."""
        with self._lock:
            segment = self._lent.pop(number, None)
        if segment is not None:
            segment.close()

    def forget(self) -> None:
        """In a forked child: they are the parent's."""
        for segment in (*self._free, *self._lent.values()):
            segment.close()
        self._free, self._lent, self._lock = [], {}, threading.Lock()


class Releases:
    """Numbers of segments that came from one process and of which nothing is alive here any more."""

    def __init__(self) -> None:
        self._numbers: deque[int] = deque()
        self._pid = os.getpid()

    def add(self, number: int) -> None:
        """Called where a mapping dies: in any thread, at any moment; a forked child's copies mean nothing."""
        if os.getpid() == self._pid:
            self._numbers.append(number)

    def take(self) -> list[int]:
        numbers = []
        while self._numbers:
            numbers.append(self._numbers.popleft())
        return numbers


class _Mapping(mmap.mmap):
    """Tells where it came from that it is gone, with the last array that lives in it."""

    releases: Releases
    number: int

    def __del__(self) -> None:
        self.releases.add(self.number)


def unpack(fd: int, number: int, count: int, releases: Releases) -> list[memoryview]:
    """The buffers of a segment, without a copy; the descriptor is closed. Raises BadSegment."""
    try:
        size = os.fstat(fd).st_size
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or size < count * _ENTRY.size:
            raise BadSegment("cannot read the arrays: their memory could change its size")
        mapping = _Mapping(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise BadSegment(f"cannot map the arrays: {error}") from error
    finally:
        os.close(fd)
    mapping.releases, mapping.number = releases, number
    whole = memoryview(mapping)
    parts = []
    for index in range(count):
        offset, length = _ENTRY.unpack_from(mapping, index * _ENTRY.size)
        if offset + length > size:
            raise BadSegment("cannot read the arrays: they are longer than their memory")
        parts.append(whole[offset : offset + length])
    return parts


class Collector:
    """``buffer_callback`` of a pickler: large buffers stay out of band."""

    def __init__(self) -> None:
        self.buffers: list[pickle.PickleBuffer] = []

    def __call__(self, buffer: pickle.PickleBuffer) -> Any:
        """False keeps the buffer out of the pickle (PEP 574)."""
        try:
            if buffer.raw().nbytes < LEAST_BYTES:
                return True
        except BufferError:  # not contiguous
            return True
        self.buffers.append(buffer)
        return False


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
