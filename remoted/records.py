"""Finished and stored jobs: what is known of them, their results, and when they are forgotten.

Every look-up is filtered by owner in SQL: another user's job is not found, like one that never was (T10).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from remoted import logs, usage
from remoted.access import Peer
from remoted.attempts import Content
from remoted.blobs import Blobs
from remoted.clock import Clock
from remoted.errors import Conflict, NotFound
from remoted.limits import Limits
from remoted.paths import Paths
from remoted.quotas import ROW_BYTES
from remoted.store import Row, Statements, Store
from remoted.tally import Histogram
from remoted.usage import Pending, Totals


class Records:
    """The stored side of the queue; it changes nothing but what has expired."""

    def __init__(self, store: Store, blobs: Blobs, paths: Paths, clock: Clock, limits: Limits) -> None:
        self._store = store
        self._blobs = blobs
        self._paths = paths
        self._clock = clock
        self._limits = limits

    @property
    def commits(self) -> Histogram:
        """How long each of the store's transactions took."""
        return self._store.commits

    @property
    def is_in_place(self) -> bool:
        """Will the next daemon find what this one has stored?"""
        return self._store.is_in_place

    @property
    def is_behind(self) -> bool:
        """Is something of what was stored not on the disk yet?"""
        return self._store.is_behind

    def flush(self, then: Callable[[], None]) -> None:
        """Call it when all that was stored is on the disk, which may be now."""
        self._store.flush(then)

    async def charge(self, pending: Pending) -> None:
        """What has no rows of its own; and forget what nobody will ask for."""
        found, now = pending.take(), self._clock.wall()

        def charge(db: Statements) -> None:
            usage.charge_all(db, found)
            usage.forget_old(db, now)

        await self._store.submit(charge)

    async def used(self, seconds: float) -> dict[int, Totals]:
        """By user."""
        now = self._clock.wall()
        return await self._store.submit(lambda db: usage.totals(db, now, seconds))

    async def kept_bytes(self) -> dict[int, int]:
        """By user, as far as the store knows it."""
        rows = await self._store.submit(lambda db: db.all("kept_bytes", row=ROW_BYTES))
        return {row["uid"]: row["bytes"] for row in rows}

    async def row(self, peer: Peer, job_id: str) -> Row:
        """One job of this peer's, from the store. Raises NotFound."""
        found = await self._store.submit(lambda db: db.one("get_job", id=job_id, uid=peer.uid))
        if found is None:
            raise self._unknown(job_id)
        return found

    async def resolve(self, peer: Peer, prefix: str) -> str:
        """The full id for its beginning. Raises NotFound, or Conflict when several begin so."""
        if not prefix or not all(letter in "0123456789abcdef" for letter in prefix):
            raise NotFound("NOT_FOUND", f"cannot find job {prefix[:80]!r}: ids are hexadecimal")
        rows = await self._store.submit(lambda db: db.all("find_jobs", uid=peer.uid, pattern=f"{prefix}*"))
        if len(rows) > 1:
            raise Conflict("AMBIGUOUS", f"cannot choose: several of your jobs begin with {prefix}")
        if not rows:
            raise self._unknown(prefix)
        return str(rows[0]["id"])

    async def rows(self, peer: Peer, everything: bool, limit: int, *, status: str = "", pool: str = "", name: str = "", after: str = "") -> list[Row]:
        """Newest first. ``status``: one or several with commas; ``name``: a pattern; ``after``: the last job of the page before."""
        wanted = {"status": status, "pool": pool, "name": name, "after": after}
        return await self._store.submit(lambda db: db.all("list_jobs", uid=peer.uid, all=int(everything or bool(status)), limit=limit, **wanted))

    def log_path(self, job_id: str) -> Path:
        """Where the output of a job is kept."""
        return self._paths.logs / f"{job_id}.log"

    async def attempts(self, job_id: str) -> list[Row]:
        return await self._store.submit(lambda db: db.all("get_attempts", job=job_id))

    async def stored_items(self, job_id: str) -> list[Content]:
        """Up to the first that is missing: a large one may not have been stored yet when a crash came, and a later one have been."""
        found = await self._store.submit(lambda db: db.all("get_items", job=job_id))
        rows = [row for index, row in enumerate(found) if row["number"] == index]
        return [
            Content("", row["inline"], None) if row["inline"] is not None else Content("", None, str(self._blobs.item_path(job_id, row["number"])))
            for row in rows
        ]

    def stored_result(self, row: Row) -> Content:
        """The payload of a finished job."""
        if row["result_inline"] is not None:
            return Content("", row["result_inline"], None)
        return Content("", None, str(self._blobs.result_path(row["id"])))

    def _unknown(self, job_id: str) -> NotFound:
        days = self._limits.result_seconds / 86_400
        return NotFound("NOT_FOUND", f"cannot find job {job_id[:80]}: you have no job with this id (results are kept for {days:g} days; load-balanced calls have none)")

    async def expire(self) -> None:
        """Forget what ended long ago."""
        before = self._clock.wall() - self._limits.result_seconds
        for row in await self._store.submit(lambda db: db.all("expired_jobs", before=before)):
            await self._forget(row["id"])

    async def forget_oldest(self, uid: int, excess: int) -> None:
        """One user's results, the oldest first, until so many bytes are free."""
        for row in await self._store.submit(lambda db: db.all("oldest_results", uid=uid)):
            if excess <= 0:
                return
            excess -= row["bytes"] + ROW_BYTES + logs.size_of(self.log_path(row["id"]))
            await self._forget(row["id"])

    async def _forget(self, job_id: str) -> None:
        await self._store.submit(functools.partial(_delete_job, job_id))
        self._blobs.remove_job(job_id)
        self._blobs.remove(self.log_path(job_id))


def _delete_job(job_id: str, db: Statements) -> None:
    db.run("delete_job", id=job_id)
