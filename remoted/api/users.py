"""Users: what each has running and waiting, what it used, and its share. Others are one anonymous total for who is no administrator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from aiohttp import web

from remoted.access import Rule
from remoted.api import others, schemas
from remoted.api.exchange import Ask, reply
from remoted.api.services import Services
from remoted.calls import Call
from remoted.config import Seen
from remoted.model import Status
from remoted.usage import Totals

_DAY_SECONDS = 86_400.0
_WEEK_SECONDS = 7 * _DAY_SECONDS


class _Books:
    """All that is known of who uses what, at one moment."""

    def __init__(self, services: Services, day: dict[int, Totals], week: dict[int, Totals], kept: dict[int, int]) -> None:
        self._limits = services.limits
        self._now = services.clock.wall()
        self._calls = [call for runner in (services.jobs, services.direct) for call in runner.calls.values()]
        self._running: Counter[int] = Counter(call.uid for call in self._calls if call.status is Status.IN_PROGRESS)
        self._queued: Counter[int] = Counter(call.uid for call in self._calls if call.status is Status.IN_QUEUE)
        self._day, self._week, self._kept = day, week, kept

    @property
    def uids(self) -> set[int]:
        return {*(call.uid for call in self._calls), *self._week, *self._kept, *self._limits.users}

    def user(self, uid: int) -> schemas.User:
        limits, active = self._limits, {call.uid for call in self._calls} | {uid}
        return schemas.User(
            uid=uid,
            weight=limits.share(uid).weight,
            share=limits.share(uid).weight / sum(limits.share(other).weight for other in active),
            queued=self._queued[uid],
            running=self._running[uid],
            day=self._use([uid], self._day, _DAY_SECONDS),
            week=self._use([uid], self._week, _WEEK_SECONDS),
            stored_bytes=self._kept.get(uid, 0),
            queued_jobs=limits.queued_jobs(uid),
            running_jobs=limits.running_jobs(uid),
            stored_bytes_limit=limits.stored_bytes(uid),
        )

    def others(self, uid: int) -> schemas.Others:
        others = self.uids - {uid}
        return schemas.Others(
            users=len({call.uid for call in self._calls} - {uid}),
            queued=sum(self._queued[other] for other in others),
            running=sum(self._running[other] for other in others),
            day=self._use(others, self._day, _DAY_SECONDS),
            week=self._use(others, self._week, _WEEK_SECONDS),
        )

    def _use(self, uids: Iterable[int], stored: dict[int, Totals], seconds: float) -> schemas.Use:
        """What is stored, and what those hold who run now."""
        mine = set(uids)
        spans = [call.used_until(self._now) for call in self._calls if call.uid in mine and _runs(call)]
        held = [(span, span.seconds_since(self._now - seconds)) for span in spans]
        return schemas.Use(
            gpu_seconds=sum(stored[uid].gpu_seconds for uid in mine if uid in stored) + sum(span.gpus * length for span, length in held),
            cpu_seconds=sum(stored[uid].cpu_seconds for uid in mine if uid in stored) + sum(span.cpus * length for span, length in held),
        )


def _runs(call: Call) -> bool:
    return call.status is Status.IN_PROGRESS and not call.is_ahead


async def users(services: Services, ask: Ask) -> web.StreamResponse:
    """Who waits, runs, and used how much: for an administrator everybody, for a user herself and all others together."""
    sees_all = services.jobs.access.allows(Rule.ADMIN, ask.peer)
    records = services.jobs.records
    day, week = await records.used(_DAY_SECONDS), await records.used(_WEEK_SECONDS)
    books = _Books(services, day, week, services.jobs.contents.quotas.users())
    if sees_all:
        return reply(schemas.Users(users=[books.user(uid) for uid in sorted(books.uids | {ask.peer.uid})], others=None))
    may_see_others = others.seen(services, ask.peer) is not Seen.NOTHING
    return reply(schemas.Users(users=[books.user(ask.peer.uid)], others=books.others(ask.peer.uid) if may_see_others else None))
