"""What each user has of the host when others want it too: how many turns, and how many calls at once.

Turns go round. One with the most weight of those who could use this turn takes it whenever it comes to him; one with less is
passed over until what he was owed makes a whole turn. So turns are as weights while all wait, and equal weights are plain rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from math import inf
from typing import NamedTuple

from remoted.model import Uid
from remoted.scheduler.state import Turns


class Turn(NamedTuple):
    """``steps``: how far the round has gone on with it. ``owed``: parts of a turn, by user, once it is used."""

    uid: Uid
    steps: int
    owed: dict[Uid, int]


class Shares:
    """Ordinary users have weight 1 and everybody's limit."""

    def __init__(self) -> None:
        self._weights: Mapping[Uid, int] = {}
        self._running: Mapping[Uid, int] = {}
        self._everybodys = 0
        self._owed: dict[Turns, dict[Uid, int]] = {kind: {} for kind in Turns}

    def set(self, weights: Mapping[Uid, int], running: Mapping[Uid, int], everybodys: int) -> None:
        """``running``: how many calls at once, of those who have a limit of their own; ``everybodys`` of all others. 0 is none."""
        self._weights = {uid: weight for uid, weight in weights.items() if weight != 1}
        self._running, self._everybodys = running, everybodys
        for owed in self._owed.values():
            owed.clear()

    @property
    def are_equal(self) -> bool:
        return not self._weights

    def weight(self, uid: Uid) -> int:
        return self._weights.get(uid, 1)

    def most_running(self, uid: Uid) -> float:
        """Infinite for who is not limited."""
        return self._running.get(uid, self._everybodys) or inf

    # -- turns by weight -----------------------------------------------------------------------------------

    def whose_turn(self, kind: Turns, turns: deque[Uid], missed: Collection[Uid]) -> Turn:
        """The next of those who have not missed it: there is one. Changes nothing before it is used."""
        most = max(self.weight(uid) for uid in turns if uid not in missed)
        owed = dict(self._owed[kind])
        for steps, uid in enumerate(turns, start=1):
            if uid in missed:
                continue
            owed[uid] = owed.get(uid, 0) + self.weight(uid)
            if owed[uid] >= most:
                owed[uid] -= most
                return Turn(uid, steps, owed)
        raise AssertionError("unreachable: the one with the most weight is never passed over")

    def use(self, kind: Turns, turn: Turn, turns: Collection[Uid]) -> None:
        """It was of use. Who waits no more is owed nothing."""
        self._owed[kind] = {uid: part for uid, part in turn.owed.items() if part and uid in turns}

    def leave(self, kind: Turns, uid: Uid) -> None:
        """Nothing of his waits any more."""
        self._owed[kind].pop(uid, None)
