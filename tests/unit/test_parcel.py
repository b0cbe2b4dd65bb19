"""Parcels: a pickle and its large buffers in one file."""

from __future__ import annotations

import fcntl
import os
import pickle
import struct

import numpy as np
import pytest

from remoted_client import parcel
from remoted_client.segments import BadSegment, Collector


def packed(value: object) -> int:
    collector = Collector(1000)
    data = pickle.dumps(value, 5, buffer_callback=collector)
    return parcel.pack(data, collector.buffers)


def unpacked(fd: int) -> object:
    found = parcel.unpack(fd)
    assert found is not None
    return pickle.loads(found[0], buffers=found[1])


def test_values_come_back_with_their_buffers_mapped_and_private() -> None:
    first, second = np.arange(10_000), np.arange(5000.0).reshape(50, 100)
    fd = packed({"a": first, "b": [second, "text"], "small": np.zeros(3)})
    one, two = unpacked(fd), unpacked(fd)
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    assert (one["a"] == first).all()
    assert (one["b"][0] == second).all()
    one["a"][0] = 99
    assert (two["a"][0], first[0]) == (0, 0)
    os.close(fd)


def test_a_pickle_that_lies_in_a_file_itself_is_taken_in() -> None:
    data = pickle.dumps("x" * 200_000)
    inner = os.memfd_create("inner")
    os.write(inner, data)
    array = np.ones(1000)
    fd = parcel.pack(inner, [pickle.PickleBuffer(array)])
    found = parcel.unpack(fd)
    assert found is not None
    assert pickle.loads(found[0]) == "x" * 200_000
    assert bytes(found[1][0]) == array.tobytes()
    assert "inner" not in {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


@pytest.mark.parametrize("data", [b"", b"RM", pickle.dumps([1, 2, 3]), b"\x80" * 100])
def test_an_ordinary_payload_is_none(data: bytes) -> None:
    fd = os.memfd_create("plain")
    os.write(fd, data)
    assert parcel.unpack(fd) is None


@pytest.mark.parametrize(
    ("count", "offset", "size", "says"), [(1 << 60, 32, 0, "table"), (0, 1 << 40, 10, "longer than its file"), (1, 32, 0, "longer than its file"), (0, 32, (1 << 64) - 33, "longer than its file")]
)
def test_t34_a_parcel_that_lies_about_its_parts_is_refused(count: int, offset: int, size: int, says: str) -> None:
    fd = os.memfd_create("lying", os.MFD_ALLOW_SEALING)
    os.write(fd, struct.pack("=8sQQQ", b"RMPARCEL", count, offset, size) + struct.pack("=QQ", 8, 1 << 50))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with pytest.raises(BadSegment, match=says):
        parcel.unpack(fd)


def test_t21_a_parcel_that_could_shrink_is_not_mapped() -> None:
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.write(fd, struct.pack("=8sQQQ", b"RMPARCEL", 0, 32, 0) + bytes(100))
    with pytest.raises(BadSegment, match="change its size"):
        parcel.unpack(fd)
