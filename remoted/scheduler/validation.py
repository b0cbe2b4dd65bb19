"""What must hold after every event, found by looking at everything and trusting no index."""

from __future__ import annotations

from collections.abc import Iterable
from math import fsum

from remoted.model import WorkerId
from remoted.scheduler.fleet import Fleet
from remoted.scheduler.ledger import Ledger
from remoted.scheduler.pools import Pools
from remoted.scheduler.queue import Queue
from remoted.scheduler.state import Kind, Pool, PoolPolicy, Turns, WorkerState, WorkerView


def validate_queue(queue: Queue, fleet: Fleet) -> None:
    queued = [ticket.id for _, _, ticket in queue]
    assert len(queued) == len(set(queued)), "a ticket waits twice"
    assert set(queued) | set(fleet.placed) == set(queue.tickets), "a ticket was forgotten"
    assert not set(queued) & set(fleet.placed), "a ticket waits and runs"
    for kind, turns in queue.turns.items():
        owners = {uid for uid, lanes in queue.users.items() if any(lane.turns is kind for lane in lanes.values())}
        assert set(turns) == owners, "a user has no turn"
        assert len(turns) == len(owners), "a user has two turns"
    lanes = [lane for lanes in queue.users.values() for lane in lanes.values()]
    assert all(lane.tickets for lane in lanes), "a lane is empty"
    assert all(lanes[lane.key] is lane for lanes in queue.users.values() for lane in lanes.values()), "a lane has another's name"
    assert queue.lanes == {ticket.id: lane for lane, _, ticket in queue}, "a ticket waits in another lane"
    assert set(queue.wide) == {lane for lane in lanes if lane.is_wide}, "a wide lane is not known as one"
    assert queue.nested == sum(bool(ticket.ancestors) for _, _, ticket in queue), "waiting nested calls are miscounted"
    nested = {ticket.id for ticket in queue.tickets.values() if ticket.ancestors}
    assert nested == {child for family in queue.children.values() for child in family}, "a nested call has no caller"


def validate_fleet(fleet: Fleet, ledger: Ledger) -> None:
    workers = fleet.workers.values()
    assert fleet.homes == {instance: worker.id for worker in workers for instance in worker.instances}, "an instance lives elsewhere"
    for worker in workers:
        _validate_worker(worker, fleet)
    held = [uuid for worker in workers for uuid in worker.devices]
    assert len(held) == len(set(held)), "a device is lent twice"
    assert {uuid: worker.id for worker in workers for uuid in worker.devices} == ledger.holders, "the ledger names other holders"
    assert ledger.free == {uuid for uuid in ledger.devices if uuid not in ledger.holders and ledger.is_usable(uuid)}, (
        "a free device is not known as one"
    )
    used = {
        ticket.id: ticket.cpus
        for worker in workers
        for ticket in worker.running.values()
        if ticket.cpus and ticket.id not in worker.waiting
    }
    assert fleet.reserved == used, "a reservation is not a running body's"
    assert fleet.cpus_used() == fsum(used.values()), "reserved CPUs are summed wrongly"
    assert fleet.promised == {worker.id: worker.expected_cpus for worker in workers if worker.expected_cpus}, "CPUs are promised wrongly"


def _validate_worker(worker: WorkerView, fleet: Fleet) -> None:
    assert worker.waiting <= set(worker.running), "a call waits that does not run"
    assert worker.waiting_early <= set(worker.ahead), "a call waits that is not here"
    for ticket_id, ticket in worker.running.items():
        assert fleet.placed[ticket_id] == worker.id, "a ticket runs where it was not placed"
        assert ticket.need.uid == worker.need.uid, "a worker serves two users"
        left = fleet.homes.get(ticket.need.instance or "", worker.id) != worker.id
        assert worker.state is WorkerState.ENDING or not left, "an instance's call left its home"
    for ticket_id, ticket in worker.ahead.items():
        assert fleet.placed[ticket_id] == worker.id, "a ticket is ahead where it was not placed"
        assert all(ticket.lane == other.lane for other in worker.running.values()), "a ticket is ahead behind another lane's"
    assert worker.running or not worker.ahead, "a ticket is ahead behind nothing"
    if worker.state in (WorkerState.STARTING, WorkerState.IDLE):
        assert not worker.running, "a free worker runs something"
    if worker.state is WorkerState.BUSY:
        assert worker.running, "a busy worker runs nothing"


def validate_index(pools: Pools, queue: Queue, fleet: Fleet) -> None:
    """The indexes of pools, kinds and states hold what they should, and nothing else."""
    workers = list(fleet.workers.values())
    lanes = [lane for lanes in queue.users.values() for lane in lanes.values()]
    needs = [worker.need for worker in workers] + [lane.need for lane in lanes]
    assert set(pools.index) == {need.pool for need in needs}, "a pool is missing or dead"
    kinds = {(need.pool, (need.kind, need.gpu)) for need in needs}
    assert kinds == {(pool.key, key) for pool in pools.index.values() for key in pool.kinds}, "a kind is missing or dead"
    for pool in pools.index.values():
        assert pool.policy == pools.policies.get(pool.key, PoolPolicy()), "a pool has another policy"
        _validate_pool(pool, [worker for worker in workers if worker.need.pool == pool.key])
        assert pool.lanes == {
            kind: count for kind in Turns if (count := sum(lane.turns is kind for lane in lanes if lane.need.pool == pool.key))
        }
        for kind in pool.kinds.values():
            _validate_kind(kind, [worker for worker in workers if _fits(worker, kind)])
            assert set(kind.lanes) == {lane for lane in lanes if lane.kind is kind}, "a lane is not in its kind"
    assert all((lane.need.pool, lane.need.kind, lane.need.gpu) == (lane.kind.pool.key, *lane.kind.key) for lane in lanes), (
        "a lane has another's kind"
    )
    _same(fleet.idle, _in_state(workers, WorkerState.IDLE), "idle workers")
    _same(pools.idle_ends, _idle_ends(pools), "ends of idle times")
    _same(fleet.lendable, _by_id(worker for worker in workers if worker.devices and worker.has_room), "workers with devices and room")
    _same(fleet.fresh, _by_id(worker for worker in workers if worker.is_fresh and worker.state is WorkerState.IDLE), "fresh workers")
    _same(fleet.waiting, _by_id(worker for worker in workers if worker.waiting), "workers whose bodies wait")
    _same(fleet.starting, _in_state(workers, WorkerState.STARTING), "starting workers")
    _same(fleet.ending, _in_state(workers, WorkerState.ENDING), "ending workers")


def _idle_ends(pools: Pools) -> dict[Pool, float]:
    ends = ((pool, [pools.kept_until(worker) for worker in pool.idle.values()]) for pool in pools.index.values() if not pools.is_kept(pool))
    return {pool: min(end for end in found if end is not None) for pool, found in ends if found}


def _validate_pool(pool: Pool, workers: list[WorkerView]) -> None:
    _same(pool.workers, _by_id(workers), "workers of a pool")
    _same(pool.idle, _in_state(workers, WorkerState.IDLE), "idle workers of a pool")
    _same(pool.ending, _in_state(workers, WorkerState.ENDING), "ending workers of a pool")
    running = (worker for worker in workers if worker.state is WorkerState.BUSY and not worker.is_waiting)
    _same(pool.busy, _by_id(running), "busy workers of a pool")
    _same(pool.waiting, _by_id(worker for worker in workers if worker.is_waiting), "waiting workers of a pool")
    _assert_ordered(pool.idle)


def _validate_kind(kind: Kind, workers: list[WorkerView]) -> None:
    assert all(worker.kind is kind for worker in workers), "a worker has another's kind"
    _same(kind.workers, _by_id(workers), "workers of a kind")
    _same(kind.idle, _in_state(workers, WorkerState.IDLE), "idle workers of a kind")
    _same(kind.starting, _in_state(workers, WorkerState.STARTING), "starting workers of a kind")
    _same(kind.shareable, _by_id(worker for worker in workers if worker.is_shareable), "shareable workers of a kind")
    _assert_ordered(kind.idle)


def _fits(worker: WorkerView, kind: Kind) -> bool:
    return (worker.need.pool, worker.need.kind, worker.need.gpu) == (kind.pool.key, *kind.key)


def _in_state(workers: Iterable[WorkerView], state: WorkerState) -> dict[WorkerId, WorkerView]:
    return _by_id(worker for worker in workers if worker.state is state)


def _by_id(workers: Iterable[WorkerView]) -> dict[WorkerId, WorkerView]:
    return {worker.id: worker for worker in workers}


def _same(index: object, truth: object, what: str) -> None:
    assert index == truth, f"the index of {what} is wrong"


def _assert_ordered(idle: dict[WorkerId, WorkerView]) -> None:
    since = [worker.since for worker in idle.values()]
    assert since == sorted(since), "idle workers are not in order"
