"""A system's daemon for a file of tests, with two users who have no account."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.root.system_host import SystemHost, User, system_host


@pytest.fixture(scope="module")
def house() -> Iterator[SystemHost]:
    with system_host() as made:
        yield made.start()


@pytest.fixture
def alice(house: SystemHost) -> User:
    return house.user("alice", 60001, groups=(60001, 60005, 60006))


@pytest.fixture
def bob(house: SystemHost) -> User:
    return house.user("bob", 60002)
