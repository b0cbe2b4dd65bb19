"""Pools whose config a client process uses: their ``workers_min`` holds while it lives, and some time after (MECHANISMS 6)."""

from __future__ import annotations

from remoted.access import Peer
from remoted.contents import Contents
from remoted.engine import Engine
from remoted.scheduler.state import PoolKey


class Holding:
    """What one client has called by, as long as it is connected."""

    def __init__(self, engine: Engine, contents: Contents, peer: Peer) -> None:
        self._engine = engine
        self._contents = contents
        self._peer = peer
        self._used: set[str] = set()
        #: For how many seconds each is held when the client has gone.
        self._held: dict[PoolKey, float] = {}

    def use(self, spec_digest: str) -> None:
        """It calls by this spec. Raises BadRequest when that is not here."""
        if spec_digest in self._used:
            return
        policy = self._contents.spec(self._peer.uid, spec_digest).pool
        self._used.add(spec_digest)
        pool = (self._peer.uid, policy.class_, policy.name)
        if policy.workers_min and pool not in self._held:
            self._held[pool] = policy.keep_warm_seconds
            self._engine.holders.keep(pool)

    def close(self) -> None:
        """The client is gone, and holds for a while longer."""
        for pool, seconds in self._held.items():
            self._engine.holders.let_go(pool, seconds)
        self._held.clear()
