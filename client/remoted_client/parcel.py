"""A payload whose large buffers lie beside its pickle, in one file: who reads it maps the file, and copies nothing.

For calls that pass through the daemon, which stores and hands on the file as it is. On a lease the buffers travel in
segments instead (``segments``), whose pages are used again.

    head:  b"RMPARCEL" | buffers u64 | offset of the pickle u64 | its size u64, then offset and size of each buffer
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import struct

from remoted_client.segments import BadSegment, lay_out, write_at

_MAGIC = b"RMPARCEL"
_HEAD = struct.Struct("=8sQQQ")
_ENTRY = struct.Struct("=QQ")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def pack(pickled: bytes | int, buffers: list[pickle.PickleBuffer]) -> int:
    """A sealed memfd. ``pickled``: bytes, or a descriptor, which is closed here."""
    fd = os.memfd_create("remoted-parcel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        data = pickled if isinstance(pickled, bytes) else _read(pickled)
        parts = [memoryview(data), *(buffer.raw() for buffer in buffers)]
        table, offsets = lay_out(parts, _HEAD.size - _ENTRY.size)
        for offset, part in zip(offsets, parts, strict=True):
            write_at(fd, part, offset)
        write_at(fd, memoryview(_HEAD.pack(_MAGIC, len(buffers), offsets[0], len(data)) + table[_ENTRY.size :]), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def unpack(fd: int) -> tuple[memoryview, list[memoryview]] | None:
    """(pickle, buffers), mapped; None if this is an ordinary payload. The descriptor stays the caller's. Raises BadSegment."""
    head = os.pread(fd, _HEAD.size, 0)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        return None
    _, count, start, length = _HEAD.unpack(head)
    size = os.fstat(fd).st_size
    _require_fixed(fd)
    if _HEAD.size + count * _ENTRY.size > size:
        raise BadSegment("cannot read the payload: its table is longer than its file")
    whole = memoryview(mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))
    entries = [(start, length), *(_ENTRY.unpack_from(whole, _HEAD.size + at * _ENTRY.size) for at in range(count))]
    if any(offset + length > size for offset, length in entries):
        raise BadSegment("cannot read the payload: a part of it is longer than its file")
    pickled, *buffers = (whole[offset : offset + length] for offset, length in entries)
    return pickled, buffers


def _require_fixed(fd: int) -> None:
    """Memory whose size its writer could change would end its reader (SIGBUS, T21); a file is the daemon's own."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return
    if seals & _SEALS != _SEALS:
        raise BadSegment("cannot read the payload: its memory could change its size")


def _read(fd: int) -> bytes:
    with open(fd, "rb") as file:
        file.seek(0)
        return file.read()
