"""Large buffers between two processes without copying them through Python: memfds that are filled, lent and used again.

The out-of-band buffers of one message (PEP 574) are packed into one segment: a table of offsets and sizes, then the
buffers. The sender keeps it mapped and copies into it; the receiver maps it privately, so its arrays are writable and
what it writes stays its own. A segment is used again once the receiver says that nothing of it is alive there: the
first use of a page costs as much as copying it several times over.

Standard library only; client and worker use the same code.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import pickle
import struct
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

from remoted_client import mappings
from remoted_client.copying import copy
from remoted_client.errors import QuotaExceeded

#: Buffers smaller than this travel in the pickle.
LEAST_BYTES = 32 * 1024
_ENTRY = struct.Struct("=QQ")
_ALIGNMENT = 64
_STEP_BYTES = 2 << 20
#: Free segments that are kept for the next message, in all.
_IDLE_BYTES = 1 << 30
#: Lent segments that are kept for peers without a lease at the moment, who may come back and return them.
_ABSENT_BYTES = 256 << 20
_PEERS_MOST = 64
_MADV_POPULATE_READ = 22  # linux 5.14, include/uapi/asm-generic/mman-common.h
_F_SEAL_FUTURE_WRITE = 0x0010  # linux 5.1, include/uapi/linux/fcntl.h: nobody else may map it writably and shared
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


class BadSegment(Exception):
    """What came is not a segment that can be read safely."""


class Segment:
    """A sealed memfd, mapped by its owner."""

    def __init__(self, number: int, capacity: int, parts: list[memoryview]) -> None:
        """Filled before it is mapped: writing to a new page costs half of faulting it in and copying to it."""
        self.number = number
        self.capacity = capacity
        #: Which peer has it.
        self.borrower = ""
        self._is_populated = False
        self.fd = os.memfd_create("remoted-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, capacity)
            table, offsets = lay_out(parts)
            write_at(self.fd, memoryview(table), 0)
            for offset, part in zip(offsets, parts, strict=True):
                write_at(self.fd, part, offset)
            self._map = mmap.mmap(self.fd, capacity)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise

    def fill(self, parts: list[memoryview]) -> None:
        """For another message. The first time nothing is mapped yet but the range: all at once costs a quarter of a fault for each page."""
        if not self._is_populated:
            self._is_populated = True
            with contextlib.suppress(OSError):
                self._map.madvise(_MADV_POPULATE_READ)
        table, offsets = lay_out(parts)
        with memoryview(self._map) as view:
            view[: len(table)] = table
            for offset, part in zip(offsets, parts, strict=True):
                copy(view[offset : offset + part.nbytes], part)

    def close(self) -> None:
        """Its memory goes when nobody copies into it any more: a thread that Ctrl-C has left behind, or one that is not there in a forked child."""
        os.close(self.fd)
        with contextlib.suppress(BufferError):
            self._map.close()


def lay_out(parts: list[memoryview], head_bytes: int = 0) -> tuple[bytes, list[int]]:
    """The table of offsets and sizes, for behind a head of so many bytes; and where each part lies."""
    table, offsets, end = bytearray(), [], head_bytes + _ENTRY.size * len(parts)
    for part in parts:
        offset = _aligned(end)
        table += _ENTRY.pack(offset, part.nbytes)
        offsets.append(offset)
        end = offset + part.nbytes
    return bytes(table), offsets


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of it."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


class _Peer:
    """A process that this one exchanges segments with, over one lease after another."""

    def __init__(self) -> None:
        self.leases = 0
        self.releases = Releases()


class SegmentPool:
    """The segments that this process owns. Thread-safe.

    A segment stays lent when the lease ends over which it went: its borrower says on the next one that nothing of it
    is alive any more. A result that is dropped a moment too late would otherwise cost the next call all of its pages.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self._lock = threading.Lock()
        self._free: list[Segment] = []
        self._lent: dict[int, Segment] = {}
        self._peers: dict[str, _Peer] = {}
        self._next = 0
        self._making_bytes = 0
        self.budget_bytes = budget_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

    @property
    def used_bytes(self) -> int:
        """All that is mapped, lent or free."""
        return _capacity(self._free) + _capacity(self._lent.values()) + self._making_bytes

    # -- peers ---------------------------------------------------------------------------------------------

    def enter(self, name: str) -> Releases:
        """A lease with this peer begins. Gives what it is to be told of its own segments."""
        with self._lock:
            peer = self._peers.pop(name, None) or _Peer()
            self._peers[name] = peer  # the newest is the last
            peer.leases += 1
            for old in [old for old, known in self._peers.items() if not known.leases][:-_PEERS_MOST]:
                mappings.forget(self._peers.pop(old).releases)
            return peer.releases

    def leave(self, name: str, is_gone: bool) -> None:
        """A lease with it ends. ``is_gone``: what it has is not ours any more, for it will not come back."""
        with self._lock:
            peer = self._peers.get(name)
            if peer is None:
                return
            peer.leases -= 1
            if is_gone and not peer.leases:
                mappings.forget(self._peers.pop(name).releases)
            self._give_up_absent(_ABSENT_BYTES)

    def _give_up_absent(self, most: int) -> None:
        """Of what peers without a lease have, no more than so many bytes are kept; the oldest goes first."""
        here = {name for name, peer in self._peers.items() if peer.leases}
        absent = [segment for segment in self._lent.values() if segment.borrower and segment.borrower not in here]
        excess = _capacity(absent) - most
        for segment in absent:
            if excess <= 0 and segment.borrower in self._peers:
                continue
            excess -= segment.capacity
            self._lent.pop(segment.number).close()  # what is mapped of it elsewhere stays there

    # -- segments ------------------------------------------------------------------------------------------

    def pack(self, buffers: list[pickle.PickleBuffer]) -> Segment:
        """A segment that holds copies of them, lent from now on. Raises QuotaExceeded."""
        parts = [buffer.raw() for buffer in buffers]
        size = _ENTRY.size * len(parts) + sum(part.nbytes + _ALIGNMENT for part in parts)
        segment = self._take_free(size)
        if segment is None:
            return self._make(_rounded(size), parts)
        try:
            segment.fill(parts)
        except BaseException:
            with self._lock:
                del self._lent[segment.number]
            segment.close()  # it may be written into for some time
            raise
        return segment

    def _take_free(self, size: int) -> Segment | None:
        """The smallest that will do."""
        with self._lock:
            fitting = [segment for segment in self._free if segment.capacity >= size]
            if not fitting:
                return None
            segment = min(fitting, key=lambda found: found.capacity)
            self._free.remove(segment)
            self._lent[segment.number] = segment
            return segment

    def _make(self, capacity: int, parts: list[memoryview]) -> Segment:
        with self._lock:
            self._make_room(capacity)
            self._making_bytes += capacity
            self._next += 1
            number = self._next
        try:
            made = Segment(number, capacity, parts)
        finally:
            with self._lock:
                self._making_bytes -= capacity
        with self._lock:
            self._lent[number] = made
        return made

    def _make_room(self, capacity: int) -> None:
        while self._free and self.used_bytes + capacity > self.budget_bytes:
            self._free.pop().close()
        if self.used_bytes + capacity > self.budget_bytes:
            self._give_up_absent(0)
        if self.used_bytes + capacity > self.budget_bytes:
            raise QuotaExceeded(
                f"cannot send {capacity} bytes of arrays: this process may share {self.budget_bytes} bytes with its workers and {_capacity(self._lent.values())} are in use; "
                "wait for calls that are on their way, or send less at once"
            )

    def take_back(self, number: int, borrower: str = "") -> None:
        """Its borrower has nothing of it any more, or nobody ever saw it."""
        with self._lock:
            segment = self._lent.get(number)
            if segment is None or segment.borrower != borrower:
                return
            del self._lent[number]
            segment.borrower = ""
            if _capacity(self._free) + segment.capacity <= _IDLE_BYTES:
                self._free.append(segment)
            else:
                segment.close()

    def forget(self) -> None:
        """In a forked child: they are the parent's."""
        for segment in (*self._free, *self._lent.values()):
            segment.close()
        self._free, self._lent, self._peers, self._lock = [], {}, {}, threading.Lock()


def _capacity(segments: Iterable[Segment]) -> int:
    return sum(segment.capacity for segment in segments)


def _rounded(size: int) -> int:
    return -(-size // _STEP_BYTES) * _STEP_BYTES


class Releases:
    """Numbers of segments that came from one process and of which nothing is alive here any more."""

    def __init__(self) -> None:
        self.is_gone = False
        self._numbers: deque[int] = deque()
        self._pid = os.getpid()

    def add(self, number: int) -> None:
        """Called where a mapping dies: in any thread, at any moment; a forked child's copies mean nothing."""
        if os.getpid() == self._pid:
            self._numbers.append(number)

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def take(self) -> list[int]:
        numbers = []
        while self._numbers:
            numbers.append(self._numbers.popleft())
        return numbers


def unpack(fd: int, number: int, count: int, releases: Releases) -> list[memoryview]:
    """The buffers of a segment, without a copy; the descriptor is closed. Raises BadSegment."""
    try:
        size = os.fstat(fd).st_size
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or size < count * _ENTRY.size:
            raise BadSegment("cannot read the arrays: their memory could change its size")
        whole = mappings.borrow(fd, number, releases)
    except OSError as error:
        raise BadSegment(f"cannot map the arrays: {error}") from error
    finally:
        os.close(fd)
    parts = []
    for index in range(count):
        offset, length = _ENTRY.unpack_from(whole, index * _ENTRY.size)
        if offset + length > size:
            raise BadSegment("cannot read the arrays: they are longer than their memory")
        parts.append(whole[offset : offset + length])
    return parts


class Collector:
    """``buffer_callback`` of a pickler: large buffers stay out of band."""

    def __init__(self, least_bytes: int = LEAST_BYTES) -> None:
        self._least_bytes = least_bytes
        self.buffers: list[pickle.PickleBuffer] = []

    def __call__(self, buffer: pickle.PickleBuffer) -> Any:
        """False keeps the buffer out of the pickle (PEP 574)."""
        try:
            if buffer.raw().nbytes < self._least_bytes:
                return True
        except BufferError:  # not contiguous
            return True
        self.buffers.append(buffer)
        return False


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
