"""What is kept of each user in memory: the newest, so many bytes of each."""

from __future__ import annotations

from remoted.cradle import WorkerPlan
from remoted.plans import Plans
from remoted.recent import Recents


def test_t18_who_says_much_loses_only_his_own() -> None:
    kept: Recents[str, int] = Recents(100)
    kept.add(2, "other", 0, 90)
    gone = [kept.add(1, f"{number}", number, 40) for number in range(4)]
    assert gone == [[], [], [("0", 0)], [("1", 1)]]
    assert kept.get(2, "other") == 0
    assert kept.get(1, "2") == 2
    assert kept.add(1, "4", 4, 40) == [("3", 3)], "the one that was used last stays"
    assert kept.add(1, "large", 5, 1000) == [("2", 2), ("4", 4)]
    assert kept.get(1, "large") == 5, "the newest is kept however large it is"


def test_t18_plans_are_bounded_and_the_same_kind_means_the_same_plan() -> None:
    plans = Plans()
    plans.learn(1, "kind", WorkerPlan("/python", {"A": "1"}, hints=frozenset({"numpy"})))
    plans.learn(1, "kind", WorkerPlan("/python", {"A": "2"}, hints=frozenset({"torch"})))
    found = plans.find(1, "kind")
    assert found is not None
    assert (found.environ, found.hints) == ({"A": "1"}, {"numpy", "torch"})
    for number in range(40):
        plans.learn(1, f"{number}", WorkerPlan("/python", {"A": "x" * 1_000_000}))
    assert plans.find(1, "kind") is None
    assert plans.find(1, "39") is not None
    assert plans.find(2, "39") is None
