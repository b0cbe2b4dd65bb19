"""T18: how fast one user may ask."""

from __future__ import annotations

import pytest

from remoted.clock import Clock
from remoted.rates import Rate


class Moment(Clock):
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Moment:
    return Moment()


def test_t18_a_seconds_worth_at_once_and_then_as_time_goes(clock: Moment) -> None:
    rate = Rate(lambda: 10, clock)

    assert [rate.admit(1) for _ in range(10)] == [0.0] * 10
    assert rate.admit(1) == pytest.approx(0.1)
    assert rate.admit(1) == pytest.approx(0.1), "who is refused pays nothing"
    assert rate.admit(2) == 0.0, "another user"
    clock.now += 0.125
    assert rate.admit(1) == 0.0
    assert rate.admit(1) == pytest.approx(0.075)
    clock.now += 3600
    assert [rate.admit(1) for _ in range(11)].count(0.0) == 10


def test_t18_what_was_taken_in_any_case_is_waited_for(clock: Moment) -> None:
    rate = Rate(lambda: 100, clock)

    assert rate.owe(1, 100) == 0.0
    assert rate.owe(1, 32) == pytest.approx(0.32)
    clock.now += 0.32
    assert rate.owe(1, 1) == pytest.approx(0.01)


def test_t18_no_limit_costs_nothing_and_remembers_nothing(clock: Moment) -> None:
    rate = Rate(lambda: 0, clock)

    assert (rate.admit(1), rate.owe(1, 10**9)) == (0.0, 0.0)
    assert not rate._left


def test_t18_many_users_cost_little_memory(clock: Moment) -> None:
    rate = Rate(lambda: 10, clock)
    for uid in range(20_000):
        rate.admit(uid)
    assert len(rate._left) <= 4096
