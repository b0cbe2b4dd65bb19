"""Attempts that are over and of which the scheduler is told later."""

from __future__ import annotations

import pytest

from remoted.spent import Spent


def test_each_is_told_once_in_order_however_many_there_are_and_whoever_asks_meanwhile() -> None:
    told = []

    def tell(ticket_id: str) -> None:
        spent.discard(ticket_id)
        told.append(ticket_id)
        spent.tell()  # as an event does

    spent = Spent(tell)
    names = [f"t{number}" for number in range(10_000)]
    for name in names:
        spent.add(name)
    spent.tell()
    spent.tell()

    assert told == names


def test_who_was_told_of_otherwise_is_not_told_again() -> None:
    told: list[str] = []
    spent = Spent(told.append)
    spent.add("a")
    spent.discard("a")
    spent.tell()

    assert told == []


def test_a_telling_that_fails_keeps_the_others() -> None:
    told = []

    def tell(ticket_id: str) -> None:
        spent.discard(ticket_id)
        if ticket_id == "a":
            raise KeyError(ticket_id)
        told.append(ticket_id)

    spent = Spent(tell)
    for name in "abc":
        spent.add(name)
    with pytest.raises(KeyError):
        spent.tell()
    spent.tell()

    assert told == ["b", "c"]
