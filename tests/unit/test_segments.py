"""Segments: what the owner may do, what the receiver sees, what is refused."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from remoted_client import mappings
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


def test_a_mapping_is_used_again_and_shows_what_its_owner_has_put_there_since() -> None:
    pool, releases = SegmentPool(), Releases()
    segment = lend(pool, np.full(100_000, 7.0))
    array = np.frombuffer(received(segment, 1, releases)[0])
    place = array.ctypes.data
    assert (array == 7).all()
    del array
    segment.fill([memoryview(np.full(100_000, 8.0)).cast("B")])
    again = np.frombuffer(received(segment, 1, releases)[0])
    assert (again == 8).all()
    assert again.ctypes.data == place


def test_what_was_written_to_an_array_is_not_in_the_next_one() -> None:
    pool, releases = SegmentPool(), Releases()
    segment = lend(pool, np.zeros(1_000_000))
    array = np.frombuffer(received(segment, 1, releases)[0])
    array[500_000] = 99
    del array
    assert not np.frombuffer(received(segment, 1, releases)[0]).any()


def test_no_mapping_is_kept_where_it_would_count_against_a_limit() -> None:
    pool, releases = SegmentPool(), Releases()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    segment = lend(pool, np.zeros(100_000))
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, before[1]))
    try:
        received(segment, 1, releases)
        assert _mapped(segment) == 1, "only its owner has it"
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    received(segment, 1, releases)
    assert _mapped(segment) == 2


def test_of_mappings_that_nobody_uses_only_so_much_is_kept() -> None:
    pool, releases = SegmentPool(), Releases()
    sent = [lend(pool, np.zeros(mappings.KEPT_BYTES // 16, np.uint8)) for _ in range(20)]
    for segment in sent:
        received(segment, 1, releases)
    assert [_mapped(segment) for segment in sent[:4]] == [1] * 4, "the oldest have gone"
    assert _mapped(sent[-1]) == 2


def _mapped(segment: Segment) -> int:
    """How often this process has it in its memory."""
    wanted = os.fstat(segment.fd).st_ino
    return sum(line.split()[4] == str(wanted) for line in Path("/proc/self/maps").read_text().splitlines())


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



def test_a_process_that_is_forked_in_the_middle_of_a_copy_lets_go_of_all_segments() -> None:
    pool, array = SegmentPool(), np.zeros(32 << 20)
    for _ in range(2):
        pool.take_back(lend(pool, array).number)
    pool.take_back(lend(pool, np.zeros(100_000)).number)
    for _ in range(5):
        copying = threading.Thread(target=lambda: pool.take_back(lend(pool, array).number))
        copying.start()
        time.sleep(0.005)
        child = os.fork()
        if child == 0:
            try:
                pool.forget()
            finally:
                os._exit(0 if pool.used_bytes == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        copying.join()
    pool.forget()


def _lend_for_ever(pool: SegmentPool, array: np.ndarray) -> None:
    while True:
        pool.take_back(lend(pool, array).number)


def test_ctrl_c_in_the_middle_of_a_copy_spoils_nothing_that_comes_next() -> None:
    """Threads that still write do so into memory that nobody gets any more."""
    pool, releases, before = SegmentPool(), Releases(), len(os.listdir("/proc/self/fd"))
    one, two = np.full(32 << 20, 1.0), np.full(32 << 20, 2.0)
    pool.take_back(lend(pool, one).number)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for moment in (0.001, 0.005, 0.02):
            signal.setitimer(signal.ITIMER_REAL, moment)
            with pytest.raises(KeyboardInterrupt):
                _lend_for_ever(pool, one)
            segment = lend(pool, two)
            assert (np.frombuffer(received(segment, 1, releases)[0]) == 2).all()
            pool.take_back(segment.number)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    pool.forget()
    mappings.forget(releases)
    del segment
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
