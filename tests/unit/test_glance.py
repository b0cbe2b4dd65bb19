"""A reader that looks before it sleeps."""

from __future__ import annotations

import socket

from remoted_client.glance import Glance


def test_it_looks_ever_more_rarely_where_nothing_comes_and_at_once_again_where_something_does() -> None:
    here, there = socket.socketpair()
    with here, there:
        glance = Glance(here)
        seen = []
        for _ in range(40):
            glance.wait()
            seen.append(glance.rests)
        assert seen[:8] == [1, 1, 3, 3, 3, 3, 7, 7], "each look in vain doubles the waits without one"
        there.send(b"x")
        for _ in range(glance.rests + 1):
            glance.wait()
        assert glance.rests == 0
        here.recv(1)
        glance.wait()
        assert glance.rests == 1


def test_the_end_of_a_connection_is_something_that_has_come() -> None:
    here, there = socket.socketpair()
    with here:
        glance = Glance(here)
        there.close()
        glance.wait()
        assert glance.rests == 0


def test_it_never_rests_for_more_than_a_thousand_waits() -> None:
    here, there = socket.socketpair()
    with here, there:
        glance = Glance(here)
        for _ in range(5000):
            glance.wait()
        assert glance.rests == 1023
