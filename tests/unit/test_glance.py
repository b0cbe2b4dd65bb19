"""A reader that looks before it sleeps."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from remoted_client.glance import Glance


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def clock_of(step: float) -> Callable[[], float]:
    """Seconds, so many more at each look at it."""
    return itertools.count(0.0, step).__next__


def rests_of(glance: Glance, looks: int) -> list[int]:
    """How many waits it leaves out after each of so many looks."""
    found = []
    for _ in range(looks):
        for _ in range(glance.rests + 1):
            glance.wait()
        found.append(glance.rests)
    return found


def test_it_looks_ever_more_rarely_where_nothing_comes_and_more_often_again_where_something_does(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    glance = Glance(here, clock=clock_of(60e-6))
    assert rests_of(glance, 8) == [1, 3, 7, 15, 31, 63, 63, 63]
    there.send(b"x")
    assert rests_of(glance, 4) == [15, 3, 0, 0]
    here.recv(1)
    assert rests_of(glance, 1) == [1]


def test_it_leaves_the_core_for_long_to_others_who_want_it(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    glance = Glance(here, clock=clock_of(3e-3))
    assert rests_of(glance, 8) == [15, 45, 105, 225, 465, 945, 1023, 1023]
    there.send(b"x")
    assert rests_of(glance, 2) == [255, 63]


def test_the_end_of_a_connection_is_something_that_has_come(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    glance = Glance(here, clock=clock_of(60e-6))
    there.close()
    assert rests_of(glance, 2) == [0, 0]


def test_it_looks_at_all_of_its_sources_and_as_long_as_it_is_told_to(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    bell = os.eventfd(0)
    glance = Glance(here, bell, seconds=2e-3, clock=clock_of(0.7e-3))
    assert rests_of(glance, 2) == [1, 3]
    os.eventfd_write(bell, 1)
    assert rests_of(glance, 2) == [0, 0]
    os.eventfd_read(bell)
    there.send(b"x")
    assert rests_of(glance, 1) == [0]
    os.close(bell)
