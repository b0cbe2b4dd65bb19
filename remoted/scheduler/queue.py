"""The queue: every known ticket, the waiting ones in lanes, and whose turn it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from remoted.model import Uid
from remoted.scheduler.changes import Changes
from remoted.scheduler.pools import Pools
from remoted.scheduler.shares import Shares
from remoted.scheduler.state import Lane, LaneKey, Ticket, TicketId, Turns


class Queue:
    """Lanes by user, and users in turns. A ticket that was placed is still known, until it is forgotten."""

    def __init__(self, pools: Pools, changes: Changes, shares: Shares) -> None:
        self.users: dict[Uid, dict[LaneKey, Lane]] = {}
        self.turns: dict[Turns, deque[Uid]] = {kind: deque() for kind in Turns}
        self.tickets: dict[TicketId, Ticket] = {}
        #: Known nested tickets by the body that called them.
        self.children: dict[TicketId, dict[TicketId, None]] = {}
        #: Where each waiting ticket waits.
        self.lanes: dict[TicketId, Lane] = {}
        #: Lanes that need several devices or CPUs at once.
        self.wide: dict[Lane, None] = {}
        #: How many nested tickets wait.
        self.nested = 0
        self._pools = pools
        self._shares = shares
        self._changes = changes
        self._sequence = 0

    def __iter__(self) -> Iterator[tuple[Lane, int, Ticket]]:
        """Every waiting ticket with its lane and place."""
        for lanes in self.users.values():
            for lane in lanes.values():
                for place, (_, ticket) in enumerate(lane.tickets):
                    yield lane, place, ticket

    # -- coming --------------------------------------------------------------------------------------------

    def add(self, *tickets: Ticket) -> Lane:
        """All of one lane, the first one first."""
        lane = self._lane(tickets[0])
        for ticket in tickets:
            if ticket.id in self.tickets:
                raise ValueError(f"cannot queue {ticket.id}: it is already known")
            self.know(ticket)
            self._enter(lane, ticket)
            self._sequence += 1
            lane.tickets.add(self._sequence, ticket)
        return lane

    def put_back(self, ticket: Ticket) -> Lane:
        """It was taken out and is still known: before all others of its lane."""
        lane = self._lane(ticket)
        self._enter(lane, ticket)
        lane.tickets.add_first(lane.tickets.head[0] - 1 if lane.tickets else self._sequence, ticket)
        self._changes.in_pool(lane.kind.pool)  # somebody may have become free since it was taken out
        return lane

    def _lane(self, ticket: Ticket) -> Lane:
        """Where it will wait."""
        lanes = self.users.setdefault(ticket.need.uid, {})
        lane = lanes.get(ticket.lane)
        if lane is None:
            lane = lanes[ticket.lane] = self._open(ticket.lane)
        if lane.kind.starting:
            self._changes.in_pool(lane.kind.pool)  # those that start may not be enough any more
        return lane

    def _enter(self, lane: Lane, ticket: Ticket) -> None:
        self.lanes[ticket.id] = lane
        self.nested += bool(ticket.ancestors)

    def know(self, ticket: Ticket) -> None:
        self.tickets[ticket.id] = ticket
        if ticket.ancestors:
            self.children.setdefault(ticket.ancestors[-1], {})[ticket.id] = None

    def _open(self, key: LaneKey) -> Lane:
        need = key[0]
        lane = Lane(*key, self._pools.kind(need))
        lane.kind.lanes[lane] = None
        lane.kind.pool.lanes[lane.turns] += 1
        if lane.is_wide:
            self.wide[lane] = None
        if need.uid not in self.turns[lane.turns]:
            self.turns[lane.turns].append(need.uid)
        return lane

    # -- leaving -------------------------------------------------------------------------------------------

    def take(self, ticket: Ticket) -> None:
        """Out of its lane, but still known."""
        lane = self.lanes[ticket.id]
        lane.tickets.remove(ticket.id)
        self._leave(lane, ticket)

    def pop(self, lane: Lane) -> Ticket:
        """Take the lane's head."""
        ticket = lane.tickets.pop()
        lane.blocked_since, lane.explained, lane.failed_at = None, -1, -1
        self._leave(lane, ticket)
        return ticket

    def _leave(self, lane: Lane, ticket: Ticket) -> None:
        del self.lanes[ticket.id]
        self.nested -= bool(ticket.ancestors)
        if not lane.tickets:
            self._close(lane)

    def remove(self, ticket_id: TicketId) -> None:
        """Forget a waiting ticket; unknown and placed ones are left alone."""
        if ticket_id in self.lanes:
            self.take(self.tickets[ticket_id])
            self.forget(ticket_id)

    def forget(self, ticket_id: TicketId) -> None:
        ticket = self.tickets.pop(ticket_id, None)
        if ticket is None or not ticket.ancestors:
            return
        siblings = self.children[ticket.ancestors[-1]]
        del siblings[ticket_id]
        if not siblings:
            del self.children[ticket.ancestors[-1]]

    def _close(self, lane: Lane) -> None:
        uid, turns, pool = lane.need.uid, lane.turns, lane.kind.pool
        lanes = self.users[uid]
        del lanes[lane.key]
        del lane.kind.lanes[lane]
        pool.lanes[turns] -= 1
        if not pool.lanes[turns]:
            del pool.lanes[turns]
        self.wide.pop(lane, None)
        if not any(other.turns is turns for other in lanes.values()):
            self.turns[turns].remove(uid)
            self._shares.leave(turns, uid)
        if not lanes:
            del self.users[uid]
        self._pools.prune(lane.kind)

    # -- looking -------------------------------------------------------------------------------------------

    def lane_like(self, ticket: Ticket) -> Lane | None:
        """Where tickets of the same need, reservation and priority wait."""
        return self.users.get(ticket.need.uid, {}).get(ticket.lane)

    def place_of(self, ticket_id: TicketId) -> tuple[Lane, int] | None:
        """The lane of a waiting ticket and its place there (0 = next)."""
        lane = self.lanes.get(ticket_id)
        if lane is None:
            return None
        return lane, next(place for place, item in enumerate(lane.tickets) if item[1].id == ticket_id)

    def in_order(self, lanes: list[Lane]) -> list[Lane]:
        """Higher priority first, then the older head."""
        return sorted(lanes, key=_rank) if len(lanes) > 1 else lanes

    def end_turn(self, uid: Uid, kind: Turns) -> None:
        """The user goes behind all others, unless nothing of his waits."""
        turns = self.turns[kind]
        if uid in turns:
            turns.remove(uid)
            turns.append(uid)


def _rank(lane: Lane) -> tuple[int, int]:
    return lane.rank
