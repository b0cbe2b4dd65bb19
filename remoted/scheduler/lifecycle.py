"""Workers' lives: which are started, which are ended to make room, and which because nobody uses them."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from remoted.model import DeviceUuid, WorkerId
from remoted.scheduler.crashes import Crashes
from remoted.scheduler.events import StartWorker, Step, StopWorker
from remoted.scheduler.fleet import Fleet
from remoted.scheduler.ledger import Ledger
from remoted.scheduler.pools import Pools
from remoted.scheduler.state import Kind, Need, Pool, WorkerState, WorkerView


class Lifecycle:
    """Starts and ends workers, whoever asks for it."""

    def __init__(self, pools: Pools, fleet: Fleet, ledger: Ledger, crashes: Crashes) -> None:
        self._crashes = crashes
        #: When pools whose workers crashed too often are tried again.
        self._retries: set[float] = set()
        self._pools = pools
        self._fleet = fleet
        self._ledger = ledger

    def start(self, need: Need, kind: Kind, devices: tuple[DeviceUuid, ...], step: Step, expected_cpus: float | None = None) -> WorkerView:
        worker = self._fleet.start(need, kind, devices, step.now, expected_cpus)
        step.decisions.append(StartWorker(worker.id, need, devices))
        return worker

    def stop(self, worker: WorkerView, why: str, step: Step) -> None:
        self._fleet.set_state(worker, WorkerState.ENDING, step.now)
        step.decisions.append(StopWorker(worker.id, why))

    # -- making room ---------------------------------------------------------------------------------------

    def evict_from_pool(self, pool: Pool, spared: Kind, step: Step) -> None:
        """End the least wanted idle worker of another kind, unless one of the pool ends already and will make room."""
        if pool.idle and not pool.ending:
            self._evict([worker for worker in pool.idle.values() if worker.kind is not spared], step)

    def evict_from_host(self, step: Step) -> None:
        """The same where the host has all the workers that it may have."""
        if not self._fleet.ending:
            self._evict([*self._fleet.idle.values()], step)

    def evict_from_many(self, step: Step) -> None:
        """The same where what is left is for users who have few: none of theirs."""
        if not self._fleet.ending:
            self._evict(self._fleet.idle_of_many(), step)

    def _evict(self, idle: list[WorkerView], step: Step) -> None:
        if idle:
            self.stop(self._by_use(sorted(idle, key=_number))[0], "its place is needed", step)

    def free_devices(self, group: list[DeviceUuid], count: int, step: Step) -> bool:
        """End idle workers so that ``count`` of these devices come free, if that is enough. False if it is not."""
        victims = self._find_victims(group, count)
        for worker in victims or ():
            self.stop(worker, "its GPU is needed", step)
        return victims is not None

    def _find_victims(self, group: list[DeviceUuid], count: int) -> list[WorkerView] | None:
        """Idle workers whose end makes ``count`` of these devices free; empty if enough come free anyway; None if not."""
        holders = [self._fleet.workers.get(self._ledger.holders.get(uuid, WorkerId(""))) for uuid in group]
        coming = sum(worker is None or worker.state is WorkerState.ENDING for worker in holders)
        victims: list[WorkerView] = []
        idle = {worker.id: worker for worker in holders if worker is not None and worker.state is WorkerState.IDLE}
        for worker in self._by_use(idle.values()):
            if coming >= count:
                break
            victims.append(worker)
            coming += sum(holder is worker for holder in holders)
        return victims if coming >= count else None

    def _by_use(self, idle: Iterable[WorkerView]) -> list[WorkerView]:
        """The least wanted first: not kept warm by ``workers_min``, then the longest idle."""
        return sorted(idle, key=lambda worker: (self._pools.is_kept(worker.kind.pool), worker.since))

    # -- what nobody waits for -----------------------------------------------------------------------------

    def stop_lost(self, workers: Iterable[WorkerView], step: Step) -> None:
        """An idle worker whose device is gone is of no use."""
        for worker in list(workers):
            if self._fleet.is_lost(worker):
                self.stop(worker, "its GPU is gone", step)

    def reap_idle(self, step: Step) -> None:
        """Nobody has used them for the pool's idle timeout."""
        ends = self._pools.idle_ends
        if not ends or min(ends.values()) > step.now:
            return
        idle = [worker for pool in ends for worker in pool.idle.values()]
        for worker in sorted(idle, key=_number):
            until = self._pools.kept_until(worker)  # when some are ended, the rest may be ``workers_min``, or no longer too many
            if until is not None and until <= step.now and not self._pools.is_kept(worker.kind.pool):
                self.stop(worker, "idle", step)

    def next_wakeup(self) -> float | None:
        """When a worker's idle time ends, or somebody's hold of a pool; None while only events matter."""
        first = min((*self._pools.idle_ends.values(), *self._pools.held_until.values(), *self._retries), default=inf)
        return first if first < inf else None

    def keep_minimum(self, are_devices_wanted: bool, step: Step) -> None:
        """Start what ``workers_min`` asks for, of the kind last used, where no device must be taken for it."""
        self._retries.clear()
        for key in self._pools.held_until:
            pool = self._pools.index.get(key)
            live = [worker for worker in pool.workers.values() if worker.state is not WorkerState.ENDING] if pool is not None else []
            need = max(live, key=lambda worker: worker.since).need if live else self._pools.newest.get(key)
            policy = self._pools.policies.get(key)
            if need is None or policy is None:
                continue
            # One place is left to who waits: a worker in it would only be ended again.
            places = policy.workers_max - (pool.places_used + bool(pool.lanes) if pool is not None else 0)
            missing = min(policy.workers_min - len(live), places)
            if missing <= 0:
                continue
            paused = self._crashes.paused_until(key, step.now)
            if paused is not None:
                self._retries.add(paused)
            # While somebody waits for a device, keeping one warm would only be undone.
            elif need.gpu is None or not are_devices_wanted:
                self._start_extra(need, missing, step)

    def _start_extra(self, need: Need, count: int, step: Step) -> None:
        for _ in range(min(count, self._fleet.places_for(need.uid))):
            devices = self._ledger.pick(need.gpu) if need.gpu else ()
            if devices is None:
                return
            self.start(need, self._pools.kind(need), devices, step)


def _number(worker: WorkerView) -> int:
    return worker.number
