"""Large copies by several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from remoted_client.copying import copy

MIB = 1 << 20


@pytest.mark.parametrize("size", [0, 1, MIB, 16 * MIB - 1, 16 * MIB, 16 * MIB + 1, 100 * MIB + 7])
@pytest.mark.parametrize("cores", [None, 1, 2, 3, 64])
def test_every_byte_arrives_whatever_the_size_and_the_number_of_cores(size: int, cores: int | None) -> None:
    source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros(size + 2, dtype=np.uint8)
    copy(memoryview(target)[1:-1], memoryview(source), cores)
    assert np.array_equal(target[1:-1], source)
    assert target[0] == target[-1] == 0
    assert threading.active_count() == 1


def test_what_cannot_be_written_is_read() -> None:
    source = os.urandom(64) * (MIB // 2)
    target = bytearray(len(source))
    copy(memoryview(target), memoryview(source), 2)
    assert target == source


@pytest.fixture
def no_more_threads() -> Iterator[None]:
    """Their stacks find no room."""
    before = threading.stack_size(1 << 46)
    yield
    threading.stack_size(before)


@pytest.mark.usefixtures("no_more_threads")
def test_without_another_thread_it_is_copied_all_the_same() -> None:
    with pytest.raises(RuntimeError):
        threading.Thread(target=print).start()
    source = os.urandom(64) * (MIB // 2)
    target = bytearray(len(source))
    copy(memoryview(target), memoryview(source), 4)
    assert target == source
