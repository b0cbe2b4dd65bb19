"""A call as a document, whether it lives in memory, in the database or in both."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice

from remoted.access import Peer
from remoted.api import schemas
from remoted.api.services import Services
from remoted.calls import Call
from remoted.model import Reason, Status
from remoted.scheduler.state import Lane
from remoted.store import Row

#: A queue may hold 100,000; people read the first screen, and ``counts`` has the rest.
QUEUE_SHOWN = 200


def of_call(services: Services, call: Call, lane: Lane | None = None, place: int | None = None) -> schemas.Job:
    """A live call; ``lane`` and ``place`` when it waits for a worker."""
    reason = call.reason.value if call.reason else ""
    if lane is not None:
        reason = lane.reason.value
    elif call.status is Status.IN_QUEUE and not reason:
        reason = Reason.STARTING.value if call.worker else Reason.WAITING_TURN.value
    return schemas.Job(
        id=call.id,
        kind="direct" if call.id in services.direct.calls else "queue",
        name=call.name,
        function=f"{call.spec.function.module}:{call.spec.function.qualname}",
        pool=call.spec.pool.name,
        status=call.status.value,
        state_reason=reason,
        detail="; ".join(filter(None, (_why(services, call, lane), _beyond_host(services, call)))),
        position=place + 1 if place is not None else None,
        submitted_at=call.submitted_at,
        started_at=call.started_at,
        ended_at=call.ended_at,
        run_seconds=call.run_seconds + (max(0.0, services.clock.wall() - call.attempt_started) if call.status is Status.IN_PROGRESS else 0.0),
        attempts=call.attempts,
        worker=call.worker_id,
        gpus=list(call.devices),
        items=len(call.items),
        result_size=call.result_size,
        error=call.error,
        error_type=call.error_type,
        parent=call.request.parent,
    )


def _why(services: Services, call: Call, lane: Lane | None) -> str:
    if lane is None:
        return str(services.engine.gate.drain) if call.id in services.engine.gate.held else ""
    if lane.reason is Reason.WAITING_ENV:
        return f"building {' '.join(call.spec.dependencies)}"
    return lane.detail


def _beyond_host(services: Services, call: Call) -> str:
    """A script written for a larger machine runs here with what there is (decision 0004), and is told so."""
    pool = call.spec.pool
    cpus, memory = services.engine.scheduler.cpus, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if pool.cpus is not None and pool.cpus > cpus:
        return f"asked for {pool.cpus:g} CPUs, this host lends {cpus:g}"
    if pool.memory_bytes is not None and pool.memory_bytes > memory:
        return f"asked for {pool.memory_bytes / (1 << 30):.0f} GiB of memory, this host has {memory / (1 << 30):.0f}"
    return ""


def of_row(row: Row) -> schemas.Job:
    """A job as the database has it."""
    return schemas.Job(
        id=row["id"],
        kind="queue",
        name=row["name"],
        function=row["function"],
        pool=row["pool"],
        status=row["status"],
        state_reason=row["state_reason"],
        detail="",
        position=None,
        submitted_at=row["submitted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        run_seconds=row["run_seconds"],
        attempts=row["attempts"],
        worker=row["worker"],
        gpus=row["gpus"].split(),
        items=row["items"],
        result_size=row["result_size"],
        error=row["error"],
        error_type=row["error_type"],
        parent=row["parent"],
    )


def of_live(services: Services, call: Call) -> schemas.Job:
    found = services.engine.scheduler.lane_of(call.id)
    return of_call(services, call, *(found or (None, None)))


def of_many(services: Services, calls: Iterable[Call], rows: Iterable[Row]) -> list[schemas.Job]:
    """These calls and rows; memory knows more than the database while a job lives. One walk through the queue for all."""
    places = {ticket.id: (lane, place) for lane, place, ticket in services.engine.scheduler.waiting()}
    found = [of_call(services, call, *places.get(call.id, (None, None))) for call in calls]
    for row in rows:
        call = services.jobs.calls.get(row["id"])
        found.append(of_row(row) if call is None else of_call(services, call, *places.get(call.id, (None, None))))
    return found


def _is_in_lane(services: Services, call_id: str) -> bool:
    scheduler = services.engine.scheduler
    return call_id in scheduler.tickets and call_id not in scheduler.placed


def of_attempt(row: Row) -> schemas.Attempt:
    """Without its token: whoever has that may speak for the attempt."""
    return schemas.Attempt(
        number=row["number"],
        worker=row["worker"],
        pid=row["worker_pid"],
        gpus=row["devices"].split(),
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        outcome=row["outcome"],
        message=row["message"],
    )


def live(services: Services, peer: Peer) -> list[Call]:
    """This peer's live calls of both kinds."""
    return [call for runner in (services.jobs, services.direct) for call in runner.calls.values() if call.uid == peer.uid]


def queue(services: Services, peer: Peer, calls: dict[str, Call]) -> list[schemas.Job]:
    """What waits, in the order in which it is considered; at most ``QUEUE_SHOWN``."""
    scheduler = services.engine.scheduler
    found: list[schemas.Job] = []
    own = (lane for uid, lanes in scheduler.users.items() if uid == peer.uid for lane in lanes.values())
    for lane in sorted(own, key=lambda lane: lane.rank):
        head = islice(lane.tickets, QUEUE_SHOWN - len(found))
        found += [of_call(services, calls[ticket.id], lane, place) for place, (_, ticket) in enumerate(head) if ticket.id in calls]
    # Not in a lane: about to start, waiting to be tried again, or waiting for a look at the GPUs.
    others = (call for call in calls.values() if call.status is Status.IN_QUEUE and not _is_in_lane(services, call.id))
    return found + [of_call(services, call) for call in islice(others, QUEUE_SHOWN - len(found))]
