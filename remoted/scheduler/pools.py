"""Pools: their policies, who holds them, and the index of what serves them and waits for them."""

from __future__ import annotations

from remoted.scheduler.state import Kind, Need, Pool, PoolKey, PoolPolicy, WorkerState, WorkerView

_EXTRA_SECONDS = 10.0
#: Pools of one user: each of them keeps a worker at least, and nobody has more workers. All are looked at with every event.
_HELD_MOST = 256


class Pools:
    """The index has only pools with workers or lanes; a policy stays for as long as there are such, or somebody holds its pool.

    Users make up the names of pools, so nothing is kept of one that is no more.
    """

    def __init__(self) -> None:
        self.policies: dict[PoolKey, PoolPolicy] = {}
        #: Until when somebody uses the pool's config (monotonic seconds).
        self.held_until: dict[PoolKey, float] = {}
        #: What the newest worker of each held pool was started for.
        self.newest: dict[PoolKey, Need] = {}
        self.index: dict[PoolKey, Pool] = {}
        #: When the idle time of each pool's longest idle worker ends; only of pools with idle ones that nobody keeps.
        self.idle_ends: dict[Pool, float] = {}

    def set_policy(self, key: PoolKey, policy: PoolPolicy) -> bool:
        """True if the pool had another one."""
        before = self.policies.get(key)
        if before == policy:
            return False
        self.policies[key] = policy
        pool = self.index.get(key)
        if pool is not None:
            pool.policy = policy
            self.update_ends(pool)
        return before is not None

    def kind(self, need: Need) -> Kind:
        """The kind of worker that such tickets run in."""
        if (kind := self.find(need)) is not None:
            return kind
        pool = self.index.get(need.pool)
        if pool is None:
            pool = self.index[need.pool] = Pool(need.pool, self.policies.get(need.pool, PoolPolicy()))
        key = (need.kind, need.gpu)
        kind = pool.kinds[key] = Kind(key, pool)
        return kind

    def find(self, need: Need) -> Kind | None:
        """The same, if anything serves it or waits for it."""
        pool = self.index.get(need.pool)
        return pool.kinds.get((need.kind, need.gpu)) if pool is not None else None

    def prune(self, kind: Kind) -> None:
        """Drop it from the index if nothing serves it and nothing waits for it."""
        if kind.lanes or kind.workers:
            return
        del kind.pool.kinds[kind.key]
        if not kind.pool.kinds:
            del self.index[kind.pool.key]
            self._forget_policy(kind.pool.key)

    def _forget_policy(self, key: PoolKey) -> None:
        if key not in self.index and key not in self.held_until:
            self.policies.pop(key, None)

    def hold(self, key: PoolKey, until: float) -> None:
        if key not in self.held_until and sum(held[0] == key[0] for held in self.held_until) >= _HELD_MOST:
            return
        self.held_until[key] = until
        if key in self.index:
            self.update_ends(self.index[key])

    def let_go(self, now: float) -> None:
        """Forget who held a pool until now."""
        for key in [key for key, until in self.held_until.items() if until <= now]:
            del self.held_until[key]
            self.newest.pop(key, None)
            if key in self.index:
                self.update_ends(self.index[key])
            self._forget_policy(key)

    def is_kept(self, pool: Pool) -> bool:
        """All its live workers are its ``workers_min``, while somebody uses the config."""
        return pool.policy.workers_min > 0 and pool.live <= pool.policy.workers_min and pool.key in self.held_until

    def kept_until(self, worker: WorkerView) -> float | None:
        """When it will be ended if nothing happens (monotonic seconds); None unless it is idle."""
        if worker.state is not WorkerState.IDLE:
            return None
        pool = worker.kind.pool
        until = worker.since + _idle_seconds(pool)
        return max(until, self.held_until[pool.key]) if self.is_kept(pool) else until

    def update_ends(self, pool: Pool) -> None:
        """After anything that changes whether its idle workers are ended, and when."""
        if pool.idle and not self.is_kept(pool):
            self.idle_ends[pool] = next(iter(pool.idle.values())).since + _idle_seconds(pool)
        else:
            self.idle_ends.pop(pool, None)


def _idle_seconds(pool: Pool) -> float:
    """Workers that only nested calls made necessary stay for those that may follow soon, not for the whole timeout."""
    timeout = pool.policy.idle_timeout_seconds
    return min(timeout, _EXTRA_SECONDS) if pool.has_extra else timeout
