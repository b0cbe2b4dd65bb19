"""Segments: what the owner may do, what the receiver sees, what is refused."""

from __future__ import annotations

import gc
import os
import pickle
import struct

import numpy as np
import pytest

from remoted_client.errors import QuotaExceeded
from remoted_client.segments import BadSegment, Collector, Releases, Segment, SegmentPool, unpack


def lend(pool: SegmentPool, *arrays: np.ndarray) -> Segment:
    return pool.pack([pickle.PickleBuffer(array) for array in arrays])


def received(segment: Segment, count: int, releases: Releases) -> list[memoryview]:
    return unpack(os.dup(segment.fd), segment.number, count, releases)


def test_buffers_arrive_as_they_were_and_are_private_to_the_receiver() -> None:
    pool, releases = SegmentPool(), Releases()
    first, second = np.arange(100_000), np.arange(50_001, dtype=np.uint8)
    segment = lend(pool, first, second)
    a, b = (np.frombuffer(part, dtype) for part, dtype in zip(received(segment, 2, releases), (first.dtype, second.dtype), strict=True))
    assert (a == first).all()
    assert (b == second).all()
    a[0] = 99
    again = np.frombuffer(received(segment, 2, releases)[0], first.dtype)
    assert (a[0], again[0], first[0]) == (99, 0, 0)


def test_it_is_free_again_when_the_last_array_is_gone() -> None:
    pool, releases = SegmentPool(), Releases()
    segment = lend(pool, np.zeros(100_000))
    array = np.frombuffer(received(segment, 1, releases)[0])
    view = array[5:]
    del array
    gc.collect()
    assert releases.take() == []
    del view
    gc.collect()
    assert releases.take() == [segment.number]
    pool.take_back(segment.number)
    assert lend(pool, np.ones(1000)) is segment, "a free one is used again"


def test_one_that_is_lent_is_never_filled_again() -> None:
    pool = SegmentPool()
    assert lend(pool, np.zeros(100_000)) is not lend(pool, np.zeros(100_000))


def test_one_that_was_given_up_leaves_the_budget_and_keeps_its_bytes() -> None:
    pool, releases = SegmentPool(), Releases()
    segment = lend(pool, np.full(100_000, 7.0))
    kept = np.frombuffer(received(segment, 1, releases)[0])
    lease(pool, segment)
    pool.leave("peer", is_gone=True)
    assert pool.used_bytes == 0
    assert (kept == 7).all()


def lease(pool: SegmentPool, segment: Segment) -> None:
    """A lease with a peer begins, and the segment goes over it."""
    pool.enter("peer")
    segment.borrower = "peer"


def test_what_a_peer_returns_on_its_next_lease_is_used_again() -> None:
    pool = SegmentPool()
    segment = lend(pool, np.zeros(100_000))
    lease(pool, segment)
    pool.leave("peer", is_gone=False)
    pool.enter("peer")
    pool.take_back(segment.number, "another")
    assert lend(pool, np.ones(100_000)) is not segment, "a stranger's word counts for nothing"
    pool.take_back(segment.number, "peer")
    assert lend(pool, np.ones(100_000)) is segment


def test_peers_without_a_lease_keep_a_limited_amount_from_the_pool() -> None:
    pool = SegmentPool()
    segments = [lend(pool, np.zeros(100 << 17)) for _ in range(3)]
    for segment in segments:
        lease(pool, segment)
        pool.leave("peer", is_gone=False)
    assert pool.used_bytes == 2 * segments[0].capacity, "the oldest was given up"
    pool.take_back(segments[0].number, "peer")
    assert pool.used_bytes == 2 * segments[0].capacity


def test_over_the_budget_what_absent_peers_have_goes_first() -> None:
    pool = SegmentPool(budget_bytes=8 << 20)
    segment = lend(pool, np.zeros(1 << 19))
    lease(pool, segment)
    with pytest.raises(QuotaExceeded):
        lend(pool, np.zeros(1 << 19))
    pool.leave("peer", is_gone=False)
    lend(pool, np.zeros(1 << 19))


def test_over_the_budget_is_a_named_refusal_and_the_next_one_works() -> None:
    pool = SegmentPool(budget_bytes=8 << 20)
    first = lend(pool, np.zeros(1 << 19))
    with pytest.raises(QuotaExceeded, match="8388608"):
        lend(pool, np.zeros(1 << 20))
    pool.take_back(first.number)
    lend(pool, np.zeros(1 << 18))


def test_t21_memory_that_could_shrink_is_not_mapped() -> None:
    """A sender that truncates what the receiver has mapped would kill it with SIGBUS."""
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(BadSegment, match="change its size"):
        unpack(fd, 1, 1, Releases())
    sealed = lend(SegmentPool(), np.zeros(100_000))
    with pytest.raises(PermissionError):
        os.ftruncate(sealed.fd, 0)
    with pytest.raises(PermissionError):
        os.write(sealed.fd, b"x")


def test_t21_a_table_that_points_outside_is_refused() -> None:
    segment = Segment(1, 2 << 20, [])
    segment._map[:16] = struct.pack("=QQ", 4096, 1 << 40)
    with pytest.raises(BadSegment, match="longer than their memory"):
        received(segment, 1, Releases())
    with pytest.raises(BadSegment, match="change its size"):
        received(segment, 1 << 20, Releases())


def test_a_forked_childs_copy_releases_nothing() -> None:
    pool, releases = SegmentPool(), Releases()
    array = np.frombuffer(received(lend(pool, np.zeros(100_000)), 1, releases)[0])
    pid = os.fork()
    if not pid:
        del array
        gc.collect()
        os._exit(len(releases.take()))
    assert os.waitpid(pid, 0)[1] == 0


def test_small_and_scattered_buffers_stay_in_the_pickle() -> None:
    collector = Collector()
    values = [np.zeros(10), np.zeros(100_000), np.zeros((1000, 1000))[::2, ::2], np.asfortranarray(np.ones((500, 500))), np.array([{}, []], dtype=object)]
    data = pickle.dumps(values, 5, buffer_callback=collector)
    assert [buffer.raw().nbytes for buffer in collector.buffers] == [800_000, 2_000_000]
    back = pickle.loads(data, buffers=[bytearray(buffer.raw()) for buffer in collector.buffers])
    assert all((a == b).all() for a, b in zip(values[:4], back[:4], strict=True))
    assert back[3].flags.f_contiguous
