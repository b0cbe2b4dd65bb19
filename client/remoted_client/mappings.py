"""What others share with this process, mapped so that it can be written to and stays theirs; and mapped once only.

Mapping a hundred megabytes, reading them and unmapping them costs twice as much as to copy them: a fault for each sixteen
pages, an entry for each page. A segment comes again and again, so its mapping is kept when nothing of it is alive here, and
its pages are those that its owner fills next. But where something was written here a page is a copy of ours: such a mapping
goes.

Standard library only; client and worker use the same code.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import pickle
import resource
from typing import Any, NamedTuple, Protocol

#: Kept in all, for memory that its owner gives up stays for as long as it is mapped somewhere.
KEPT_BYTES = 256 << 20
_PAGE = mmap.PAGESIZE
#: Of the last byte of an entry of /proc/PID/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst): there is a page, it is
#: on a swap device, it is the file's and no copy.
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20



class Lender(Protocol):
    """Whose memory it is."""

    #: Will nothing of it come any more?
    is_gone: bool

    def add(self, number: int) -> None:
        """Nothing of the segment with this number is alive any more; called in whatever thread that happens."""
        ...


class _Place(NamedTuple):
    """What is mapped, and from whom it came."""

    lender: Lender
    device: int
    inode: int
    size: int


#: The newest is the last.
_kept: dict[_Place, mmap.mmap] = {}
os.register_at_fork(after_in_child=_kept.clear)


def borrow(fd: int, number: int, lender: Lender) -> memoryview:
    """All of a segment, for as long as anything of it is alive here. Raises OSError."""
    status = os.fstat(fd)
    place = _Place(lender, status.st_dev, status.st_ino, status.st_size)
    mapping = _kept.pop(place, None) or mmap.mmap(fd, place.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    loan = _loan_of(place.size).from_buffer(mapping)
    loan.place, loan.number, loan.mapping, loan.pid = place, number, mapping, os.getpid()
    return pickle.PickleBuffer(loan).raw()  # what is cut out of it keeps the loan alive too


def forget(lender: Lender) -> None:
    """Nothing of it will come any more: what is still mapped goes when nobody uses it."""
    lender.is_gone = True
    for place in [*_kept]:
        if place.lender is lender:
            _kept.pop(place, None)


@functools.lru_cache(maxsize=64)
def _loan_of(size: int) -> Any:
    """A type of that size that tells when it is gone; of those that share memory and can, only ctypes has one."""
    import ctypes

    class Loan(ctypes.c_ubyte * size):  # type: ignore[misc]
        place: _Place
        number: int
        mapping: mmap.mmap
        pid: int

        def __del__(self) -> None:
            with contextlib.suppress(Exception):  # the interpreter may be ending
                if os.getpid() == self.pid and _may_keep(self.place) and not _was_written(ctypes.addressof(self), self.place.size):
                    _keep(self.place, self.mapping)
            self.place.lender.add(self.number)

    return Loan


def _keep(place: _Place, mapping: mmap.mmap) -> None:
    _kept[place] = mapping
    excess = sum(kept.size for kept in [*_kept]) - KEPT_BYTES
    for old in [*_kept]:
        if excess > 0:
            excess -= old.size
            _kept.pop(old, None)


def _may_keep(place: _Place) -> bool:
    """Not where it would count against what a body may use."""
    return place.size <= KEPT_BYTES and not place.lender.is_gone and all(resource.getrlimit(limit)[0] == resource.RLIM_INFINITY for limit in (resource.RLIMIT_DATA, resource.RLIMIT_AS))


def _was_written(address: int, size: int) -> bool:
    """Has a page become a copy of ours? Raises OSError where that cannot be seen."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        entries = os.pread(pages.fileno(), size // _PAGE * 8, address // _PAGE * 8)
    if len(entries) < size // _PAGE * 8:
        return True
    return any(found & (_PRESENT | _SWAPPED) and not found & _OF_FILE for found in set(entries[7::8]))
