"""T44: what one user may have on the daemon's disk, and when the oldest of it has to go."""

from __future__ import annotations

import pytest

from remoted.errors import OverLimit
from remoted.limits import Limits, Share
from remoted.quotas import Quotas

ALICE, BOB = 1, 2


def quotas(free: int = 1 << 40, most: int = 1000, **users: Share) -> Quotas:
    limits = Limits(stored_bytes_per_uid=most, users={int(uid[1:]): share for uid, share in users.items()})
    made = Quotas(limits, lambda: free, "/var/lib/remoted")
    made.is_enforced = True
    return made


def test_t44_one_users_limit_is_nobody_elses() -> None:
    found = quotas()
    found.take(ALICE, 1000)

    with pytest.raises(OverLimit, match="you have 1000 bytes here, and your limit stored_bytes_per_uid is 1000"):
        found.take(ALICE, 1)
    found.take(BOB, 1000)
    assert found.wanted.is_set()


def test_t44_a_limit_of_ones_own_has_its_own_name() -> None:
    with pytest.raises(OverLimit, match="your limit stored_bytes is 10;"):
        quotas(u1=Share(stored_bytes=10)).take(ALICE, 11)


def test_t44_nobody_has_more_than_would_be_left_free_for_others() -> None:
    found = quotas(free=600)

    found.take(ALICE, 300)
    with pytest.raises(OverLimit, match="you have 300 bytes there: nobody may have more than is left free for everybody else") as refused:
        found.take(ALICE, 200)
    found.take(BOB, 300)
    assert refused.value.code == "DISK_FULL"


def test_t44_a_full_disk_is_named_with_its_reserve_and_what_to_do() -> None:
    with pytest.raises(OverLimit) as refused:
        quotas(free=-1_000_000).take(ALICE, 922)

    assert refused.value.code == "DISK_FULL"
    assert str(refused.value) == (
        "cannot store 922 bytes: the disk that holds /var/lib/remoted has 66 MB left, of which 67 MB are kept in reserve; free some space there, or ask your administrator to"
    )


def test_t44_a_daemon_of_ones_own_refuses_nothing_and_counts() -> None:
    found = quotas(free=0)
    found.is_enforced = False

    found.take(ALICE, 5000)
    assert found.users() == {ALICE: 5000}
    assert found.left(ALICE) is None


def test_t44_what_comes_while_it_is_measured_is_not_forgotten() -> None:
    found = quotas()
    found.add(ALICE, 100)
    counted = found.counted()
    found.add(ALICE, 30)

    found.measured({ALICE: 90, BOB: 10}, counted)

    assert found.users() == {ALICE: 120, BOB: 10}


def test_t44_who_is_near_the_limit_is_to_lose_a_tenth_of_it() -> None:
    found = quotas()
    found.measured({ALICE: 960, BOB: 899}, {})

    assert found.excess() == {ALICE: 60}


def test_t44_on_a_small_disk_what_one_has_and_what_is_free_are_made_equal_when_he_wants_more() -> None:
    """A disk that others have filled costs nobody what is kept of him."""
    found = quotas(free=100)
    found.measured({ALICE: 500, BOB: 50}, {})
    assert found.excess() == {}

    with pytest.raises(OverLimit):
        found.take(ALICE, 1)
    assert found.excess() == {ALICE: 200}
    found.satisfied()
    assert found.excess() == {}
